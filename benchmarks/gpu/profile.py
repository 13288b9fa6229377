"""Which kernels take the time: one stage of EC's step per process, as JSON lines.

    python -m benchmarks.gpu.profile decode|update [--preset=paper] [--microbatch=16] [--remat=dots] [--top=40]

decode: prefill, then milliseconds per token of each cache size. update: seconds of three updates. Both end with the
device's time by kernel. Set XLA_FLAGS to compare compilers' options: each process has its own.
"""

import argparse
import collections
import glob
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.confirmed import confirmed
from benchmarks.opd_step import RUNS, configured
from listopd_jax.errors import Parser, exit_code, positive
from listopd_jax.rounding import ceil_div, round_up


def say(**facts: Any) -> None:
    """One JSON line, at once: a process that is killed has printed what it knew."""
    print(json.dumps(facts), flush=True)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the result of `run` is on the device, and the result."""
    began = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - began, result


def kernels(run: Callable[[], Any]) -> list[tuple[str, int, float]]:
    """Name, calls and device milliseconds of every kernel of `run`, the slowest first; empty without a GPU."""
    totals: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        for event in _gpu_events(folder):
            totals[event.name][0] += 1
            totals[event.name][1] += event.duration_ns / 1e6
    rows = ((name, int(calls), round(ms, 2)) for name, (calls, ms) in totals.items())
    return sorted(rows, key=lambda row: -row[2])


def _gpu_events(folder: str):
    for path in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True):
        for plane in jax.profiler.ProfileData.from_file(path).planes:
            if "GPU" in plane.name:
                for line in plane.lines:
                    if "Stream" in line.name:
                        yield from line.events


def report(stage: str, run: Callable[[], Any], most: int) -> None:
    """Print the kernels of one more `run`."""
    rows = kernels(run)
    busy = round(sum(ms for *_, ms in rows), 1)
    say(stage=stage, kernels=sum(calls for _, calls, _ in rows), busy_ms=busy, top=rows[:most])


def decode(config: Any, tokens: tuple[int, int], most: int) -> None:
    """Prefill and each segment of a rollout of forced length, by the programs of the OPD stage."""
    from benchmarks.step import Step, random_prompts

    step = Step(config, random_prompts(config, tokens[0]), *tokens)
    say(stage="compile and first rollout", seconds=round(timed(step.rollout)[0], 2))
    for _ in range(3):
        prefill, full = timed(lambda: step.rollout(response=1))[0], timed(step.rollout)[0]
        per_token = round(1e3 * (full - prefill) / max(1, tokens[1] - 1), 3)
        facts = {"tokens_per_step": round(step.tokens_per_step, 3)} if step.drafts else {}
        say(
            stage="rollout",
            seconds=round(full, 4),
            prefill=round(prefill, 4),
            ms_per_token=per_token,
            **facts,
        )
    report("rollout", step.rollout, most)


def update(config: Any, tokens: tuple[int, int], most: int) -> None:
    """The OPD stage's update on random completions of forced length."""
    from benchmarks.step import Step, random_prompts
    from listopd_jax.rollout.decode import Rollout

    step = Step(config, random_prompts(config, tokens[0]), *tokens)
    quarter = ceil_div(config.task.max_response, 4)
    shape = (config.opd.batch_size, config.opd.rollouts, round_up(tokens[1], quarter))
    ids = np.random.default_rng(1).integers(2, step.vocab, shape)
    lengths = jnp.full(shape[:2], tokens[1], jnp.int32)
    rollout = Rollout(jnp.asarray(ids, jnp.int32), jnp.full(shape, -1.0), lengths)
    seconds, metrics = timed(lambda: step.update(rollout))
    say(stage="compile and first update", seconds=round(seconds, 2), loss=float(metrics["loss"]))
    for _ in range(3):
        say(stage="update", seconds=round(timed(lambda: step.update(rollout))[0], 4), **_memory())
    report("update", lambda: step.update(rollout), most)


def _memory() -> dict[str, float]:
    stats = jax.devices()[0].memory_stats() or {}
    return {k: round(stats[k] / 2**30, 2) for k in ("peak_bytes_in_use", "bytes_limit") if k in stats}


def main(argv: Sequence[str]) -> None:
    """Profile one stage."""
    parser = Parser(
        prog="python -m benchmarks.gpu.profile", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("stage", choices=("decode", "update"))
    parser.add_argument("--preset", choices=RUNS, default="paper")
    parser.add_argument("--microbatch", type=positive)
    parser.add_argument("--remat")
    parser.add_argument("--completions", type=positive)
    parser.add_argument("--drafts", type=int, default=0)
    parser.add_argument("--confirmed", type=float, help="as in benchmarks.opd_step")
    parser.add_argument("--top", type=positive, default=40, help="kernels to list")
    args = parser.parse_args(argv)
    with confirmed(args.confirmed):
        {"decode": decode, "update": update}[args.stage](*configured(args), args.top)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
