"""What drafted tokens save on a trained policy's answers to held-out prompts.

    make demo
    python -m benchmarks.drafts --workdir=runs/demo --out=benchmarks/results/drafts_cpu.json

For every exported policy, greedy and sampled, n completions per prompt: tokens per decode step, and the time of a
rollout with drafts as a share of one without, alternating in one process. Then the same of the peers' student with
random weights, at 8 and 64 rows and several lengths of drafts of which every tenth token is wrong.
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.presets import cpu
from benchmarks.shape import Shape
from benchmarks.trained import open_run
from listopd_jax import files
from listopd_jax.config import validate
from listopd_jax.models.build import graph_of, initial_params
from listopd_jax.models.config import custom_config
from listopd_jax.models.hf import load_hf
from listopd_jax.parallel.compiler import compile_quickly
from listopd_jax.rollout.decode import Rollout, generate
from listopd_jax.stages.job import Job

ROUNDS = 5


def compare(job: Job, policy: pathlib.Path, draft: int, n: int, greedy: bool, rows: int) -> dict[str, Any]:
    """One row of the table: `rows` prompts, n completions each, with `draft` drafted tokens and without."""
    config, params = load_hf(policy)
    graph = graph_of(config, "float32", "none", "xla")
    batch = next(iter(job.evaluation_batches(rows)))

    def rollout(size: int) -> tuple[Rollout, float]:
        began = time.perf_counter()
        written = generate(
            (graph,), (params,), jnp.ones((1, n)), batch["prompt"], batch["prompt_length"], jax.random.key(0),
            greedy=greedy, **job.decoding | {"draft_tokens": size, "pass_tokens": (size + 1) * rows * n},
        )  # fmt: skip
        return jax.tree.map(np.asarray, written), time.perf_counter() - began

    for size in (0, draft):
        rollout(size)  # compiles
    pairs = [(rollout(0), rollout(draft)) for _ in range(ROUNDS)]
    plain, drafted = pairs[0][0][0], pairs[0][1][0]
    return {
        "policy": policy.name, "greedy": greedy, "prompts": rows, "completions": n, "draft_tokens": draft,
        "steps_ratio": round(float(plain.steps.sum() / drafted.steps.sum()), 3),
        "seconds_ratio": round(statistics.median(b / a for (_, a), (_, b) in pairs), 3),
        "same_rows": float((plain.tokens == drafted.tokens).all(-1).mean()),
        "max_logprob_difference": float(np.abs(plain.logprobs - drafted.logprobs).max()),
    }  # fmt: skip


def compare_shape(rows: int, drafts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row per length of drafts, of the peers' student on `rows` random prompts, with a hint that is mostly right."""
    shape = Shape(prompts=rows)
    config = validate(cpu(shape)).student
    dimensions = custom_config(config, shape.vocab)
    params, prompts = initial_params(config, dimensions, 0, "float32"), shape.prompt_ids()
    graph, lengths = graph_of(dimensions, "float32", "none", "xla"), np.full(rows, shape.prompt_tokens)

    def rollout(size: int, hint: Any = None) -> tuple[Rollout, float]:
        began = time.perf_counter()
        written = generate(
            (graph,), (params,), jnp.ones((1, 1)), prompts, lengths, jax.random.key(0), max_tokens=shape.new_tokens,
            vocab=shape.vocab, eos=(), pad=0, draft_tokens=size, hint=hint,
        )  # fmt: skip
        return jax.tree.map(np.asarray, written), time.perf_counter() - began

    plain = rollout(0)[0]
    hint = np.where(np.arange(shape.new_tokens) % 10 == 9, 2, plain.tokens[:, 0])
    for size in drafts:
        rollout(size, hint)  # compiles
        pairs = [(rollout(0), rollout(size, hint)) for _ in range(ROUNDS)]
        drafted = pairs[0][1][0]
        yield {
            "rows": rows, "draft_tokens": size,
            "steps_ratio": round(float(plain.steps.sum() / drafted.steps.sum()), 3),
            "seconds_ratio": round(statistics.median(b / a for (_, a), (_, b) in pairs), 3),
            "same_rows": float((plain.tokens == drafted.tokens).all(-1).mean()),
        }  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Print one JSON line per row; keep them all in --out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drafts")
    parser.add_argument("--workdir", default="runs/demo", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args(argv)
    if not (args.workdir / "export").is_dir():
        parser.error(f"--workdir={args.workdir}: has no export/; run `make demo` first")
    compile_quickly()
    job = open_run(args.workdir)
    rows = []
    for policy in sorted((args.workdir / "export").iterdir()):
        for draft, n, greedy in ((4, 1, True), (10, 1, True), (4, 8, False), (10, 8, False)):
            rows.append(compare(job, policy, draft, n, greedy, rows=16))
            print(json.dumps(rows[-1]), flush=True)
    shapes = []
    for row in itertools.chain.from_iterable(compare_shape(n, (3, 5, 7, 10)) for n in (8, 64)):
        shapes.append(row)
        print(json.dumps(row), flush=True)
    if args.out:
        files.write_json(
            args.out,
            {"device": f"{os.cpu_count()} CPU cores", "jax": jax.__version__, "rows": rows, "random": shapes},
        )


if __name__ == "__main__":
    main(sys.argv[1:])
