"""The parse curve before any training: greedy decoding from the target that distillation aims at (docs/theory.md).

The target λ log π_T + (1−λ) log π_B is decoded from directly, for a whole grid of λ at once: the prompts are read once
by each of the two models, which may differ in size, and every λ continues from the same two prompt caches. It is the
limit of long training only where the target is what the estimator converges to: see docs/theory.md for
`teacher_student`, whose limit flips later, and for `no_base`, which has another target and is not forecast. With a
guard every position is decoded at its own λ_t. Guarded everywhere, the target has the teacher's mode, and the forecast
is the teacher's greedy answer at every λ; with scope "structure" it is not.
"""

import jax.numpy as jnp

from listopd_jax.config import guard_text
from listopd_jax.ops.opd_loss import Frozen
from listopd_jax.stages.calibrate import calibrate_forecasts
from listopd_jax.stages.evaluate import greedy_answers
from listopd_jax.stages.job import Job, base_of
from listopd_jax.stages.results import evaluated, expected, keep
from listopd_jax.train.loop import Run


def forecast_run(lam: float, guard: str = "") -> Run:
    """What identifies the forecast at λ under a guard among the results: a run of no steps and no seed."""
    return Run(f"forecast_lambda{float(lam)}", "forecast", lam=float(lam), seed=None, steps=0, guard=guard)


def forecast(job: Job, frozen: Frozen) -> None:
    """Forecast every λ of `forecast.lambdas` and `opd.lambdas` and keep the records; those done are left alone."""
    config = job.config
    grid = sorted({float(lam) for lam in (*config.forecast.lambdas, *config.opd.lambdas)})
    guard = guard_text(config.opd.guard)
    missing = [lam for lam in grid if evaluated(job.workdir, forecast_run(lam, guard)) is None]
    if config.opd.advantage != "base_relative" or not missing:
        return
    lam, size = jnp.array(missing), config.forecast.batch_size
    target = (job.graphs["teacher"], base_of(job.graphs)), tuple(frozen), jnp.stack([lam, 1 - lam])
    batches, judge = job.evaluation_batches(size), job.judge("validation")
    answers = greedy_answers(*target, batches, job.codec, job.decoding, judge, "forecast", job.guard)
    scores = expected(job, *target, size, job.guard)
    calibrate_forecasts(job, frozen, missing, answers)
    for value, column, means in zip(missing, answers, scores, strict=True):
        keep(job, forecast_run(value, guard), column, examples=False, expected=means)
