"""Whether a task keeps the protocol (task/protocol.py): checked on a few records when a job opens, not after SFT."""

import math
import numbers
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from listopd_jax.data.splits import check_key, check_prompt
from listopd_jax.errors import UserError, did_you_mean, require, shortened
from listopd_jax.records import taken_names
from listopd_jax.stages.job import ROLES, known_noise
from listopd_jax.task.contract import OK, TOKEN_CLASSES, Parsed
from listopd_jax.task.metrics import METRICS
from listopd_jax.task.protocol import Splits, Task


def check_task(task: Task, splits: Splits, config: Any) -> None:
    """UserError, which names the task's file, for what would stop its run later or damage its records.

    Every key and answer is looked at; prompt, verdicts, scores and token classes of one record of each side; hint and
    the config's noise only for training records, which alone get them.
    """
    who = f"task.file={config.task.file}" if config.task.file else f"task {task.name}"
    _check_names(task, who)
    noise = {name for role in ROLES for name, _ in known_noise(task, config.sft[role])}
    for side, records in (("train", splits.train), ("validation", splits.validation)):
        require(len(records) > 0, f"{who}: no record is for {side}")
        for record in records:
            check_key(record, task.name)
            if (right := task.answer(record)) is not None:
                _check_text(right, f"{who}: {record.key}: answer")
        record = next((r for r in records if task.answer(r) is not None), records[0])
        check_prompt(task.prompt(record), f"{who}: {record.key}")
        _check_verdicts(task, record, f"{who}: {record.key}")
        for name in noise if side == "train" and task.answer(record) is not None else ():
            broken = task.corruptions[name](record, random.Random(0))
            _check_text(broken, f"{who}: {record.key}: corruption {name!r}")
    _check_text(task.hint(splits.train), f"{who}: hint")


def _check_names(task: Task, who: str) -> None:
    """UserError unless metrics and failures are distinct names, free in records, and the mappings are dicts."""
    for field, example in (("corruptions", "{'one_more': self.one_more}"), ("settings", "{'digits': 2}")):
        named = getattr(task, field)
        fits = isinstance(named, Mapping) and all(isinstance(name, str) for name in named)
        if fits and field == "corruptions":
            fits = all(map(callable, named.values()))
        require(fits, f"{who}: {field} is {named!r}; write a dict as in {example}, or {{}} for none")
    for field in ("metrics", "failures"):
        names = getattr(task, field)
        fits = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        require(
            fits and len(set(names)) == len(names),
            f"{who}: {field} is {names!r}; write a tuple of different names, as in ('useful',)",
        )
    require(
        "useful" in task.metrics, f"{who}: metrics lacks 'useful', by which policies are compared; add it"
    )
    for field, free in (("metrics", METRICS), ("settings", ("gain",))):
        if taken := sorted((taken_names() - set(free)) & set(getattr(task, field))):
            raise UserError(
                f"{who}: {field} has {taken[0]!r}, which every record has already; call it otherwise"
            )


def _check_verdicts(task: Task, record: Any, who: str) -> None:
    """UserError unless a right, an empty and a failed answer get a verdict and a score, and tokens a class."""
    right = task.answer(record)
    _check_classes(task, [*("1" if right is None else right), ""], who)
    texts = {"an empty text": ""} | ({} if right is None else {"its answer": right})
    verdicts = {what: task.parse(text, record) for what, text in texts.items()}
    for what, parsed in verdicts.items():
        require(
            isinstance(parsed, Parsed) and isinstance(parsed.failure, str),
            f"{who}: parse of {what} gives {parsed!r}; return Parsed('ok', value) or Parsed('a_failure')",
        )
    failed = Parsed(next((name for name in task.failures if name != OK), "failed"))
    for what, parsed in {**verdicts, "a failed answer": failed}.items():
        _check_score(task.score(parsed, record), task.metrics, f"{who}: score of {what}")


def _check_classes(task: Task, pieces: list[str], who: str) -> None:
    """UserError unless each piece of an answer gets a class: a list of another length could broadcast silently."""
    classes = task.token_classes(list(pieces))
    known, fits = range(len(TOKEN_CLASSES)), isinstance(classes, list | tuple | np.ndarray)
    whole = fits and all(isinstance(c, int | np.integer) and not isinstance(c, bool) for c in classes)
    require(
        whole and len(classes) == len(pieces) and all(c in known for c in classes),
        f"{who}: token_classes of {len(pieces)} pieces gives {shortened(repr(classes), 80)}; return one index into "
        "contract.TOKEN_CLASSES for each",
    )


def _check_score(score: Any, metrics: Sequence[str], where: str) -> None:
    """UserError unless a score maps some of the metrics to numbers; NaN stands for an undefined one."""
    if not isinstance(score, Mapping):
        raise UserError(f"{where} is {score!r}; return a dict, metric → number")
    for name, value in score.items():
        if name not in (*metrics, "parse"):
            close = did_you_mean(name, metrics) if isinstance(name, str) else ""
            raise UserError(f"{where} has {name!r}, which metrics lacks; {close}add it there")
        try:
            finite = isinstance(value, numbers.Real | np.bool_) and not math.isinf(float(value))
            shown = repr(value)
        except OverflowError:
            finite, shown = False, "beyond float64"  # Python may refuse to write so many digits
        require(
            finite,
            f"{where} has {name!r}: {shown}, which is not a finite number; leave out what is undefined",
        )


def _check_text(text: Any, where: str) -> None:
    require(isinstance(text, str), f"{where} is {text!r}; return a text")
