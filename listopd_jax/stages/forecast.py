"""The parse curve before any training: greedy decoding from the target that distillation aims at (docs/theory.md).

The target λ log π_T + (1−λ) log π_B is decoded from directly, for a whole grid of λ at once: the prompts are read once
by each of the two models, which may differ in size, and every λ continues from the same two prompt caches. It is the
limit of long training only where the target is what the estimator converges to: see docs/theory.md for
`teacher_student`, whose limit flips later, and for `no_base`, which has another target and is not forecast. With a
guard every position is decoded at its own λ_t. Guarded everywhere, the target has the teacher's mode, and the forecast
is the teacher's greedy answer at every λ; with scope "structure" it is not. A teacher with prompts of its own is not
forecast either: the two models would decode after two prompts.
"""

import sys
from collections.abc import Iterable, Sequence

import jax.numpy as jnp

from listopd_jax.config import guard_text
from listopd_jax.ops.guard import Guard
from listopd_jax.ops.opd_loss import Frozen
from listopd_jax.parallel.hosts import is_main
from listopd_jax.stages.calibrate import calibrate_forecasts
from listopd_jax.stages.evaluate import Answer, greedy_answers
from listopd_jax.stages.job import Job, base_of
from listopd_jax.stages.results import evaluated, expected, keep
from listopd_jax.stages.teachers import teacher_roles
from listopd_jax.train.loop import Run


def forecast_run(lam: float, guard: str = "") -> Run:
    """The forecast at λ under a guard as a run of no steps and no seed, which identifies it among the results."""
    return Run(f"forecast_lambda{float(lam)}", "forecast", lam=float(lam), seed=None, steps=0, guard=guard)


def forecast(job: Job, frozen: Frozen) -> None:
    """Forecast every λ of the sections forecast and opd and keep the records; those done are left alone."""
    opd, more = job.config.opd, job.config.forecast
    if opd.advantage != "base_relative":
        return
    _forecast(job, frozen, "", {*more.plain_lambdas, *opd.plain_lambdas})
    _forecast(job, frozen, guard_text(opd.guard), {*more.lambdas, *opd.lambdas})


def _forecast(job: Job, frozen: Frozen, name: str, lambdas: Iterable[float]) -> None:
    """Forecast those of `lambdas` that are missing, under the guard of that name."""
    grid = sorted(set(map(float, lambdas)))
    missing = [lam for lam in grid if evaluated(job.workdir, forecast_run(lam, name)) is None]
    if not missing:
        return
    if job.config.teachers.max_prompt:
        if is_main():
            print("no forecast: teachers read prompts of their own (teachers.max_prompt)", file=sys.stderr)
        return
    guard, batch_size = job.guard_of(name), job.config.forecast.batch_size
    columns = target_answers(job, frozen, missing, guard, "forecast")
    # One teacher reads all lists: with several, expected scores are refused.
    scores = expected(job, *target_of(job, frozen, "teacher", missing), batch_size, guard)
    calibrate_forecasts(job, frozen, missing, columns, name)
    for value, column, means in zip(missing, columns, scores, strict=True):
        keep(job, forecast_run(value, name), column, of_policy=False, expected=means)


def target_answers(
    job: Job, frozen: Frozen, lambdas: Sequence[float], guard: Guard | None, description: str
) -> list[list[Answer]]:
    """The judged answers of the target at each λ to every validation prompt, each prompt's with its own teacher."""
    columns, judge = [[] for _ in lambdas], job.judge("validation")
    for role, batches in job.by_teacher(job.config.forecast.batch_size):
        target = target_of(job, frozen, role, lambdas)
        found = greedy_answers(*target, batches, job.codec, job.decoding, judge, description, guard)
        columns = [column + answers for column, answers in zip(columns, found, strict=True)]
    return columns


def target_of(job: Job, frozen: Frozen, role: str, lambdas: Sequence[float]) -> tuple:
    """Static halves, parameters and weights [2, n] of the targets of a teacher at n λ."""
    # A column of weights per λ: the teacher counts λ, the base 1 − λ.
    lam, params = jnp.array(lambdas), dict(zip(teacher_roles(job.models), frozen.teachers, strict=True))
    graphs = job.graphs[role], base_of(job.graphs)
    return graphs, (params[role], frozen.base), jnp.stack([lam, 1 - lam])
