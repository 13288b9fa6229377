"""Records to training and validation, so that no prompt stands on both sides."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from listopd_jax.errors import UserError
from listopd_jax.task.protocol import Task

SIDES = ("train", "validation")
ROLES = ("system", "user", "assistant", "tool")
FEW_RECORDS = 50


def split_records(
    task: Task, records: Sequence[Any], sides: Sequence[str | None], share: float, max_records: int, seed: int
) -> dict[str, list[Any]]:
    """The records by side, in a random order that `seed` decides.

    Args:
      sides: of SIDES for each record where the file says, else all None: then a random `share` of the prompts is
        held out, with all records of each.
      max_records: of both sides together, 0 for all.

    Raises UserError: two records have one key; a prompt is none; a prompt stands on both sides; a side is empty.
    """
    groups = _by_prompt(task, records)
    order = [list(groups)[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    side_of = dict(zip((r.key for r in records), sides, strict=True))
    if any(sides):
        chosen = {name: _whole_side(groups[name], side_of) for name in order}
    else:
        held_out = min(max(1, round(share * len(order))), len(order) - 1)
        chosen = {name: SIDES[i < held_out] for i, name in enumerate(order)}
    split = {side: [r for name in order if chosen[name] == side for r in groups[name]] for side in SIDES}
    for side, part in split.items():
        if not part:
            raise UserError(f"{task.name}: no record is for {side}; at least 2 different prompts are needed")
    return _at_most(split, max_records, share)


def notes(split: Mapping[str, Sequence[Any]], unanswered: int) -> list[str]:
    """What a reader should know of the split."""
    advice = {"train": "expect overfitting", "validation": "intervals will be wide"}
    found = [
        f"only {len(part)} {side} records: {advice[side]}"
        for side, part in split.items()
        if len(part) < FEW_RECORDS
    ]
    return found + (
        [f"{unanswered} training records have no answer: SFT leaves them out"] if unanswered else []
    )


def check_prompt(prompt: Any, where: str) -> None:
    """UserError unless `prompt` is a text, or messages with a role and a text whose last is not the assistant's."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError(f"{where}: the prompt is empty; give it a text")
        return
    if not isinstance(prompt, list | tuple) or not prompt:
        raise UserError(f"{where}: a prompt is a text or a list of messages; this is {type(prompt).__name__}")
    for i, message in enumerate(prompt):
        _check_message(message, f"{where}: messages[{i}]")
    if prompt[-1]["role"] == "assistant":
        raise UserError(f"{where}: the last message is the assistant's; move it to 'answer'")


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise UserError(f'{where}: a message is {{"role": …, "content": …}}; correct it')
    if message["role"] not in ROLES:
        raise UserError(f"{where}: role is {message['role']!r}; known: {', '.join(ROLES)}")
    if not isinstance(message["content"], str) or not message["content"].strip():
        raise UserError(f"{where}: content must be a text that is not empty; correct it")


def _by_prompt(task: Task, records: Sequence[Any]) -> dict[str, list[Any]]:
    """The records of each prompt, in their order."""
    groups, keys = defaultdict(list), set()
    for record in records:
        if record.key in keys:
            raise UserError(f"{task.name}: two records have the key {record.key!r}; give each its own")
        keys.add(record.key)
        prompt = task.prompt(record)
        check_prompt(prompt, record.key)
        groups[json.dumps(prompt)].append(record)
    return groups


def _whole_side(group: Sequence[Any], side_of: Mapping[str, str | None]) -> str:
    first = group[0]
    for other in group:
        if side_of[other.key] != side_of[first.key]:
            raise UserError(
                f"{other.key}: is for {side_of[other.key]}, but its prompt is that of {first.key}, which is for "
                f"{side_of[first.key]}: results would leak; put both on one side"
            )
    return side_of[first.key]


def _at_most(split: dict[str, list[Any]], most: int, share: float) -> dict[str, list[Any]]:
    if not most:
        return split
    held_out = min(max(1, round(share * most)), most - 1)
    return {"train": split["train"][: most - held_out], "validation": split["validation"][:held_out]}
