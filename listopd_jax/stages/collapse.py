"""An OPD run that collapses (listopd_jax.train.collapse): its watch, its best checkpoint, its record."""

from typing import Any

from listopd_jax.stages.job import Job
from listopd_jax.stages.opd import Distillation, initial_state, merged_student, opd_saving
from listopd_jax.stages.results import greedy, metrics_of
from listopd_jax.train.checkpoints import abstract
from listopd_jax.train.collapse import Thresholds, Watch
from listopd_jax.train.loop import Run, open_checkpoints


def watch_of(opd: Any, run: Run) -> Watch | None:
    """The watch over `run` that config section `opd` asks for, if any."""
    if opd.on_collapse == "none":
        return None
    at = opd.collapse
    thresholds = Thresholds(at.window, at.parse_drop, at.length_change, at.flips)
    return Watch(run.name, opd.on_collapse, thresholds, at.lower)


def best_checkpoint(job: Job, shared: Distillation, run: Run) -> tuple[int, Any]:
    """Step and parameters of the most useful of the checkpoints that a stopped run has left, the first of equals.

    Chosen on the validation lists, which flatters its scores there a little.
    """
    with open_checkpoints(job.workdir, run, opd_saving(job.config, job.workdir)) as checkpoints:
        like = abstract(initial_state(job, shared, run.seed))
        useful = {}
        for step in checkpoints.steps:
            params = merged_student(job, shared, checkpoints.params_at(step, like))
            useful[step] = metrics_of(job, greedy(job, "student", params, f"{run.name} at {step}"))["useful"]
        best = max(useful, key=useful.__getitem__)
        return best, merged_student(job, shared, checkpoints.params_at(best, like))


def collapse_fields(watch: Watch | None, run: Run) -> dict[str, Any]:
    """The fields of a run's record about its collapses; {} if it had none."""
    if watch is None or not watch.collapses:
        return {}
    lowered = {} if watch.lam(run.lam) == run.lam else {"lambda_end": watch.lam(run.lam)}
    return {"collapsed_at": watch.collapses, **lowered}
