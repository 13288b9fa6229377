"""Do drafts change greedy answers? Counted on a trained run's held-out prompts, in float32 and in bfloat16.

    make demo
    python -m benchmarks.greedy --workdir=runs/demo --out=benchmarks/results/greedy.json

A draft is read in one pass with others, so a product may be rounded otherwise than token by token: where two tokens are
nearly as likely, greedy decoding may then take the other one. For every exported policy: the lists of which any token
differs, the places where each first does, and how far the two best tokens are apart there (nats, in float32).
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from benchmarks.trained import open_run
from listopd_jax import files
from listopd_jax.errors import Parser, exit_code, positive, require
from listopd_jax.lifecycle import say
from listopd_jax.models.build import cast, graph_of
from listopd_jax.models.config import ModelConfig
from listopd_jax.models.hf import load_hf
from listopd_jax.ops.head import logits_of, slice_vocab
from listopd_jax.parallel.compiler import compile_quickly
from listopd_jax.rollout.decode import Rollout, generate
from listopd_jax.rollout.scoring import completion_hidden
from listopd_jax.stages.job import DRAFT_TOKENS, Job

DTYPES = ("float32", "bfloat16")
ROWS = 64


def compare(job: Job, policy: pathlib.Path, dtype: str, drafts: int) -> dict[str, Any]:
    """One policy's greedy answers to every held-out prompt, with `drafts` drafted tokens per step and without."""
    config, params = load_hf(policy)
    params = cast(params, dtype)
    lists, tokens, steps, places, gaps = 0, 0, 0, [], []
    for batch in job.evaluation_batches(ROWS):
        plain, drafted = (answers(job, config, params, dtype, batch, size) for size in (0, drafts))
        real = batch["weight"] > 0
        lists, tokens = lists + int(real.sum()), tokens + int(plain.lengths[real].sum())
        steps += int(drafted.steps[real].sum())
        differs = (plain.tokens != drafted.tokens)[:, 0]
        rows = np.flatnonzero(differs.any(-1) & real)
        if rows.size:
            first = differs[rows].argmax(-1)
            places += first.tolist()
            gaps += best_two_apart(job, config, params, batch, rows, plain.tokens[rows], first).tolist()
    return {
        "policy": policy.name, "dtype": dtype, "draft_tokens": drafts, "lists": lists, "tokens": tokens,
        "tokens_per_step": round((tokens - lists) / steps, 2), "different_lists": len(places),
        "first_different": sorted(places), "largest_gap": max(gaps, default=None),
    }  # fmt: skip


def answers(
    job: Job, config: ModelConfig, params: Any, dtype: str, batch: Mapping[str, Any], drafts: int
) -> Rollout:
    """Greedy answers to the prompts of a batch, with exactly `drafts` drafted tokens per row and step."""
    decoding = job.decoding | {"draft_tokens": drafts, "pass_tokens": (drafts + 1) * ROWS}
    written = generate(
        (graph_of(config, dtype, "none", "xla"),), (params,), jnp.ones((1, 1)), batch["prompt"],
        batch["prompt_length"], jax.random.key(0), greedy=True, **decoding,
    )  # fmt: skip
    return jax.tree.map(np.asarray, written)


def best_two_apart(
    job: Job,
    config: ModelConfig,
    params: Any,
    batch: Mapping[str, Any],
    rows: Int[np.ndarray, " R"],
    tokens: Int[np.ndarray, "R 1 T"],
    place: Int[np.ndarray, " R"],
) -> Float[np.ndarray, " R"]:
    """Log-probability of the best token less that of the second at a place of each row, computed in float32."""
    decoder = nnx.merge(graph_of(config, "float32", "none", "xla"), cast(params, "float32"))
    hidden = completion_hidden(decoder, batch["prompt"][rows], batch["prompt_length"][rows], tokens)
    there = hidden[jnp.arange(len(rows)), 0, place]
    logits = np.sort(slice_vocab(logits_of(there, decoder.head_weight()), job.codec.vocab))
    return logits[:, -1] - logits[:, -2]


def main(argv: Sequence[str]) -> None:
    """Print one JSON line per policy and dtype; keep them all in --out."""
    parser = Parser(
        prog="python -m benchmarks.greedy", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--workdir", default="runs/demo", type=pathlib.Path)
    parser.add_argument("--drafts", default=DRAFT_TOKENS, type=positive)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args(argv)
    compile_quickly()
    job, rows = open_run(args.workdir), []
    policies = sorted((args.workdir / "export").glob("*/"))
    require(bool(policies), f"{args.workdir}/export: holds no policies; run with --config.train.export=True")
    for policy in policies:
        for dtype in DTYPES:
            rows.append(compare(job, policy, dtype, args.drafts))
            say(json.dumps(rows[-1]))
    if args.out:
        device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
        files.write_json(args.out, {"device": device, "rows": rows})


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
