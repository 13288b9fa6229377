"""Many points of a grid in one vmapped program, against the same points one after another.

    python -m benchmarks.grid --workdir=runs/grid [--points=2,4,12] [--steps=6] [--out=benchmarks/results/grid_cpu.json]

The pair is that of configs/fashion.py:tiny, trained in the workdir the first time; each point has a λ, a seed and a
student of its own. Every step is done both ways in turn, from the same prompts, and both update on the same
completions. Times are of the CPU and of the clock, medians over the steps but the first, which compiles.
`max_abs_difference`: of any parameter after three updates. With --small the models are not trained, and of one layer.
"""

import argparse
import inspect
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.noise import shrink
from configs.fashion import tiny
from listopd_jax import files
from listopd_jax.config import validate
from listopd_jax.errors import Parser, UserError, exit_code, positive
from listopd_jax.lifecycle import say
from listopd_jax.main import set_up
from listopd_jax.parallel.compiler import ROLLOUT, UPDATE, backend_options
from listopd_jax.report import wording
from listopd_jax.rollout.decode import Rollout, decode
from listopd_jax.stages.job import Job
from listopd_jax.stages.opd import Distillation, hyper_at, initial_state, sample
from listopd_jax.stages.pipeline import distillation, frozen_models
from listopd_jax.stages.prepare import job_on_mesh
from listopd_jax.train.opd_step import OpdBatch

COMPARED = 3  # updates after which the parameters are compared
WARM_UP = 1
STAGES = ("rollout", "update")
HEAD = ("points", "stage", "one by one, CPU s", "at once, CPU s", "CPU ratio", "wall ratio")


class Points(NamedTuple):
    """The points of a grid: λ and seed of each."""

    lambdas: Sequence[float]
    seeds: Sequence[int]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; UserError for a mistake."""
    parser = Parser(
        prog="python -m benchmarks.grid", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--points", default="2,4,12")
    parser.add_argument("--steps", type=positive, default=6)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args(argv)
    try:
        args.points = sorted(map(positive, args.points.split(",")))
    except (ValueError, argparse.ArgumentTypeError):
        raise UserError(f"--points={args.points}: give numbers of points, such as 2,4,12") from None
    if args.steps < max(COMPARED, WARM_UP + 1):
        raise UserError(f"--steps={args.steps}: give at least {max(COMPARED, WARM_UP + 1)}")
    return args


def config_of(small: bool) -> Any:
    """The preset, without evaluations that are not needed here."""
    config = tiny()
    if small:
        shrink(config)
        config.data.synthetic.products, config.evaluation.max_lists = 40, 2
        for role in ("teacher", "student"):
            config.sft[role].update(steps=0, epochs=0.0)
    config.opd.lambdas = config.forecast.lambdas = ()
    config.train.export = False
    return validate(config)


def points_of(count: int) -> Points:
    """Four λ from 1 to 1.3 with as many seeds as it takes."""
    lambdas = np.linspace(1.0, 1.3, 4)
    return Points([float(lambdas[i % 4]) for i in range(count)], [i // 4 for i in range(count)])


def stack(trees: Sequence[Any]) -> Any:
    """Trees of arrays as one with a leading axis."""
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def rollout_at_once(job: Job) -> Callable[..., Rollout]:
    """A program (parameters, prompts, their lengths, keys, each with a leading axis) → completions of every point."""
    graph, weights = job.trained["student"], jnp.ones((1, job.config.opd.rollouts))

    def one(params, prompts, lengths, key):
        return decode((graph,), (params,), weights, prompts, lengths, key, **job.decoding)

    return jax.jit(jax.vmap(one), compiler_options=backend_options(ROLLOUT))


def update_at_once(shared: Distillation) -> Callable:
    """The job's own update, of every point in one program; all but the frozen models has a leading axis."""
    step = jax.vmap(inspect.unwrap(shared.steps[""]), in_axes=(0, None, 0, 0, 0))
    return jax.jit(step, donate_argnums=0, compiler_options=backend_options(UPDATE))


