"""What every stage of a run shares: checked config, workdir, tokenizer, encoded lists, and the shapes of the models."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from flax import nnx

from listopd_jax import files
from listopd_jax.config import digest, guard_knows_contract, guard_text, is_small
from listopd_jax.data import input as data_input
from listopd_jax.data.builder import read_split
from listopd_jax.data.chat import turn_ends
from listopd_jax.data.prepare import prepare
from listopd_jax.data.tokenizer import (
    check_tokenizers_agree,
    has_tokenizer,
    load_tokenizer,
    read_tokenizer,
    tokenizer_files,
    train_tokenizer,
)
from listopd_jax.errors import UserError
from listopd_jax.models.build import graph_of, model_config, model_ends, weights_digest, weights_folder
from listopd_jax.models.config import ModelConfig
from listopd_jax.ops.attention_backends import resolve
from listopd_jax.ops.grammar import Grammar
from listopd_jax.ops.guard import Guard
from listopd_jax.parallel import hosts, rules
from listopd_jax.parallel.mesh import configured_mesh, use_mesh
from listopd_jax.records import RESULTS
from listopd_jax.rollout.decode import pass_tokens
from listopd_jax.stages.expected import Forced, forced_answers
from listopd_jax.task.codec import Codec, vocab_of
from listopd_jax.task.prompt import ListExample, render_answer
from listopd_jax.train.loop import Saving
from listopd_jax.train.preflight import check_mesh

ROLES = ("teacher", "student")
STAMP = "data.json"
INPUTS = {
    "fingerprint": "the data files",
    "tokenizer": "the files of tokenizer.path",
    "teacher": "the files of teacher.weights",
    "student": "the files of student.weights",
}
"""What STAMP has the digests of."""


DRAFT_TOKENS = 8  # by default; an object of an answer has 10 to 28 tokens, most of them always the same


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything but parameters.

    `models` are the config sections of its models by role, teacher and student; `examples` the lists by split (train,
    validation); `attention` is never auto.
    """

    config: ml_collections.FrozenConfigDict
    workdir: pathlib.Path
    models: Mapping[str, ml_collections.FrozenConfigDict]
    codec: Codec
    examples: dict[str, list[ListExample]]
    attention: str

    @functools.cached_property
    def shapes(self) -> dict[str, ModelConfig]:
        """Dimensions of the models by role."""
        return {role: model_config(model, self.codec.vocab) for role, model in self.models.items()}

    @functools.cached_property
    def graphs(self) -> dict[str, nnx.GraphDef]:
        """Static halves of the models by role; the base has the student's."""
        compute, remat = self.config.dtype.compute, self.config.remat
        return {role: graph_of(shape, compute, remat, self.attention) for role, shape in self.shapes.items()}

    @functools.cached_property
    def train(self) -> data_input.EncodedSplit:
        """The training lists with their right answers."""
        return self._encoded(self.examples["train"])

    @functools.cached_property
    def validation(self) -> data_input.EncodedSplit:
        """The lists that policies are evaluated on: the first `evaluation.max_lists` (0: all)."""
        return self._encoded(self.examples["validation"][: self.config.evaluation.max_lists or None])

    def _encoded(self, examples: Sequence[ListExample]) -> data_input.EncodedSplit:
        """Lists as ids."""
        task = self.config.task
        return data_input.encode_split(
            examples, self.codec.tokenizer, max_prompt=task.max_prompt, max_answer=task.max_response,
            chat_template=task.chat_template, chat_date=task.chat_date, ends=self.codec.ends,
        )  # fmt: skip

    @functools.cached_property
    def decoding(self) -> dict[str, Any]:
        """How completions are written everywhere in the job: the options of `generate` that no stage chooses.

        The hint, which drafts are copied from, is an answer of the task's form; it knows nothing of any list.
        """
        codec, task = self.codec, self.config.task
        answer = render_answer([7] * len(next(iter(self.examples["train"])).scores))
        hint = [*codec.tokenizer.encode(answer, add_special_tokens=False), codec.eos]
        return {
            "max_tokens": task.max_response, "vocab": codec.vocab, "eos": codec.ends, "pad": codec.pad,
            "hint": np.array([hint], np.int32), "draft_tokens": draft_tokens(self.config),
            "pass_tokens": pass_tokens(jax.default_backend()),
        }  # fmt: skip

    @functools.cached_property
    def forced(self) -> Forced | None:
        """The validation lists' right answers, for `evaluation.expected`; None where that is off."""
        return forced_answers(self.validation.scores, self.codec) if self.config.evaluation.expected else None

    @functools.cached_property
    def grammar(self) -> Grammar:
        """The contract over the tokenizer's ids, on the device."""
        return Grammar(*map(jnp.asarray, self.codec.automaton(self.config.task.k)))

    @property
    def guard(self) -> Guard | None:
        """The guard of section `opd.guard`; None where it is off."""
        guard = self.config.opd.guard
        if not guard_text(guard):
            return None
        return Guard(
            jnp.float32(guard.margin),
            guard.fallback if guard.margin else "",
            self.grammar if guard_knows_contract(guard) else None,
            guard.scope,
            guard.mask,
            guard.floor,
            guard.structure,
        )

    def steps(self, epochs: float, batch_size: int) -> int:
        """Optimisation steps in `epochs` passes over the training lists; an epoch is of whole batches, at least one.

        EC's 1795 lists in batches of 128 are 14 steps per epoch.
        """
        return max(1, round(epochs * max(1, len(self.train.prompts) // batch_size))) if epochs else 0

    @functools.cached_property
    def buckets(self) -> tuple[int, ...]:
        """The prompt widths that programs are compiled for."""
        both = [*self.train.prompt_lengths, *self.validation.prompt_lengths]
        return data_input.choose_buckets(both, self.config.task.prompt_buckets)

    def sft_batches(self, role: str) -> Any:
        """Endless shuffled batches for the SFT of `role`, with the noise that its section asks for."""
        sft = self.config.sft[role]
        noise = data_input.AnswerNoise(sft.truncation_rate, sft.duplicate_rate, seed=sft.seed)
        split = data_input.with_noise(self.train, self.examples["train"], self.codec.tokenizer, noise)
        return self._train_batches(split, sft.batch_size, sft.seed)

    def opd_batches(self, seed: int) -> Any:
        """Endless shuffled batches of prompts for OPD."""
        return self._train_batches(self.train, self.config.opd.batch_size, seed)

    def _train_batches(self, split: data_input.EncodedSplit, batch_size: int, seed: int) -> Any:
        """Of each global batch, the rows that this host's devices hold."""
        rows = hosts.local_rows(batch_size)
        return data_input.train_batches(
            split, buckets=self.buckets, batch_size=batch_size, seed=seed, rows=rows
        )

    def evaluation_batches(self, batch_size: int = 0) -> Iterator[dict[str, Any]]:
        """Every validation list once, `batch_size` (0: `evaluation.batch_size`) or a few more at a time."""
        size = rules.round_up_rows(batch_size or self.config.evaluation.batch_size)
        return data_input.evaluation_batches(self.validation, buckets=self.buckets, batch_size=size)


def draft_tokens(config: Any) -> int:
    """The most tokens that are drafted per row and decode step; models for which a step costs little draft none."""
    asked = config.rollout.draft_tokens
    return asked if asked >= 0 else 0 if is_small(config) else DRAFT_TOKENS


@contextlib.contextmanager
def job_on_mesh(
    config: ml_collections.FrozenConfigDict, workdir: pathlib.Path, **models: Any
) -> Iterator[Job]:
    """`open_job`; while inside, programs are split over the mesh that the config asks for."""
    mesh = configured_mesh(config.parallel)
    job = open_job(config, workdir, **models)
    if mesh is not None:
        check_mesh(config, job.shapes, mesh.shape)
    with use_mesh(mesh):
        yield job


def open_job(config: ml_collections.FrozenConfigDict, workdir: pathlib.Path, **models: Any) -> Job:
    """The prepare stage: build or find data set and tokenizer; UserError for whatever cannot be used.

    `models` are config sections by role; if none is given, those of teacher and student.
    """
    models = models or {role: config[role] for role in ROLES}
    backend = resolve(config.attention, jax.default_backend(), config.dtype.compute)
    with hosts.main_first():
        report = prepare(config.data, config.task, workdir / "data")
        refuse_other_inputs(workdir, fingerprint=report["fingerprint"])
        for note in report["notes"]:
            logging.warning("data: %s", note)
        examples = {split: read_split(workdir / "data", split) for split in ("train", "validation")}
        tokenizer = _tokenizer(config, workdir, report["fingerprint"], examples["train"])
        _check_tokenizers(tokenizer, models)
        if hosts.is_main():
            refuse_other_inputs(workdir, **_digests(config, models))
    job = Job(config, workdir, models, make_codec(config, tokenizer, models), examples, backend)
    # A checkpoint or template that does not fit shows now, not when its turn comes.
    _ = job.shapes, job.validation, job.guard
    return job


def refuse_other_inputs(workdir: pathlib.Path, **digests: str | None) -> None:
    """UserError if models of this workdir were made from other files than those that its config names now.

    `digests` are of INPUTS, by name; None, for what the config does not name, is left out.
    """
    stamp, now = workdir / STAMP, {name: digest for name, digest in digests.items() if digest is not None}
    before = files.read_json(stamp) if stamp.exists() else {}
    if not isinstance(before, dict):
        raise UserError(f"{stamp}: not what a run writes; restore it, or choose another --workdir")
    used = any((workdir / name).exists() for name in ("checkpoints", RESULTS))
    changed = [name for name in now if before.get(name, now[name]) != now[name]]
    if used and changed:
        raise UserError(
            f"{workdir}: {INPUTS[changed[0]]} changed since its models were made; restore them, or choose another "
            "--workdir"
        )
    files.write_json(stamp, before | now)


def _digests(config: ml_collections.FrozenConfigDict, models: Mapping[str, Any]) -> dict[str, str | None]:
    """What decides a run besides config and data: the bytes of the folders that the config names."""
    weights = {role: weights_digest(models[role]) for role in ROLES if role in models}
    return {"tokenizer": tokenizer_digest(config.tokenizer.path), **weights}


def tokenizer_digest(path: str) -> str | None:
    """SHA-256 of the files of the tokenizer at `tokenizer.path`; None if the run trains its own."""
    return files.json_sha256({f.name: files.sha256(f) for f in tokenizer_files(path)}) if path else None


def _tokenizer(config, workdir: pathlib.Path, fingerprint: str, examples: list[ListExample]):
    """The tokenizer of the config, or one trained on `examples`."""
    if config.tokenizer.path:
        return load_tokenizer(config.tokenizer.path)
    folder, stamp = workdir / "tokenizer", workdir / "tokenizer.json"
    made_from = {"data": fingerprint, "vocab_size": config.tokenizer.vocab_size}
    if not stamp.exists() or files.read_json(stamp) != made_from:
        train_tokenizer(data_input.rendered(examples), config.tokenizer.vocab_size, folder)
        files.write_json(stamp, made_from)
    return load_tokenizer(folder)


def _check_tokenizers(tokenizer: Any, models: Mapping[str, Any]) -> None:
    """UserError if a model that has a tokenizer of its own has another than the task's."""
    for model in models.values():
        own = weights_folder(model.weights) if model.weights else None
        if own is not None and own != pathlib.Path(tokenizer.name_or_path) and has_tokenizer(own):
            check_tokenizers_agree(tokenizer, read_tokenizer(own))


def make_codec(config: Any, tokenizer: Any, models: Mapping[str, Any]) -> Codec:
    """The codec of `tokenizer`, in which whatever ends a completion of one of `models` or a turn is an end."""
    ends = [i for model in models.values() for i in model_ends(model, vocab_of(tokenizer))]
    return Codec(tokenizer, ends + (turn_ends(tokenizer) if config.task.chat_template else []))


def saving(config: Any, best: int | None = None, **identity: Any) -> Saving:
    """Saving as section `train` of `config` says, of a run that `config` and `identity` make."""
    identity["config"] = digest(config)
    return Saving(config.train.checkpoint_every, config.train.keep_checkpoints, best, identity)
