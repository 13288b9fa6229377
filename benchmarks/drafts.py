"""What drafted tokens save on a trained policy's answers to held-out prompts.

    make demo
    python -m benchmarks.drafts --workdir=runs/demo --out=benchmarks/results/drafts_cpu.json

For every exported policy, greedy and sampled, n completions per prompt: tokens per decode step, and the time of a
rollout with drafts as a share of one without, alternating in one process.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.fashion import get_config
from listopd_jax import files
from listopd_jax.config import validate
from listopd_jax.models.build import graph_of
from listopd_jax.models.hf import load_hf
from listopd_jax.parallel.compiler import compile_quickly
from listopd_jax.rollout import decode
from listopd_jax.rollout.decode import Rollout, generate
from listopd_jax.stages.job import Job, open_job

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
            greedy=greedy, **job.decoding | {"draft_tokens": size},
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


def main(argv: Sequence[str]) -> None:
    """Print one JSON line per row; keep them all in --out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drafts")
    parser.add_argument("--workdir", default="runs/demo", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args(argv)
    if not (args.workdir / "export").is_dir():
        parser.error(f"--workdir={args.workdir}: has no export/; run `make demo` first")
    compile_quickly()
    decode.TOKENS_PER_PASS = {}  # drafts of the length asked for, as on an accelerator
    job = open_job(validate(get_config("tiny")), args.workdir)
    rows = []
    for policy in sorted((args.workdir / "export").iterdir()):
        for draft, n, greedy in ((4, 1, True), (10, 1, True), (4, 8, False), (10, 8, False)):
            rows.append(compare(job, policy, draft, n, greedy, rows=16))
            print(json.dumps(rows[-1]), flush=True)
    if args.out:
        files.write_json(
            args.out, {"device": f"{os.cpu_count()} CPU cores", "jax": jax.__version__, "rows": rows}
        )


if __name__ == "__main__":
    main(sys.argv[1:])
