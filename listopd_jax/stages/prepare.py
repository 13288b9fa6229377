"""The prepare stage: from a config to a `Job`, with every check that needs the files and comes before training."""

import contextlib
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
from absl import logging

from listopd_jax import files
from listopd_jax.config import (
    constraints,
    guard_text,
    noise_shares,
)
from listopd_jax.data.chat import turn_ends
from listopd_jax.data.encode import rendered
from listopd_jax.data.tokenizer import (
    check_tokenizers_agree,
    has_tokenizer,
    load_tokenizer,
    read_tokenizer,
    tokenizer_files,
    train_tokenizer,
)
from listopd_jax.errors import UserError
from listopd_jax.models.build import (
    model_ends,
    tokenizer_source,
    weights_digest,
    weights_folder,
)
from listopd_jax.ops.attention_backends import resolve
from listopd_jax.parallel import hosts
from listopd_jax.parallel.mesh import configured_mesh, use_mesh
from listopd_jax.records import RESULTS, STAMP
from listopd_jax.stages.job import REFERENCE, ROLES, Job, known_noise, models_of, writers_of
from listopd_jax.stages.task_check import check_task
from listopd_jax.stages.teachers import expert_sections
from listopd_jax.task.codec import Codec, vocab_of
from listopd_jax.task.protocol import Task
from listopd_jax.tasks.load import in_task_file, load_task
from listopd_jax.train.preflight import check_mesh, check_rounding

INPUTS = {
    "fingerprint": "the data files",
    "tokenizer": "the files of tokenizer.path",
    "teacher": "the files of teacher.weights",
    "student": "the files of student.weights",
    REFERENCE: "the files of reference.weights",
    "teachers": "the files of teachers.route",
}
"""Inputs whose digests are in STAMP, in addition to the noise in the answers of each SFT."""


def _say_dropped_noise(task: Task, config: Any) -> None:
    """One line on stderr if an SFT section asks for noise that the task does not define."""
    asked = [(role, name) for role in ROLES for name, _ in noise_shares(config.sft[role])]
    dropped = [f"{name} (sft.{role}.noise)" for role, name in asked if name not in task.corruptions]
    if dropped:
        known = ", ".join(sorted(task.corruptions)) or "none"
        print(f"task {task.name}: defines no {', '.join(dropped)}: dropped; it has {known}", file=sys.stderr)


def _keep_noise(workdir: pathlib.Path, task: Task, config: Any, models: Mapping[str, Any]) -> None:
    """Write to STAMP the noise that the answers of each SFT really have: the config alone does not tell the report."""
    noise = {role: dict(known_noise(task, config.sft[role])) for role in ROLES if role in models}
    files.write_json(workdir / STAMP, files.read_json(workdir / STAMP) | {"noise": noise})


def _look_at_teacher_prompts(task: Task, config: Any, records: Sequence[Any]) -> None:
    """UserError if the config asks for prompts of teachers and there are none; one line on stderr if it leaves them."""
    asked, given = config.teachers.max_prompt, any(task.teacher_prompt(r) is not None for r in records)
    if asked and not given:
        raise UserError(
            f"teachers.max_prompt={asked}: no {task.name} record has a prompt for teachers (teacher_prompt); give "
            "some, or set it to 0"
        )
    if given and not asked:
        text = "teachers read the student's prompts, not those of teacher_prompt: teachers.max_prompt=0"
        print(f"task {task.name}: {text}", file=sys.stderr)


@contextlib.contextmanager
def job_on_mesh(
    config: ml_collections.FrozenConfigDict, workdir: pathlib.Path, task: Task | None = None, **models: Any
) -> Iterator[Job]:
    """`open_job`; while inside, programs are split over the mesh that the config asks for."""
    mesh = configured_mesh(config.parallel)
    job = open_job(config, workdir, task, **models)
    if mesh is not None:
        for at in job.points():
            check_mesh(at.config, job.shapes, mesh.shape)
    with use_mesh(mesh):
        yield job


