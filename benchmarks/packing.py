"""What packing saves: the padding and the time of an SFT step with packed lists, against a row for each list.

    python -m benchmarks.packing --path=FILE [--k=4] [--words=16] [--row=1024] [--buckets=4] [--batch=16] [--steps=5]
        [--padding-only] [--json]

Lists of the clothing reviews in FILE, a tokenizer trained on them, a random model of 4 layers x 256, float32. Both
steps see the same lists, in one process, in turn. The command refuses to compare if they disagree on the loss. The
padding of unpacked lists in batches of one bucket each (--buckets) is counted too.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np

from benchmarks.shape import Shape
from benchmarks.table import spread
from listopd_jax.errors import Parser, UserError, exit_code, positive
from listopd_jax.lifecycle import say
from listopd_jax.report import wording

SAME = 1e-4  # relative difference of losses that are equal
PLANNED = 40  # batches whose padding is counted


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; UserError for a mistake."""
    parser = Parser(
        prog="python -m benchmarks.packing", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--path", required=True, help="womens_clothing_reviews.csv or its zip")
    parser.add_argument("--k", type=positive, default=4, help="reviews in a list")
    parser.add_argument("--words", type=positive, default=16, help="of each review")
    parser.add_argument("--row", type=positive, default=1024, help="tokens of a packed row")
    parser.add_argument(
        "--buckets", type=positive, default=4, help="widths of prompts in the other way to save padding"
    )
    parser.add_argument("--batch", type=positive, default=16, help="lists of a step")
    parser.add_argument("--steps", type=positive, default=5)
    parser.add_argument("--padding-only", action="store_true", help="no times")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def configuration(args: argparse.Namespace, buckets: int = 1) -> ml_collections.FrozenConfigDict:
    """The teacher's SFT is not packed, the student's is."""
    from listopd_jax.config import defaults, validate

    config = defaults()
    config.data.update(source="clothing", path=args.path, max_lists=40 * args.batch)
    config.task.update(k=args.k, max_review_words=args.words, prompt_buckets=buckets)
    config.task.update(max_response=16 * args.k, max_prompt=args.row - 16 * args.k)
    config.tokenizer.vocab_size = 4096
    for role in ("teacher", "student"):
        config[role].update(Shape().dimensions("student"))
        config.sft[role].update(batch_size=args.batch, seed=1)
    config.sft.student.packing = args.row
    return validate(config)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Padding of both, and seconds and their ratio in each turn."""
    with job_of(configuration(args)) as job:
        batches = {"unpacked": job.sft_batches("teacher"), "packed": job.sft_batches("student")}
        pairs = [{name: next(made) for name, made in batches.items()} for _ in range(PLANNED)]
        turns = [] if args.padding_only else timed(job, pairs, args.steps)
    with job_of(configuration(args, args.buckets)) as job:
        made = job.sft_batches("teacher")
        in_buckets = [next(made) for _ in range(PLANNED)]
    tokens = list_tokens(pair["unpacked"] for pair in pairs)
    shares = {name: padding([pair[name] for pair in pairs], tokens) for name in batches}
    return {
        "list_tokens": tokens / len(pairs) / args.batch,
        "rows": sum(len(pair["packed"]["row"]) for pair in pairs) / len(pairs),
        "padding": shares | {"in_buckets": padding(in_buckets, list_tokens(in_buckets))},
        "programs": {name: len({cells(pair[name]) for pair in pairs}) for name in batches},
        "seconds": {name: [turn[name] for turn in turns] for name in batches},
        "ratio": spread([turn["packed"] / turn["unpacked"] for turn in turns]) if turns else None,
        "settings": {
            name: getattr(args, name) for name in ("k", "words", "row", "buckets", "batch", "steps")
        },
    }


@contextlib.contextmanager
def job_of(config: ml_collections.FrozenConfigDict) -> Iterator[Any]:
    """The job of a config in a folder that goes with it."""
    from listopd_jax.stages.prepare import job_on_mesh

    with tempfile.TemporaryDirectory() as folder, job_on_mesh(config, pathlib.Path(folder)) as job:
        yield job


def list_tokens(unpacked: Iterable[dict[str, np.ndarray]]) -> int:
    """Tokens of the lists of batches, with their answers."""
    return sum(int((batch["prompt_length"] + batch["answer_length"]).sum()) for batch in unpacked)


def cells(batch: dict[str, np.ndarray]) -> int:
    """Tokens that a step reads of a batch, with padding."""
    return batch["row"].size if "row" in batch else batch["prompt"].size + batch["answer"].size


def padding(batches: Sequence[dict[str, np.ndarray]], tokens: int) -> float:
    """The share of what is read that is not a token of a list."""
    return 1 - tokens / sum(map(cells, batches))


def timed(job: Any, pairs: Sequence[dict[str, dict]], steps: int) -> list[dict[str, float]]:
    """Seconds of both steps on the same lists, in turn, compiled before."""
    import jax

    from listopd_jax.models.build import initial_params
    from listopd_jax.train.optimizer import adamw, init_state
    from listopd_jax.train.sft_step import make_sft_step

    config = job.config
    tx = adamw(config.optimizer, config.sft.student.b2, "float32")
    step = make_sft_step(job.trained["student"], tx, job.codec.vocab, config.opd.head_chunk)
    state = init_state(initial_params(config.student, job.shapes["student"], 0, "float32"), tx)

    def run(batch):
        nonlocal state
        began = time.perf_counter()
        state, metrics = step(state, batch, 0.0)  # at this rate the weights stay: both steps have the same
        return float(metrics["loss"]), time.perf_counter() - began

    turns = []
    for pair in pairs[:steps]:
        for batch in pair.values():
            run(batch)  # its shape may be new
        done = {name: run(batch) for name, batch in pair.items()}
        ours, theirs = (done[name][0] for name in ("packed", "unpacked"))
        if abs(ours - theirs) > SAME * theirs:
            raise UserError(f"the packed loss is {ours}, the unpacked {theirs}: not the same step")
        turns.append({name: seconds for name, (_, seconds) in done.items()})
    jax.block_until_ready(state)
    return turns


HEAD = ("k x words", "tokens per list", "row", "rows for lists", "padding, one bucket", "several", "packed", "programs",
        "step, packed / one bucket (middle half)")  # fmt: skip


def render(result: dict[str, Any]) -> str:
    """The result as a table of one row."""
    s, share, programs = result["settings"], result["padding"], result["programs"]
    low, ratio, high = result["ratio"] or (0, 0, 0)
    row = [
        f"{s['k']} x {s['words']}", f"{result['list_tokens']:.0f}", str(s["row"]),
        f"{result['rows']:.1f} for {s['batch']}",
        f"{share['unpacked']:.1%}", f"{share['in_buckets']:.1%} ({s['buckets']})", f"{share['packed']:.1%}",
        f"{programs['unpacked']}, {programs['packed']}",
        f"{ratio:.2f} ({low:.2f}–{high:.2f})" if ratio else "",
    ]  # fmt: skip
    return wording.markdown(HEAD, [row])


def main(argv: Sequence[str]) -> None:
    """Measure and print; with --json one object on stdout."""
    args = parse(argv)
    result = measure(args)
    say(json.dumps(result, indent=1, allow_nan=False) if args.json else render(result))


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
