"""A checkpoint from elsewhere, judged on the lists of a run and recorded next to its policies."""

import os
import pathlib

import ml_collections

from listopd_jax.data.tokenizer import has_tokenizer
from listopd_jax.errors import UserError
from listopd_jax.models.build import PARAM_DTYPE, initial_params, weights_digest, weights_folder
from listopd_jax.parallel.hosts import from_main
from listopd_jax.records import EVALUATE, RESULTS, Result
from listopd_jax.stages.prepare import job_on_mesh
from listopd_jax.stages.results import evaluate, evaluated
from listopd_jax.train.loop import Run


def evaluate_checkpoint(
    config: ml_collections.FrozenConfigDict, workdir: pathlib.Path, weights: str
) -> Result:
    """Evaluate the checkpoint `weights`, a folder or hub id, like a policy of the run; returns its record.

    The record is named after the folder and also has the digest of its files; one that is there already is only read.
    UserError for a checkpoint that cannot be loaded or has another tokenizer than the task, and for one with the name
    of another that was evaluated here.
    """
    model = _section(config, weights)
    run = Run(os.path.basename(os.path.abspath(weights)), EVALUATE, lam=None, seed=None, steps=0)
    with job_on_mesh(config, workdir, checkpoint=model) as job:
        digest, found = from_main(lambda: weights_digest(model)), evaluated(workdir, run)
        if found is None:
            params = initial_params(model, job.shapes["checkpoint"], seed=0, dtype=PARAM_DTYPE)
            return evaluate(job, "checkpoint", params, run, weights=digest)
    if found.extra.get("weights") != digest:
        raise UserError(
            f"{workdir / RESULTS}: has another checkpoint that is called {run.name!r}; give --weights by a link of "
            "another name, or choose another --workdir"
        )
    return found


def _section(config: ml_collections.FrozenConfigDict, weights: str) -> ml_collections.FrozenConfigDict:
    """The config section of a model with `weights`; UserError if nothing says that its ids are those of the task."""
    if not config.tokenizer.path:
        require_tokenizer(weights)
    return ml_collections.FrozenConfigDict(config.student.to_dict() | {"weights": weights, "adapter": ""})


def require_tokenizer(weights: str) -> None:
    """UserError if a checkpoint has no tokenizer."""
    if not has_tokenizer(weights_folder(weights)):
        raise UserError(
            f"{weights}: holds no tokenizer, so its ids cannot be compared with the task's; copy the tokenizer that it "
            "was trained with into the folder"
        )