def open_job(
    config: ml_collections.FrozenConfigDict, workdir: pathlib.Path, task: Task | None = None, **models: Any
) -> Job:
    """The prepare stage: build or find data set and tokenizer; UserError for whatever cannot be used.

    `task` is that of the config unless given. `models` are config sections by role; if none is given, those of teacher,
    student and, if it is another, base.
    """
    all_roles, models = not models, models or models_of(config)
    backend = resolve(config.attention, jax.default_backend(), config.dtype.compute)
    task = task or load_task(config)
    with hosts.main_first():
        # Process 0 builds the data set and the tokenizer; the others find them.
        with in_task_file(config.task.file):
            splits = task.splits(workdir / "data")
            check_task(task, splits, config)
        fingerprint = splits.report["fingerprint"]
        refuse_other_inputs(workdir, fingerprint=fingerprint)
        for note in splits.report["notes"]:
            logging.warning("data: %s", note)
        tokenizer = _tokenizer(config, workdir, fingerprint, task, splits.train)
        _check_tokenizers(tokenizer, models)
        if hosts.is_main():
            # Digests read every byte of the weights: one process does it.
            refuse_other_inputs(workdir, **_digests(config, models))
            _say_dropped_noise(task, config)
            if all_roles:
                _keep_noise(workdir, task, config, models)
                _look_at_teacher_prompts(task, config, [*splits.train, *splits.validation])
    codec = Codec(tokenizer, completion_ends(config, tokenizer, writers_of(models)), task.token_classes)
    records = {"train": splits.train, "validation": splits.validation}
    job = Job(config, workdir, models, task, codec, records, backend)
    # A checkpoint or template that does not fit shows now, not when its turn comes.
    _ = job.shapes, job.validation
    if all_roles:
        check_rounding(config, job.shapes)
    for at in job.points():
        _ = at.guard_of(guard_text(at.config.opd.guard))
        _check_constraints(at)
        if all_roles and at.config.opd.on_policy < 1:
            _check_all_answered(at)
    if all_roles and (config.teachers.route or config.teachers.max_prompt):
        _ = job.for_teachers
    return job


def _check_all_answered(job: Job) -> None:
    """UserError if a training record has no right answer, since OPD is to train on them."""
    records = job.records["train"]
    if without := sum(job.task.answer(record) is None for record in records):
        raise UserError(
            f"opd.on_policy={job.config.opd.on_policy:g}: {without} of {len(records)} training records have no right "
            "answer to train on; give answers, or set opd.on_policy=1.0"
        )


def _check_constraints(job: Job) -> None:
    """UserError if the config asks for a constraint that cannot be kept; a warning if right answers are masked away."""
    asked = constraints(job.config)
    for field, split in (("evaluation.constrained", "validation"), ("opd.constrained_rollouts", "train")):
        if "contract" in asked[field]:
            _ = job.compact_grammar
        if "schema" in asked[field] and (masked := sum(map(job.is_masked_away, job.records[split]))):
            logging.warning(
                "%s: the schema masks %d of %d right answers of %s away: are their fields in the order of the schema?",
                field, masked, len(job.records[split]), split,
            )  # fmt: skip


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
    """Digests of what decides a run beyond config and data: the bytes of the folders that the config names."""
    weights = {role: weights_digest(models[role]) for role in (*ROLES, REFERENCE) if role in models}
    experts = {role: weights_digest(models[role]) for role in models if role in expert_sections(config)}
    return {
        "tokenizer": tokenizer_digest(tokenizer_source(config.tokenizer.path)),
        "teachers": files.json_sha256(experts) if experts else None,
        **weights,
    }


def tokenizer_digest(path: str) -> str | None:
    """SHA-256 of the files of the tokenizer at `tokenizer.path`; None if the run trains its own."""
    return files.json_sha256({f.name: files.sha256(f) for f in tokenizer_files(path)}) if path else None


def _tokenizer(config, workdir: pathlib.Path, fingerprint: str, task: Task, records: Sequence[Any]):
    """The tokenizer of the config, or one trained on `records`."""
    if config.tokenizer.path:
        return load_tokenizer(tokenizer_source(config.tokenizer.path))
    folder, stamp = workdir / "tokenizer", workdir / "tokenizer.json"
    made_from = {"data": fingerprint, "vocab_size": config.tokenizer.vocab_size}
    if not stamp.exists() or files.read_json(stamp) != made_from:
        # The stamp is written last: a run that is killed in between trains the tokenizer again.
        train_tokenizer(rendered(task, records), config.tokenizer.vocab_size, folder)
        files.write_json(stamp, made_from)
    return load_tokenizer(folder)


def _check_tokenizers(tokenizer: Any, models: Mapping[str, Any]) -> None:
    """UserError if a model that has a tokenizer of its own has another than the task's."""
    for model in models.values():
        own = weights_folder(model.weights) if model.weights else None
        if own is not None and own != pathlib.Path(tokenizer.name_or_path) and has_tokenizer(own):
            check_tokenizers_agree(tokenizer, read_tokenizer(own))


def completion_ends(config: Any, tokenizer: Any, models: Mapping[str, Any]) -> list[int]:
    """The ids other than EOS that end a completion: whatever ends one of `models`, or a turn."""
    ends = [i for model in models.values() for i in model_ends(model, vocab_of(tokenizer))]
    return ends + (turn_ends(tokenizer) if config.task.chat_template else [])