class Both:
    """The same points trained in both ways, step by step, and what each took."""

    def __init__(self, job: Job, shared: Distillation, points: Points):
        self.seconds: dict[tuple[str, str], list[tuple[float, float]]] = {}
        self._job, self._shared, self._points = job, shared, points
        self._batches = {seed: job.opd_batches(seed) for seed in set(points.seeds)}
        self.states = [initial_state(job, shared, seed) for seed in points.seeds]
        self.together = stack(self.states)
        self._rollout, self._update = rollout_at_once(job), update_at_once(shared)

    def step(self, number: int) -> None:
        """One step of every point, one by one and at once."""
        batches = {seed: next(batches) for seed, batches in self._batches.items()}
        asked = [(batches[seed]["prompt"], batches[seed]["prompt_length"]) for seed in self._points.seeds]
        self._update_both(number, asked, self._write_both(number, asked))

    def _write_both(self, number: int, asked: Sequence[tuple]) -> list[Rollout]:
        """The completions that the points wrote one by one."""
        keys = [jax.random.fold_in(jax.random.key(seed), number) for seed in self._points.seeds]
        each = list(zip(self.states, asked, keys, strict=True))
        many = (self.together.params, *stack(asked), jnp.stack(keys))
        self._timed("rollout", "at once", lambda: self._rollout(*many))
        return self._timed(
            "rollout", "one by one", lambda: [sample(self._job, s.params, *own, key) for s, own, key in each]
        )

    def _update_both(self, number: int, asked: Sequence[tuple], written: Sequence[Rollout]) -> None:
        opd, step, frozen = self._job.config.opd, self._shared.steps[""], self._shared.frozen
        hypers, lr = [hyper_at(opd, lam, number) for lam in self._points.lambdas], jnp.float32(opd.lr)
        rows = [OpdBatch(*own, r._replace(steps=None)) for own, r in zip(asked, written, strict=True)]
        each = list(zip(self.states, rows, hypers, strict=True))
        many = OpdBatch(*stack(asked), self._stacked(written)), stack(hypers), jnp.full(len(each), lr)
        self.states = self._timed(
            "update", "one by one", lambda: [step(s, frozen, own, hyper, lr)[0] for s, own, hyper in each]
        )
        self.together = self._timed(
            "update", "at once", lambda: self._update(self.together, frozen, *many)[0]
        )

    def _stacked(self, written: Sequence[Rollout]) -> Rollout:
        """Completions of all points, as wide as the longest."""
        size, pad = max(r.tokens.shape[-1] for r in written), self._job.codec.pad

        def wide(x, fill):
            return jnp.pad(x, [(0, 0), (0, 0), (0, size - x.shape[-1])], constant_values=fill)

        return stack([Rollout(wide(r.tokens, pad), wide(r.logprobs, 0), r.lengths) for r in written])

    def _timed(self, stage: str, way: str, run: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = jax.block_until_ready(run())
        spent = time.process_time() - cpu, time.perf_counter() - wall
        self.seconds.setdefault((stage, way), []).append(spent)
        return result

    def difference(self) -> float:
        """The largest of any parameter."""
        apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), stack(self.states), self.together)
        return max(jax.tree.leaves(apart.params))


def compare(job: Job, shared: Distillation, count: int, steps: int) -> dict[str, Any]:
    """Ratios at once / one by one of `count` points, for each stage and in all, and their difference."""
    both = Both(job, shared, points_of(count))
    for number in range(steps):
        both.step(number)
        if number + 1 == COMPARED:
            difference = both.difference()
    median = {
        key: [statistics.median(column) for column in zip(*spent[WARM_UP:], strict=True)]
        for key, spent in both.seconds.items()
    }
    total = {
        way: [sum(times) for times in zip(*(median[stage, way] for stage in STAGES), strict=True)]
        for way in ("one by one", "at once")
    }
    rows = [
        {"stage": stage} | _ratios(median[stage, "one by one"], median[stage, "at once"]) for stage in STAGES
    ]
    whole = _ratios(total["one by one"], total["at once"])
    return {"points": count, **whole, "max_abs_difference": difference, "stages": rows}


def _ratios(apart: Sequence[float], together: Sequence[float]) -> dict[str, float]:
    """Ratios of (CPU seconds, wall seconds)."""
    return {
        "cpu_ratio": together[0] / apart[0], "wall_ratio": together[1] / apart[1],
        "one_by_one_cpu_s": apart[0], "at_once_cpu_s": together[0],
    }  # fmt: skip


def render(results: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    rows = [(r["points"], row) for r in results for row in (*r["stages"], r | {"stage": "both"})]
    return wording.markdown(HEAD, (_cells(points, row) for points, row in rows))


def _cells(points: int, row: dict[str, Any]) -> list[str]:
    seconds = (f"{row[name]:.3g}" for name in ("one_by_one_cpu_s", "at_once_cpu_s"))
    return [str(points), row["stage"], *seconds, f"{row['cpu_ratio']:.2f}", f"{row['wall_ratio']:.2f}"]


def main(argv: Sequence[str]) -> None:
    """Train the pair, measure, print the table; keep the record of the most points in --out, with all."""
    args = parse(argv)
    config = config_of(args.small)
    set_up(config, args.workdir)
    with job_on_mesh(config, args.workdir / "pair") as job:
        shared = distillation(job, frozen_models(job), None)
        results = [compare(job, shared, count, args.steps) for count in args.points]
    say(render(results))
    if args.out:
        names = ("points", "cpu_ratio", "wall_ratio", "max_abs_difference")
        head = {name: results[-1][name] for name in names}
        where = {
            "device": jax.devices()[0].device_kind,
            "cores": len(os.sched_getaffinity(0)),
            "jax": jax.__version__,
        }
        files.write_json(args.out, head | where | {"results": results})


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
