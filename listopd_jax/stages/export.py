"""A policy of a run as it is written to a Hugging Face folder: from the run's own export, or from its checkpoint."""

import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import SingleDeviceSharding
from transformers import PreTrainedTokenizerBase

from listopd_jax.data.tokenizer import load_tokenizer
from listopd_jax.errors import UserError, unknown_name
from listopd_jax.lifecycle import locked
from listopd_jax.models.build import PARAM_DTYPE, model_config, tokenizer_source
from listopd_jax.models.config import ModelConfig
from listopd_jax.models.decoder import abstract
from listopd_jax.models.hf import load_hf, read_eos_ids
from listopd_jax.records import RESULTS, Result
from listopd_jax.stages.job import ROLES, completion_ends, refuse_other_inputs, saving, tokenizer_digest
from listopd_jax.stages.opd import opd_saving
from listopd_jax.task.codec import Codec
from listopd_jax.train.checkpoints import Checkpoints
from listopd_jax.train.loop import Run, checkpoint_folder
from listopd_jax.train.optimizer import TrainState, adamw

TRAINED = {"sft_teacher": "teacher", "sft_student": "student", "opd": "student"}
"""The stages that leave weights, and of which model."""


class Model(NamedTuple):
    """What `save_hf` writes of a policy; `params` in float32, `ends` the ids that end a completion."""

    shape: ModelConfig
    params: nnx.State
    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]


def find_policy(results: Iterable[Result], name: str, steps: str = "last") -> Result:
    """The record of the trained policy `name` at the last, the best (by useful) or a given one of its evaluated steps.

    UserError, which lists those there are.
    """
    trained = sorted((r for r in results if r.stage in TRAINED), key=lambda r: r.steps or 0)
    named = {str(r.steps): r for r in trained if r.run == name}
    if not named:
        names = sorted({r.run for r in trained})
        raise unknown_name("--policy", name, names or ["none yet, let the run evaluate one"])
    choices = {
        "best": max(named.values(), key=lambda r: r.useful or 0.0),
        "last": [*named.values()][-1],
        **named,
    }
    if steps not in choices:
        raise unknown_name("--steps", steps, choices)
    return choices[steps]


def policy_model(
    config: ml_collections.FrozenConfigDict, digest: str, workdir: pathlib.Path, record: Result
) -> Model:
    """The policy that `record` is of, of the run in `workdir`, whose config has the `digest` that checkpoints name.

    UserError if neither its export nor its checkpoint is there and whole.
    """
    # results.json is a file like any other: the name may be made up.
    if pathlib.PurePath(record.run).name != record.run or record.run in ("", ".."):
        raise UserError(f"{workdir / RESULTS}: run {record.run!r} is no name of a policy; restore the file")
    folder = workdir / "export" / record.run
    if folder.is_dir() and not _on_the_way(config.opd, record):
        return Model(*load_hf(folder), load_tokenizer(folder), read_eos_ids(folder))
    if not checkpoint_folder(workdir, record.run).is_dir():
        raise UserError(
            f"{workdir}: has neither an export of {record.run} at step {record.steps} nor checkpoints/{record.run}; "
            "restore one"
        )
    with locked(workdir):
        return _from_checkpoint(config, digest, workdir, record)


def _on_the_way(opd: Any, record: Result) -> bool:
    """Whether `record` may be of a step before the last, whose weights an export does not have."""
    evaluated = record.steps in opd.eval_steps or bool(opd.eval_every and record.steps % opd.eval_every == 0)
    return record.stage == "opd" and evaluated and record.steps != opd.steps


def _from_checkpoint(config: Any, digest: str, workdir: pathlib.Path, record: Result) -> Model:
    path = tokenizer_source(config.tokenizer.path)
    tokenizer = load_tokenizer(path or workdir / "tokenizer")
    refuse_other_inputs(workdir, tokenizer=tokenizer_digest(path))
    codec = Codec(tokenizer, completion_ends(config, tokenizer, {role: config[role] for role in ROLES}))
    shape = model_config(config[TRAINED[record.stage]], codec.vocab)
    run = Run(record.run, record.stage, record.lam, record.seed, record.steps)
    saved = opd_saving(config) if record.stage == "opd" else saving(config)
    folder = checkpoint_folder(workdir, record.run)
    with Checkpoints(folder, saved.keep, run.labels | saved.identity | {"config": digest}) as checkpoints:
        # of a run that collapsed, the record is of its best checkpoint (stages/collapse.py)
        step = record.extra.get("checkpoint", record.steps)
        params = checkpoints.params_at(step, _state_like(config, record.stage, shape))
    return Model(shape, params, codec.tokenizer, codec.ends)


def _state_like(config: Any, stage: str, shape: ModelConfig) -> TrainState:
    """Shapes and dtypes of the state that a policy of `shape` was trained in, on one device."""
    device = SingleDeviceSharding(jax.devices()[0])
    trained = config.opd if stage == "opd" else config.sft[TRAINED[stage]]
    params = abstract(shape, param_dtype=jnp.dtype(PARAM_DTYPE))[1]
    moments = jax.eval_shape(adamw(config.optimizer, trained.b2, trained.moments).init, params)
    state = TrainState(params, moments, params if stage == "opd" and config.opd.ema else None)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)
