"""A policy of a run as it is written to a Hugging Face folder: from the run's own export, or from its checkpoint."""

import os
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
from listopd_jax.models.build import (
    PARAM_DTYPE,
    cast,
    initial_params,
    lora_of,
    model_config,
    tokenizer_source,
    weights_digest,
    weights_folder,
)
from listopd_jax.models.config import Lora, ModelConfig
from listopd_jax.models.decoder import abstract
from listopd_jax.models.hf import load_adapter, load_hf, read_eos_ids
from listopd_jax.models.lora import abstract_adapter, merge_adapter, stack_adapters
from listopd_jax.records import RESULTS, Result, read_results
from listopd_jax.stages.job import models_of, saving, writers_of
from listopd_jax.stages.opd import opd_saving
from listopd_jax.stages.prepare import completion_ends, refuse_other_inputs, tokenizer_digest
from listopd_jax.task.codec import Codec, vocab_of
from listopd_jax.train.checkpoints import Checkpoints
from listopd_jax.train.loop import Run, checkpoint_folder
from listopd_jax.train.optimizer import TrainState, adamw

TRAINED = {"sft_teacher": "teacher", "sft_student": "student", "opd": "student"}
"""The stages that leave weights, and of which model."""


class Model(NamedTuple):
    """The arguments of `save_hf` for a policy; `params` in float32, `ends` the ids that end a completion."""

    shape: ModelConfig
    params: nnx.State
    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]


class Adapter(NamedTuple):
    """The arguments of `save_adapter` for a policy; `base` is the folder of the model that it belongs to."""

    lora: Lora
    params: nnx.State
    base: str
    tokenizer: PreTrainedTokenizerBase


def find_policy(results: Iterable[Result], name: str, steps: str = "last") -> Result:
    """The record of the trained policy `name` at the last, the best (by useful) or a given evaluated step.

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


def policy_model(config: ml_collections.FrozenConfigDict, workdir: pathlib.Path, record: Result) -> Model:
    """The policy that `record` is of, of the run of `config` in `workdir`.

    UserError if neither its export nor its checkpoint is there and whole.
    """
    _check_name(workdir, record)
    folder = workdir / "export" / record.run
    if folder.is_dir() and not _on_the_way(config.opd, record):
        return _from_export(folder)
    if not checkpoint_folder(workdir, record.run).is_dir():
        raise UserError(
            f"{workdir}: has neither an export of {record.run} at step {record.steps} nor checkpoints/{record.run}; "
            "restore one"
        )
    with locked(workdir):
        return _from_checkpoint(config, workdir, record)


def _check_name(workdir: pathlib.Path, record: Result) -> None:
    """UserError if the run of a record is not a plain name: results.json is a file like any other."""
    if pathlib.PurePath(record.run).name != record.run or record.run in ("", ".."):
        raise UserError(
            f"{workdir / RESULTS}: run {record.run!r} is not the name of a policy; restore the file"
        )


def _on_the_way(opd: Any, record: Result) -> bool:
    """Whether `record` may be of a step before the last, whose weights an export does not have."""
    evaluated = record.steps in opd.eval_steps or bool(opd.eval_every and record.steps % opd.eval_every == 0)
    return record.stage == "opd" and evaluated and record.steps != opd.steps


def _from_export(folder: pathlib.Path) -> Model:
    try:
        return Model(*load_hf(folder), load_tokenizer(folder), read_eos_ids(folder))
    except UserError as e:
        reason = str(e).rsplit("; ", 1)[0]  # the rest is what to do with a download
        raise UserError(
            f"{folder}: the run's own export is incomplete ({reason}); delete the folder and export again: it is then "
            "made from the checkpoint"
        ) from e


def _from_checkpoint(config: Any, workdir: pathlib.Path, record: Result) -> Model:
    tokenizer = _tokenizer(config, workdir)
    ends = completion_ends(config, tokenizer, writers_of(models_of(config)))
    codec, role = Codec(tokenizer, ends), TRAINED[record.stage]
    shape = model_config(config[role], codec.vocab)
    if lora_of(config[role]) is None:
        return Model(shape, _trained(config, workdir, record, shape), codec.tokenizer, codec.ends)
    params = initial_params(config[role], shape, config.sft[role].seed, config.dtype.frozen)
    for lora, adapter in _adapters(config, workdir, record, shape):
        params = merge_adapter(cast(params, config.dtype.frozen), adapter, lora)
    return Model(shape, params, codec.tokenizer, codec.ends)


def _tokenizer(config: Any, workdir: pathlib.Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the run in `workdir`; UserError if its files were replaced since."""
    path = tokenizer_source(config.tokenizer.path)
    tokenizer = load_tokenizer(path or workdir / "tokenizer")
    refuse_other_inputs(workdir, tokenizer=tokenizer_digest(path))
    return tokenizer


