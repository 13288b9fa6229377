"""The stages in order. Each leaves its result in the workdir and finds it there when called again."""

import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from listopd_jax.config import guard_text, unguarded
from listopd_jax.models.build import PARAM_DTYPE, cast, initial_params, lora_of
from listopd_jax.models.hf import save_hf
from listopd_jax.models.lora import initial_adapter
from listopd_jax.ops.opd_loss import Frozen
from listopd_jax.parallel.hosts import is_main
from listopd_jax.records import Recommendation
from listopd_jax.stages.before import before_training, recommended
from listopd_jax.stages.collapse import best_checkpoint, collapse_fields, watch_of
from listopd_jax.stages.forecast import forecast
from listopd_jax.stages.forgetting import forgetting
from listopd_jax.stages.job import REFERENCE, ROLES, Job, base_of
from listopd_jax.stages.opd import (
    Distillation,
    connected,
    make_step,
    opd_runs,
    preflight,
    program_options,
    train_opd,
)
from listopd_jax.stages.predict import ANCHOR, anchor_runs, predict
from listopd_jax.stages.prepare import job_on_mesh
from listopd_jax.stages.results import evaluate, evaluated, guarded_share, summary, write_plan
from listopd_jax.stages.sft import sft_run, train_sft
from listopd_jax.stages.teacher_server import TeacherServer
from listopd_jax.stages.teachers import experts_of
from listopd_jax.train.loop import Run
from listopd_jax.train.optimizer import adamw


def run_stages(config: Any, workdir: pathlib.Path) -> None:
    """prepare → SFT → calibrate, forecast, recommend → anchors, predict → OPD for each λ and seed, each evaluated."""
    with job_on_mesh(config, workdir) as job:
        _models_to_policies(job)


def _models_to_policies(job: Job) -> None:
    programs: dict[tuple, Callable] = {}
    write_plan(job.workdir, planned(job, recommended(job)))
    server = connected(job)
    frozen = frozen_models(job, server)
    # With opd.recommend the λ to train is known only now, so the plan is written again.
    found = _before(job, frozen, server)
    write_plan(job.workdir, planned(job, found))
    shared = distillation(job, frozen, server, programs)
    # Anchors train before the prediction, the sweep after it: the prediction cannot have seen what it predicts.
    for run in anchor_runs(job):
        distil(job, shared, [run])
    predict(job, shared)
    if job.config.predict.only:
        return
    for at in job.points():
        # The SFT that a run starts from is the job's: its checkpoint does not know of points.
        shared = distillation(at, frozen, server, programs)._replace(start=shared.start)
        for point in grid(at, found):
            distil(at, shared, opd_runs(at, *point))


def _before(job: Job, frozen: Frozen, server: TeacherServer | None) -> Recommendation | None:
    """The recommendation of calibration and forecast, printed on stderr; None where a server gives no distributions.

    In a sweep that is for its first point; the others are only forecast.
    """
    first, *others = job.points()
    found = None if server else before_training(first, frozen)
    for at in [] if server else others:
        forecast(at, frozen)
    lines = ["no calibration, no forecast: teacher.server gives no full distributions"] if server else []
    if is_main():
        sys.stderr.writelines(line + "\n" for line in (found.lines if found else lines))
    return found


def distillation(
    job: Job, frozen: Frozen, server: TeacherServer | None, programs: dict[tuple, Callable] | None = None
) -> Distillation:
    """The `Distillation` that the runs of all λ and seeds share.

    `programs`: the updates made so far by their `program_options`; what is made here is added.
    """
    programs = {} if programs is None else programs
    config = job.config
    tx = adamw(config.optimizer, config.opd.b2, config.opd.moments)
    graphs = job.graphs | {"student": job.trained["student"], "base": base_of(job.graphs)}

    def step(opd):
        options = program_options(opd)
        if options not in programs:
            guard = job.guard_of(guard_text(opd.guard))
            grammar = None if guard is None else guard.grammar
            programs[options] = make_step(
                opd, tx, graphs, vocab=job.codec.vocab, attention=job.attention, grammar=grammar
            )
        return programs[options]

    # One program with the guard and one without; they are the same entry where the run has none.
    steps = {guard_text(opd.guard): step(opd) for opd in (unguarded(config.opd), config.opd)}
    return Distillation(student_source(job, frozen.base), frozen, tx, steps, server)


