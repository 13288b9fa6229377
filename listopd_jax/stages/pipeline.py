"""The stages in order. Each leaves its result in the workdir and finds it there when called again."""

import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from listopd_jax.models.build import PARAM_DTYPE, cast
from listopd_jax.models.hf import save_hf
from listopd_jax.ops.opd_loss import Frozen
from listopd_jax.parallel.hosts import is_main
from listopd_jax.stages.calibrate import calibrate_stage
from listopd_jax.stages.forecast import forecast
from listopd_jax.stages.job import Job, job_on_mesh
from listopd_jax.stages.opd import Distillation, make_step, opd_runs, preflight, train_opd
from listopd_jax.stages.results import evaluate, evaluated, summary
from listopd_jax.stages.sft import sft_run, train_sft
from listopd_jax.train.loop import Run
from listopd_jax.train.optimizer import adamw


def run_stages(config: Any, workdir: pathlib.Path) -> None:
    """prepare → SFT teacher and student (= base) → calibrate, forecast → OPD for each λ and seed, each evaluated."""
    with job_on_mesh(config, workdir) as job:
        _models_to_policies(job)


def _models_to_policies(job: Job) -> None:
    config = job.config
    order = ("student", "teacher") if config.sft.continued else ("teacher", "student")
    models = {role: cast(sft_stage(job, role), config.dtype.frozen) for role in order}
    frozen = Frozen(models["teacher"], models["student"])
    preflight(job, frozen)
    calibrate_stage(job, frozen)
    forecast(job, frozen)
    tx = adamw(config.optimizer, config.opd.b2, config.opd.moments)
    grammar = None if job.guard is None else job.guard.grammar
    step = make_step(
        config.opd, tx, job.graphs, vocab=job.codec.vocab, attention=job.attention, grammar=grammar
    )
    shared = Distillation(student_again(job, frozen.base), frozen, tx, step)
    for seed in config.opd.seeds:
        for lam in config.opd.lambdas:
            distil(job, shared, lam, seed)


def sft_stage(job: Job, role: str) -> Any:
    """Train, evaluate and export `role`; its parameters in float32."""
    params, run = train_sft(job, role), sft_run(job, role)
    if evaluated(job.workdir, run) is None:
        finish(job, role, params, run)
    return params


def student_again(job: Job, base: Any) -> Callable[[], Any]:
    """What gives every OPD run the SFT student in float32: a copy of the base if it is that, else read again.

    Through OPD there is no room on a device for a float32 copy that only the next run needs.
    """
    if job.config.dtype.frozen == PARAM_DTYPE:
        return lambda: jax.tree.map(jnp.copy, base)
    return functools.partial(train_sft, job, "student")


def distil(job: Job, shared: Distillation, lam: float, seed: int) -> None:
    """Train at λ and seed, evaluate at every budget, export at the last."""
    runs = opd_runs(job, lam, seed)
    for run in runs:
        if evaluated(job.workdir, run) is None:
            params = train_opd(job, shared, run, most_useful(job.workdir, runs))
            finish(job, "student", params, run, export=run is runs[-1])


def most_useful(workdir: pathlib.Path, runs: Sequence[Run]) -> int | None:
    """The number of steps of the most useful policy among those of `runs` that are evaluated."""
    records = filter(None, (evaluated(workdir, run) for run in runs))
    return max(((r.useful, r.steps) for r in records), default=(None, None))[1]


def finish(job: Job, role: str, params: Any, run: Run, export: bool = True) -> None:
    """Export and evaluate the policy that `run` ended in; its record in results.json says that both are done."""
    if export and job.config.train.export:
        folder, codec = job.workdir / "export" / run.name, job.codec
        save_hf(folder, job.shapes[role], params, codec.tokenizer, ends=codec.ends)
    record = evaluate(job, role, params, run)
    if is_main():
        print(f"{run.name}, {run.steps} steps: {summary(record)}", file=sys.stderr)