def policy_adapter(config: ml_collections.FrozenConfigDict, workdir: pathlib.Path, record: Result) -> Adapter:
    """The policy of `record` less its model's published weights, as one adapter; see `policy_model`.

    UserError if it did not train one, or its model has no published weights.
    """
    role = TRAINED[record.stage]
    model = config[role]
    if lora_of(model) is None:
        raise UserError(f"{record.run}: was trained in full ({role}.lora.rank=0); leave out --adapter")
    if not model.weights:
        raise UserError(
            f"{record.run}: {role}.weights is empty, and an adapter is of a model; leave out --adapter"
        )
    tokenizer = _tokenizer(config, workdir)
    shape = model_config(model, vocab_of(tokenizer))
    with locked(workdir):
        parts = _adapters(config, workdir, record, shape)
    before = [load_adapter(model.adapter, shape)] if model.adapter else []
    return Adapter(
        *stack_adapters(shape, before + parts), os.path.abspath(weights_folder(model.weights)), tokenizer
    )


def _adapters(
    config: Any, workdir: pathlib.Path, record: Result, shape: ModelConfig
) -> list[tuple[Lora, nnx.State]]:
    """The adapters that a policy was trained by, one after the other: of SFT and, for OPD, its own."""
    role, records = TRAINED[record.stage], [record]
    refuse_other_inputs(workdir, **{role: weights_digest(config[role])})
    if record.stage == "opd":
        records.insert(0, find_policy(read_results(workdir / RESULTS), "sft_student"))
    records = [r for r in records if r.steps]
    for r in records:
        _check_name(workdir, r)
        if not checkpoint_folder(workdir, r.run).is_dir():
            raise UserError(f"{workdir}: has no checkpoints/{r.run}, which holds an adapter; restore it")
    lora = lora_of(config[role])
    return [(lora, _trained(config, workdir, r, shape)) for r in records]


def _trained(config: Any, workdir: pathlib.Path, record: Result, shape: ModelConfig) -> nnx.State:
    """The parameters in the checkpoint of a policy of `shape`: all of them, or its adapter."""
    run = Run(record.run, record.stage, record.lam, record.seed, record.steps, record.guard, record.sweep)
    saved = (opd_saving if record.stage == "opd" else saving)(config, workdir)
    folder = checkpoint_folder(workdir, record.run)
    with Checkpoints(folder, saved.keep, run.labels | saved.identity) as checkpoints:
        # of a run that collapsed, the record is of its best checkpoint (stages/collapse.py)
        step = record.extra.get("checkpoint", record.steps)
        return checkpoints.params_at(step, _state_like(config, record.stage, shape))


def _state_like(config: Any, stage: str, shape: ModelConfig) -> TrainState:
    """Shapes and dtypes of the state that a policy of `shape` was trained in, on one device."""
    device = SingleDeviceSharding(jax.devices()[0])
    trained = config.opd if stage == "opd" else config.sft[TRAINED[stage]]
    lora = lora_of(config[TRAINED[stage]])
    params = abstract_adapter(shape, lora) if lora else abstract(shape, param_dtype=jnp.dtype(PARAM_DTYPE))[1]
    moments = jax.eval_shape(adamw(config.optimizer, trained.b2, trained.moments).init, params)
    state = TrainState(params, moments, params if stage == "opd" and config.opd.ema else None)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)
