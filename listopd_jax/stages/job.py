"""Shared by every stage of a run: config, workdir, task, tokenizer, encoded records, and the shapes of the models."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import Float, Int32

from listopd_jax.config import (
    at_point,
    digest,
    guard_knows_contract,
    is_small,
    noise_shares,
    sweep_labels,
    to_json,
)
from listopd_jax.data import batches, encode, packing
from listopd_jax.errors import UserError
from listopd_jax.models.build import (
    graph_of,
    lora_of,
    model_config,
)
from listopd_jax.models.config import ModelConfig
from listopd_jax.ops.grammar import Grammar
from listopd_jax.ops.guard import Guard
from listopd_jax.parallel import hosts, rules
from listopd_jax.rollout.decode import pass_tokens
from listopd_jax.rounding import round_up
from listopd_jax.stages.expected import Forced, forced_answers
from listopd_jax.stages.teachers import expert_sections, own_teachers, teacher_roles
from listopd_jax.task.codec import Codec
from listopd_jax.task.contract import Parsed
from listopd_jax.task.protocol import Task
from listopd_jax.task.schema_masks import Schema, SchemaMasks
from listopd_jax.tasks.load import in_task_file
from listopd_jax.trackers import Tracking
from listopd_jax.train.loop import Saving

ROLES = ("teacher", "student")
REFERENCE = "reference"  # the role of a base that is not the student's SFT
DRAFT_TOKENS = 8  # by default; an object of an answer has 10 to 28 tokens, most of them always the same


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything but parameters.

    `models` are the config sections of its models by role, teacher, student and maybe reference and experts; `records`
    those of the task by split (train, validation); `attention` is never auto.
    """

    config: ml_collections.FrozenConfigDict
    workdir: pathlib.Path
    models: Mapping[str, ml_collections.FrozenConfigDict]
    task: Task
    codec: Codec
    records: Mapping[str, Sequence[Any]]
    attention: str
    sweep: str = ""  # the point of `opd.sweep` that `config` is at

    @property
    def tracking(self) -> Tracking:
        """The trackers of the job's runs."""
        return tracking(self.config)

    def points(self) -> list["Job"]:
        """The job at each point of `opd.sweep`; itself where nothing is swept.

        Cached properties stay: records, models and prompts do not depend on section opd.
        """
        return (
            [self._at(label) for label in sweep_labels(self.config.opd)] if self.config.opd.sweep else [self]
        )

    def _at(self, label: str) -> "Job":
        at = dataclasses.replace(self, config=at_point(self.config, label), sweep=label)
        # Through vars(), where cached_property keeps its values and a frozen dataclass does not look.
        vars(at).update({name: value for name, value in vars(self).items() if name not in vars(at)})
        return at

    @functools.cached_property
    def shapes(self) -> dict[str, ModelConfig]:
        """Dimensions of the models by role."""
        return {role: model_config(model, self.codec.vocab) for role, model in self.models.items()}

    @functools.cached_property
    def graphs(self) -> dict[str, nnx.GraphDef]:
        """Static halves of the models by role; `base_of` them is the base's."""
        compute, remat = self.config.dtype.compute, self.config.remat
        return {role: graph_of(shape, compute, remat, self.attention) for role, shape in self.shapes.items()}

    @functools.cached_property
    def trained(self) -> dict[str, nnx.GraphDef]:
        """Static halves of the models as they train: with their adapters, if they train these."""
        compute, remat = self.config.dtype.compute, self.config.remat
        graphs = dict(self.graphs)
        for role in self.models.keys() & set(ROLES):
            if lora := lora_of(self.models[role]):
                graphs[role] = graph_of(self.shapes[role], compute, remat, self.attention, lora)
        return graphs

    @functools.cached_property
    def train(self) -> encode.EncodedSplit:
        """The training records with their right answers."""
        return self._encoded(self.records["train"])

    @functools.cached_property
    def validation(self) -> encode.EncodedSplit:
        """The records that policies are evaluated on: the first `evaluation.max_lists` (0: all)."""
        return self._encoded(self.records["validation"][: self.config.evaluation.max_lists or None])

    @functools.cached_property
    def for_teachers(self) -> dict[str, encode.EncodedSplit]:
        """Both splits, with each record's teacher and its prompt for teachers, where there are such."""
        splits = {"train": self.train, "validation": self.validation}
        return {name: self._for_teachers(split, self.records[name]) for name, split in splits.items()}

    def _for_teachers(self, split: encode.EncodedSplit, records: Sequence[Any]) -> encode.EncodedSplit:
        teachers, options = self.config.teachers, self.config.task
        records = records[: len(split.prompts)]
        own, prompts = own_teachers(self.task, records, teachers), None
        if teachers.max_prompt:
            prompts = encode.teacher_prompts(
                split, self.task, records, self.codec.tokenizer, max_prompt=teachers.max_prompt,
                chat_template=options.chat_template, chat_date=options.chat_date, ends=self.codec.ends,
            )  # fmt: skip
        return dataclasses.replace(split, own_teacher=own, teacher_prompts=prompts)

    def _encoded(self, records: Sequence[Any]) -> encode.EncodedSplit:
        """Records as ids."""
        options = self.config.task
        return encode.encode_split(
            self.task, records, self.codec.tokenizer, max_prompt=options.max_prompt, max_answer=self.max_response,
            chat_template=options.chat_template, chat_date=options.chat_date, ends=self.codec.ends,
        )  # fmt: skip

    @functools.cached_property
    def max_response(self) -> int:
        """Tokens that an answer may take: `task.max_response`; if that is 0, as many as the longest right one."""
        if self.config.task.max_response:
            return self.config.task.max_response
        records = [r for part in self.records.values() for r in part if self.task.answer(r) is not None]
        if not records:
            raise UserError("task.max_response=0: no record has an answer to take it from; set it")
        longest = max(len(encode.answer_ids(self.task, r, self.codec.tokenizer)) for r in records)
        return round_up(longest, 16)

    def judge(self, split: str) -> Callable[[str, int], Parsed]:
        """A function that judges a text as the answer to the record of `split` at a row."""
        records = self.records[split]
        return lambda text, row: self.task.parse(text, records[row])

    @functools.cached_property
    def decoding(self) -> dict[str, Any]:
        """The options of `generate` that are the same everywhere in the job.

        The hint, which drafts are copied from, is an answer of the task's form.
        """
        codec = self.codec
        text = self.task.hint(self.records["train"])
        hint = [*codec.tokenizer.encode(text, add_special_tokens=False), codec.eos]
        return {
            "max_tokens": self.max_response, "vocab": codec.vocab, "eos": codec.ends, "pad": codec.pad,
            "hint": np.array([hint], np.int32), "draft_tokens": draft_tokens(self.config),
            "pass_tokens": pass_tokens(jax.default_backend()),
        }  # fmt: skip

    @functools.cached_property
    def forced(self) -> Forced | None:
        """The validation lists' right answers, for `evaluation.expected`; None where that is off."""
        return forced_answers(self.true_scores, self.codec) if self.config.evaluation.expected else None

    @property
    def true_scores(self) -> Float[np.ndarray, "N K"]:
        """The labels of the validation lists, where the task has such."""
        return np.array(
            [r.scores for r in self.records["validation"][: len(self.validation.prompts)]], np.float64
        )

    @functools.cached_property
    def grammar(self) -> Grammar:
        """The contract over the tokenizer's ids, on the device."""
        return Grammar(*map(jnp.asarray, self.codec.automaton(self.config.task.k)))

    @functools.cached_property
    def compact_grammar(self) -> Grammar:
        """The same without white space, what `contract` constrains to."""
        return Grammar(*map(jnp.asarray, self.codec.automaton(self.config.task.k, compact=True)))

    @functools.cached_property
    def schema_masks(self) -> SchemaMasks:
        """The compiler from the schemas of records to masks."""
        if jax.process_count() > 1:
            raise UserError("constrained to 'schema': the masks are made by one process; run it on one host")
        return SchemaMasks(self.codec.tokenizer, self.codec.vocab, self.codec.ends)

    def schema_of(self, record: Any) -> Schema:
        """The schema of a record; UserError if its task has none."""
        schema = self.task.schema(record)
        if schema is None:
            raise UserError(
                f"task {self.task.name}: has no schema for record {record.key}; define Task.schema, or leave 'schema' "
                "out of evaluation.constrained and opd.constrained_rollouts"
            )
        return Schema(schema, f"record {record.key}")

    def is_masked_away(self, record: Any) -> bool:
        """Whether a record has a right answer that its schema's masks do not let through; UserError as `schema_of`."""
        schema, answer = self.schema_of(record), self.task.answer(record)
        # The schema is looked at even where there is no answer: one that cannot be compiled must show here.
        tokens = [] if answer is None else self.codec.tokenizer.encode(answer, add_special_tokens=False)
        kept = self.schema_masks.keeps(schema, tokens)
        return answer is not None and not kept

    def constraint(self, name: str, split: str, rows: Sequence[int], completions: int = 1) -> dict[str, Any]:
        """The options of `generate` that keep `completions` of each record at `rows` of `split` to a constraint.

        `name` is one of config.CONSTRAINTS, or "": no options.
        """
        if name == "contract":
            return {"constraint": self.compact_grammar}
        if name == "schema":
            schemas = [self.schema_of(self.records[split][row]) for row in rows for _ in range(completions)]
            return {"masks": self.schema_masks.rows(schemas)}
        return {}

    def guard_of(self, text: str) -> Guard | None:
        """The guard of runs and forecasts whose records say `text`: None for "", else that of section `opd.guard`."""
        guard = self.config.opd.guard
        if not text:
            return None
        return Guard(
            # An array: another margin runs the same program.
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
        return batches.choose_buckets(both, self.config.task.prompt_buckets)

    def sft_batches(self, role: str) -> Any:
        """Endless shuffled batches for the SFT of `role`: records with an answer, and the noise of its section.

        UserError if no training record has an answer.
        """
        sft, records = self.config.sft[role], self.records["train"]
        answered = [row for row, record in enumerate(records) if self.task.answer(record) is not None]
        if not answered:
            raise UserError(
                f"no training record has an answer, so there is nothing to train the {role} on; give answers, or set "
                f"{role}.weights to a model that is fine-tuned and sft.{role}.epochs=0"
            )
        noise = encode.AnswerNoise(known_noise(self.task, sft), seed=sft.seed)
        with in_task_file(self.config.task.file):
            split = encode.with_noise(self.train, self.task, records, self.codec.tokenizer, noise)
        split = encode.rows_of(split, answered)
        return self._train_batches(split, sft.batch_size, sft.seed, self._packing(role, split))

    def _packing(
        self, role: str, split: encode.EncodedSplit
    ) -> Callable[[batches.Batch], batches.Batch] | None:
        """The function that packs the lists of `split` for the SFT of `role`; None if each has a row of its own."""
        sft = self.config.sft[role]
        if not sft.packing:
            return None
        shape = packing.row_shape(
            split, sft.packing, f"sft.{role}.packing", microbatch=sft.microbatch, devices=rules.row_multiple()
        )
        return functools.partial(packing.pack, shape=shape)

    def opd_batches(self, seed: int) -> Any:
        """Endless shuffled batches of prompts for OPD."""
        return self._train_batches(self.for_teachers["train"], self.config.opd.batch_size, seed)

    def _train_batches(
        self, split: encode.EncodedSplit, batch_size: int, seed: int, change: Callable | None = None
    ) -> Any:
        """The rows of each global batch that this host's devices hold; with a `change`, which may move them, all."""
        # Every host plans the same global batch from the seed and reads only its rows.
        rows = None if change else hosts.local_rows(batch_size)
        # Buckets keep padding low by batches of lists of similar length, which packed rows do not need.
        buckets = self.buckets[-1:] if change else self.buckets
        return batches.train_batches(
            split, buckets=buckets, batch_size=batch_size, seed=seed, rows=rows, change=change
        )

    def evaluation_batches(self, batch_size: int = 0) -> Iterator[dict[str, Any]]:
        """Every validation list once, `batch_size` (0: `evaluation.batch_size`) or a few more at a time."""
        return self._evaluation_batches(self.validation, batch_size)

    def by_teacher(self, batch_size: int = 0) -> Iterator[tuple[str, Iterator[dict[str, Any]]]]:
        """`evaluation_batches` of each teacher's own lists, as it reads them, with its role, if it has any."""
        split = self.for_teachers["validation"]
        if split.own_teacher is None:
            yield "teacher", self._evaluation_batches(split, batch_size)
            return
        for i, role in enumerate(teacher_roles(self.models)):
            rows = np.flatnonzero(split.own_teacher == i).astype(np.int32)
            if rows.size:
                yield role, self._batches_of_rows(split, rows, batch_size)

    def _batches_of_rows(
        self, split: encode.EncodedSplit, rows: Int32[np.ndarray, " R"], batch_size: int
    ) -> Iterator[dict[str, Any]]:
        """Evaluation batches of some rows, which keep the numbers that they have in the split."""
        for batch in self._evaluation_batches(encode.rows_of(split, rows), batch_size):
            yield batch | {"index": rows[batch["index"]]}

    def _evaluation_batches(self, split: encode.EncodedSplit, batch_size: int) -> Iterator[dict[str, Any]]:
        size = rules.round_up_rows(batch_size or self.config.evaluation.batch_size)
        return batches.evaluation_batches(split, buckets=self.buckets, batch_size=size)


def known_noise(task: Task, sft: Any) -> tuple[tuple[str, float], ...]:
    """The corruptions that an SFT section asks for and `task` has, and their shares; none where it trains nothing."""
    if not sft.steps and not sft.epochs:
        return ()
    return tuple((name, share) for name, share in noise_shares(sft) if share and name in task.corruptions)


def draft_tokens(config: Any) -> int:
    """The most tokens that are drafted per row and decode step; models for which a step costs little draft none."""
    asked = config.rollout.draft_tokens
    return asked if asked >= 0 else 0 if is_small(config) else DRAFT_TOKENS


def models_of(config: Any) -> dict[str, Any]:
    """The config sections of a job's models by role: no teacher that is served, no reference without weights."""
    there = {"teacher": not config.teacher.server, "student": True, REFERENCE: bool(config.reference.weights)}
    return {role: config[role] for role, is_there in there.items() if is_there} | expert_sections(config)


def writers_of(models: Mapping[str, Any]) -> dict[str, Any]:
    """The models of `models`, by role, that write answers: all but a reference."""
    return {role: model for role, model in models.items() if role != REFERENCE}


def base_of(by_role: Mapping[str, Any]) -> Any:
    """The entry of the base in `by_role`: of the reference where there is one, else of the student."""
    return by_role[REFERENCE if REFERENCE in by_role else "student"]


def tracking(config: Any) -> Tracking:
    """The trackers that section `track` of `config` asks for."""
    return Tracking(config.track.to, config.track.project, to_json(config) if config.track.to else {})


def saving(config: Any, workdir: pathlib.Path, best: int | None = None, **identity: Any) -> Saving:
    """How section `train` of `config` says to save a run in `workdir`, identified by `config` and `identity`."""
    identity["config"] = digest(config, workdir)
    return Saving(config.train.checkpoint_every, config.train.keep_checkpoints, best, identity)
