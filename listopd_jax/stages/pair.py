"""Calibration, forecast and recommendation for a pair of checkpoints from elsewhere, without any training."""

import pathlib

import ml_collections

from listopd_jax.models.build import initial_params
from listopd_jax.ops.opd_loss import Frozen
from listopd_jax.records import Recommendation
from listopd_jax.stages.before import before_training
from listopd_jax.stages.checkpoint import require_tokenizer
from listopd_jax.stages.job import ROLES
from listopd_jax.stages.opd import preflight
from listopd_jax.stages.prepare import job_on_mesh
from listopd_jax.tasks.json_records import Prompts


def forecast_pair(config: ml_collections.FrozenConfigDict, workdir: pathlib.Path) -> Recommendation | None:
    """What `config.teacher` and, as the base, `config.student` say about λ on the prompts of `config.data.path`.

    Leaves calibration.json, results.json and recommendation.json in `workdir`, as a run does. UserError for a
    checkpoint that cannot be loaded, two that are one, or a base with another tokenizer than the teacher's.
    """
    for role in ROLES:
        require_tokenizer(config[role].weights)
    with job_on_mesh(config, workdir, Prompts(config.data, config.task)) as job:
        dtype = config.dtype.frozen
        models = {
            role: initial_params(job.models[role], job.shapes[role], seed=0, dtype=dtype) for role in ROLES
        }
        preflight(job, models)
        return before_training(job, Frozen(models["teacher"], models["student"]))
