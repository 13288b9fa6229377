"""Records to training and validation, so that no prompt is on both sides."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from listopd_jax.errors import UserError

SIDES = ("train", "validation")
ROLES = ("system", "user", "assistant", "tool")
FEW = 50


def split_records(
    records: Sequence[Any],
    sides: Sequence[str | None],
    groups: Sequence[str],
    share: float,
    max_records: int,
    seed: int,
) -> dict[str, list[Any]]:
    """The records by side, in a random order that `seed` decides.

    Args:
      sides: of SIDES for each record where the file says, else all None: then a random `share` of the groups is
        held out.
      groups: what each record belongs to: its prompt, or whatever else would leak from one side to the other.
      max_records: of both sides together, 0 for all.

    Raises UserError: a group is on both sides; a side is empty.
    """
    members = defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    names = list(members)
    order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    held_out = min(max(1, round(share * len(order))), len(order) - 1)
    split: dict[str, list[Any]] = {side: [] for side in SIDES}
    for i, group in enumerate(order):
        side = _one_side(records, sides, members[group]) if any(sides) else SIDES[i < held_out]
        split[side] += [records[row] for row in members[group]]
    for side, part in split.items():
        if not part:
            raise UserError(f"no record is for {side}; at least 2 different prompts are needed")
    return _at_most(split, max_records, share)


def few(split: Mapping[str, Sequence[Any]], noun: str) -> list[str]:
    """A note for each side with fewer than FEW of what is called `noun`."""
    advice = {"train": "expect overfitting", "validation": "intervals will be wide"}
    return [
        f"only {len(part)} {side} {noun}: {advice[side]}" for side, part in split.items() if len(part) < FEW
    ]


def notes(split: Mapping[str, Sequence[Any]], unanswered: int) -> list[str]:
    """Notes on the split for the reader."""
    return few(split, "records") + (
        [f"{unanswered} training records have no answer: SFT leaves them out"] if unanswered else []
    )


def check_key(record: Any, task: str) -> None:
    """UserError unless the record of a task has a text as its key."""
    if not isinstance(key := getattr(record, "key", None), str):
        raise UserError(
            f"task {task}: the key of a record is {key!r}; give each record a unique text as `key`"
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


def _one_side(records: Sequence[Any], sides: Sequence[str | None], rows: Sequence[int]) -> str:
    """The side of all `rows`, which are of one group; UserError if they have two."""
    first = rows[0]
    for row in rows:
        if sides[row] != sides[first]:
            raise UserError(
                f"{records[row].key}: is for {sides[row]}, but its prompt is that of {records[first].key}, which is "
                f"for {sides[first]}: results would leak; put both on one side"
            )
    return sides[first]


def _at_most(split: dict[str, list[Any]], most: int, share: float) -> dict[str, list[Any]]:
    if not most:
        return split
    held_out = min(max(1, round(share * most)), most - 1)
    # The order is random already, so the first ones are a random choice.
    return {"train": split["train"][: most - held_out], "validation": split["validation"][:held_out]}