def grid(job: Job, found: Recommendation | None) -> list[tuple[float, int, bool]]:
    """λ and seed of each run of the job, and whether without its guard, in order.

    With `opd.recommend` the λ under the guard is the one of `found`, if there is one yet.
    """
    opd, lambdas = job.config.opd, job.config.opd.lambdas
    if opd.recommend:
        lambdas = () if found is None else (found.lam,)
    points = [*((lam, True) for lam in opd.plain_lambdas), *((lam, False) for lam in lambdas)]
    return [(lam, seed, plain) for seed in opd.seeds for lam, plain in points]


def planned(job: Job, found: Recommendation | None) -> list[Run]:
    """Every policy that the job trains and evaluates, in order."""
    before = [sft_run(job, role) for role in ROLES if role in job.models] + anchor_runs(job)
    return before + [run for at in job.points() for point in grid(at, found) for run in opd_runs(at, *point)]


def frozen_models(job: Job, server: TeacherServer | None = None) -> Frozen:
    """Teachers and base, trained or read, each checked; the base is the SFT student unless another is named."""
    dtype = job.config.dtype.frozen
    # With sft.continued the teacher starts from the trained student.
    order = ("student", "teacher") if job.config.sft.continued else ("teacher", "student")
    models = {role: cast(sft_stage(job, role), dtype) for role in order if role in job.models}
    for role in (role for role in job.models if role not in ROLES):
        # These are read from checkpoints, so the seed draws nothing.
        models[role] = initial_params(job.models[role], job.shapes[role], seed=0, dtype=dtype)
    preflight(job, models, server)
    return Frozen(models.get("teacher"), base_of(models), experts_of(models))


def sft_stage(job: Job, role: str) -> Any:
    """Train, evaluate and export `role`; its parameters in float32."""
    params, run = train_sft(job, role), sft_run(job, role)
    if evaluated(job.workdir, run) is None:
        finish(job, role, params, run)
    return params


def student_source(job: Job, base: Any) -> Callable[[int], Any]:
    """A function that gives every OPD run what it trains, in float32: a new adapter of its seed, or the SFT student.

    That is a copy of the base if the base is float32, else it is read again: through OPD there is no room on a device
    for a float32 copy that only the next run needs.
    """
    if lora := lora_of(job.config.student):
        return functools.partial(initial_adapter, job.shapes["student"], lora)
    if job.config.dtype.frozen == PARAM_DTYPE and not job.config.reference.weights:
        return lambda seed: jax.tree.map(jnp.copy, base)
    return lambda seed: train_sft(job, "student")


def distil(job: Job, shared: Distillation, runs: Sequence[Run]) -> None:
    """One training, evaluated at each budget of `runs`, exported at the last; if it collapses, see `on_collapse`.

    Anchors are not exported.
    """
    for run in runs:
        if evaluated(job.workdir, run) is None:
            watch = watch_of(job.config.opd, run)
            # `runs` are one training at growing budgets: each call resumes where the one before it ended.
            params = train_opd(job, shared, run, most_useful(job.workdir, runs), watch)
            extra = collapse_fields(watch, run) | guarded_share(job.workdir, run)
            if watch and watch.stopped:
                extra["checkpoint"], params = best_checkpoint(job, shared, run)
            start = None if REFERENCE in job.models else shared.frozen.base
            export = run is runs[-1] and run.stage != ANCHOR  # an anchor only shows how far training gets
            finish(job, "student", params, run, export, start, **extra)


def most_useful(workdir: pathlib.Path, runs: Sequence[Run]) -> int | None:
    """The number of steps of the most useful policy among those of `runs` that are evaluated."""
    records = filter(None, (evaluated(workdir, run) for run in runs))
    return max(((r.useful, r.steps) for r in records), default=(None, None))[1]


def finish(
    job: Job, role: str, params: Any, run: Run, export: bool = True, base: Any = None, **extra: Any
) -> None:
    """Export and evaluate the policy that `run` ended in; its record in results.json says that both are done.

    `base` is what it was distilled from. `extra` are more fields of the record.
    """
    if export and job.config.train.export:
        folder, codec = job.workdir / "export" / run.name, job.codec
        # Before the evaluation, whose record says that both are done.
        save_hf(folder, job.shapes[role], params, codec.tokenizer, ends=codec.ends)
    if job.config.evaluation.forgetting:
        extra["forgetting"] = forgetting(job, role, params, base)
    record = evaluate(job, role, params, run, **extra)
    if is_main():
        print(f"{run.name}, {run.steps} steps: {summary(record)}", file=sys.stderr)
