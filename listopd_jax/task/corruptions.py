"""Deliberate errors for a teacher: a right JSON answer with one fault, chosen by a seeded generator."""

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

from listopd_jax.errors import UserError, one_line
from listopd_jax.task.protocol import Corruption
from listopd_jax.task.strict_json import dumps, loads

_STRING = re.compile(r'"(?:\\.|[^"\\])*"')
_SHARE = re.compile(r" *([A-Za-z_]\w*):([0-9]*\.?[0-9]+) *")


def parse_noise(text: str) -> tuple[tuple[str, float], ...] | None:
    """(corruption, share) of each entry of `sft.*.noise`, "NAME:SHARE,NAME:SHARE"; None if one is not written so."""
    entries = [_SHARE.fullmatch(entry) for entry in text.split(",") if entry]
    return tuple((entry[1], float(entry[2])) for entry in entries) if all(entries) else None


def json_corruptions(answer: Callable[[Any], str]) -> dict[str, Corruption]:
    """The corruptions of any task whose right answers, `answer(record)`, are JSON texts.

    wrong_field renames a key, wrong_digit changes a number, missing_field drops the last field of an object,
    unclosed_string leaves out the quote that closes a string. An answer without such a place stays right; one that is
    not JSON is a UserError.
    """
    changes = (wrong_field, wrong_digit, missing_field, unclosed_string)
    return {change.__name__: _of_records(change, answer) for change in changes}


def _of_records(change: Callable[[str, random.Random], str], answer: Callable[[Any], str]) -> Corruption:
    """A change of JSON texts as one of records."""

    def corruption(record: Any, rng: random.Random) -> str:
        text, name = answer(record), change.__name__
        try:
            return change(text, rng)
        except ValueError as e:
            raise UserError(
                f"{record.key}: {name} cannot break its right answer ({one_line(e)}); correct the answer, or leave "
                f"{name} out of sft.*.noise"
            ) from e

    return corruption


def wrong_field(text: str, rng: random.Random) -> str:
    """One key has an s at its end, in its place."""
    value = loads(text)
    if objects := [o for o in _containers(value) if isinstance(o, dict) and o]:
        chosen = rng.choice(objects)
        name = rng.choice(list(chosen))
        renamed = {f"{key}s" if key == name else key: inner for key, inner in chosen.items()}
        # In place, since `chosen` is inside `value`; all of it, or the renamed key would move to the end.
        chosen.clear()
        chosen.update(renamed)
    return dumps(value)


def wrong_digit(text: str, rng: random.Random) -> str:
    """One number is larger by 1 to 9; one of 2^53 and beyond, where float64 may not show that, changes sign."""
    box = [loads(text)]  # so that a bare number has a place too
    if places := [(c, key) for c in _containers(box) for key, inner in _items(c) if _is_number(inner)]:
        container, key = rng.choice(places)
        number, more = container[key], rng.randint(1, 9)
        container[key] = number + more if abs(number) < 2**53 else -number
    return dumps(box[0])


def missing_field(text: str, rng: random.Random) -> str:
    """One object lacks its last field."""
    value = loads(text)
    if objects := [o for o in _containers(value) if isinstance(o, dict) and o]:
        rng.choice(objects).popitem()
    return dumps(value)


def unclosed_string(text: str, rng: random.Random) -> str:
    """One string lacks the quote that closes it."""
    ends = [found.end() for found in _STRING.finditer(text)]
    if not ends:
        return text
    end = rng.choice(ends)
    return text[: end - 1] + text[end:]


def _containers(value: Any) -> Iterator[dict[str, Any] | list[Any]]:
    """The objects and lists in a JSON value, itself first."""
    if isinstance(value, dict | list):
        yield value
        for _, inner in _items(value):
            yield from _containers(inner)


def _items(container: dict[str, Any] | list[Any]) -> list[tuple[Any, Any]]:
    return list(container.items() if isinstance(container, dict) else enumerate(container))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
