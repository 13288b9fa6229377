"""Does an independent engine write what our decoder writes? Greedy answers over HTTP, text for text.

    python -m listopd_jax.export --workdir=runs/smollm2 --policy=sft_teacher --out=FOLDER
    python -m benchmarks.served --weights=FOLDER --start="transformers serve" --out=docs/results/served.json

The engine reads FOLDER on its own: weights, config, tokenizer, chat template. It must speak OpenAI's chat completions;
--start begins it here on a free port, --url asks one that runs (vLLM, llama.cpp). The prompts are synthetic lists.
"""

import argparse
import contextlib
import json
import pathlib
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from listopd_jax import files
from listopd_jax.data.chat import chat_prompt, turn_ends
from listopd_jax.data.synthetic import synthetic_reviews
from listopd_jax.data.tokenizer import load_tokenizer
from listopd_jax.errors import Parser, UserError, exit_code, positive
from listopd_jax.models.build import graph_of
from listopd_jax.models.hf import load_hf, read_eos_ids
from listopd_jax.rollout.decode import generate
from listopd_jax.rounding import round_up
from listopd_jax.task.prompt import render_prompt

START_SECONDS, ANSWER_SECONDS = 120, 600  # the first answer may wait for the weights


def messages(number: int) -> list[str]:
    """`number` user's messages, each a list of four synthetic reviews."""
    texts = [
        r.text
        for r in synthetic_reviews(products=number, reviews_per_product=4, noise=0.0, vote_cap=50, seed=0)
    ]
    return [render_prompt(f"product {i}", texts[4 * i : 4 * i + 4]) for i in range(number)]


def ours(folder: pathlib.Path, asked: Sequence[str], tokens: int) -> list[str]:
    """Our greedy answers of at most `tokens` tokens each, in float32."""
    tokenizer, (config, params) = load_tokenizer(folder), load_hf(folder)
    ids = [
        tokenizer(chat_prompt([{"role": "user", "content": m}], tokenizer), add_special_tokens=False)[
            "input_ids"
        ]
        for m in asked
    ]
    lengths = np.array([len(row) for row in ids], np.int32)
    prompts = np.array([row + [0] * (round_up(int(lengths.max()), 32) - len(row)) for row in ids], np.int32)
    ends = tuple(sorted({*read_eos_ids(folder), *turn_ends(tokenizer)}))
    with jax.default_matmul_precision("highest"):
        rollout = generate(
            (graph_of(config, "float32", "none", "xla"),), (params,), jnp.ones((1, 1)), prompts, lengths,
            jax.random.key(0), max_tokens=tokens, vocab=len(tokenizer), eos=ends, pad=ends[0], greedy=True,
        )  # fmt: skip
    rows = zip(np.asarray(rollout.tokens)[:, 0], np.asarray(rollout.lengths)[:, 0], strict=True)
    return [tokenizer.decode(row[:n], skip_special_tokens=True) for row, n in rows]


def theirs(url: str, model: str, message: str, tokens: int) -> str:
    """The engine's greedy answer."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": message}],
        "temperature": 0,
        "max_tokens": tokens,
    }
    answer = _request(f"{url}/v1/chat/completions", body)
    return answer["choices"][0]["message"]["content"]


def _request(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as e:
        raise UserError(f"{url}: {e.code} {e.read(300).decode(errors='replace')}") from e
    except (OSError, ValueError) as e:
        raise UserError(f"{url}: no answer ({e}); is the engine running?") from e


@contextlib.contextmanager
def engine(command: str) -> Iterator[str]:
    """Run `command --port=PORT`; yields its URL once the port answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        process = subprocess.Popen([*shlex.split(command), "--port", str(port)], stdout=subprocess.DEVNULL)
    except OSError as e:
        raise UserError(f"--start={command!r}: cannot be run ({e.strerror})") from e
    try:
        _wait(process, port, command)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def _wait(process: subprocess.Popen, port: int, command: str) -> None:
    for _ in range(START_SECONDS):
        if process.poll() is not None:
            raise UserError(f"--start={command!r}: ended with exit code {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(1)
    raise UserError(f"--start={command!r}: no answer on port {port} after {START_SECONDS} s")


def compare(url: str, folder: pathlib.Path, number: int, tokens: int) -> dict[str, Any]:
    """How many of `number` answers are the same text, and the first that is not."""
    asked = messages(number)
    here = ours(folder, asked, tokens)
    there = [theirs(url, str(folder), m, tokens) for m in asked]
    differ = [i for i, (a, b) in enumerate(zip(here, there, strict=True)) if a != b]
    tokenizer = load_tokenizer(folder)
    lengths = [len(tokenizer(text)["input_ids"]) for text in here]
    first = {"ours": here[differ[0]], "theirs": there[differ[0]]} if differ else None
    return {
        "prompts": number, "most_tokens": tokens, "same": number - len(differ), "shortest_answer": min(lengths),
        "mean_answer": round(sum(lengths) / number, 1), "first_difference": first, "example": here[0],
    }  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Compare and print; 1 if any answer differs."""
    parser = Parser(
        prog="python -m benchmarks.served", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--weights", required=True, type=pathlib.Path, help="folder of an export with a chat template"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--start", help="command that starts the engine; --port N is appended")
    where.add_argument("--url", help="of an engine that runs, without /v1")
    parser.add_argument("--prompts", type=positive, default=50)
    parser.add_argument("--tokens", type=positive, default=48, help="most of an answer")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args(argv)
    folder = args.weights.absolute()
    with engine(args.start) if args.start else contextlib.nullcontext(args.url) as url:
        result = {"engine": args.start or args.url} | compare(url, folder, args.prompts, args.tokens)
    print(json.dumps(result, indent=1))
    if args.out:
        files.write_json(args.out, result)
    return 0 if result["same"] == args.prompts else 1


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
