"""What is known about λ before any training: calibration, forecast, and the λ that they recommend."""

from collections.abc import Callable

from listopd_jax import files
from listopd_jax.config import guard_text, ranks_reviews
from listopd_jax.ops.opd_loss import Frozen
from listopd_jax.parallel.hosts import from_main
from listopd_jax.recommend import Setting, recommend
from listopd_jax.records import (
    CALIBRATION,
    RECOMMENDATION,
    RESULTS,
    Recommendation,
    read_calibration,
    read_recommendation,
    read_results,
)
from listopd_jax.stages.calibrate import calibrate_stage
from listopd_jax.stages.forecast import forecast
from listopd_jax.stages.job import Job


def before_training(job: Job, frozen: Frozen) -> Recommendation | None:
    """Calibrate, forecast and recommend; what is done already is only read. None without a forecast at λ = 1."""
    calibrate_stage(job, frozen)
    forecast(job, frozen)
    return _recommendation(job)


def recommended(job: Job) -> Recommendation | None:
    """The recommendation made in this workdir before."""
    return _shared(lambda: read_recommendation(job.workdir / RECOMMENDATION))


def _recommendation(job: Job) -> Recommendation | None:
    """workdir/recommendation.json; a run that trains there keeps to the first that it got."""
    if job.config.opd.recommend and (saved := recommended(job)):
        return saved
    found = _shared(lambda: _read_and_recommend(job))
    if found is not None:
        files.write_json(job.workdir / RECOMMENDATION, found.to_json())
    return found


def _read_and_recommend(job: Job) -> Recommendation | None:
    guard, records = guard_text(job.config.opd.guard), read_results(job.workdir / RESULTS)
    forecasts = [r for r in records if r.stage == "forecast" and r.guard == guard]
    calibration = read_calibration(job.workdir / CALIBRATION)
    return recommend(forecasts, calibration, Setting(bool(guard), ranks_reviews(job.config)))


def _shared(find: Callable[[], Recommendation | None]) -> Recommendation | None:
    """The result of `find` on the first host, on every host."""
    found = from_main(lambda: (x := find()) and x.to_json())
    return None if found is None else Recommendation.from_json(found, RECOMMENDATION)
