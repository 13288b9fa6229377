"""JSON as RFC 7493 has it (I-JSON): what all readers agree on, and nothing else."""

import json
import math
import sys
from typing import Any

MAX_DEPTH = 64
"""Levels of nesting: what is deeper is an attack or a loop of a model."""


def loads(text: str) -> Any:
    """The value of a JSON text.

    Raises ValueError, one line: not JSON, a key twice in one object, NaN or Infinity, a number beyond float64, half of
    a surrogate pair, or nesting beyond MAX_DEPTH.
    """
    try:
        value = json.loads(
            text,
            parse_constant=_refuse,
            parse_float=_float,
            parse_int=_integer,
            object_pairs_hook=unique_keys,
        )
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON: {e.msg} at character {e.pos + 1}") from e
    except RecursionError as e:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from e
    _check(value)
    return value


def dumps(value: Any) -> str:
    """The compact JSON text of a value: what SFT trains on."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal as JSON: 1 is 1.0, but true is not 1; the order of keys does not matter."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` that refuses a key twice in one object: ValueError."""
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"the key {key[:40]!r} appears twice in one object")
        fields[key] = value
    return fields


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:20]} is out of range")
    return value


def _integer(text: str) -> int:
    # By length first: float64 ends at 309 digits, and int() itself refuses more than 4,300.
    if len(text) > 400 or abs(value := int(text)) > sys.float_info.max:
        raise ValueError(f"the number {text[:20]} is out of range")
    return value


def _check(value: Any) -> None:
    """ValueError for nesting beyond MAX_DEPTH, and for text that has no UTF-8 form."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        _check_texts(level)
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _inside(outer)]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def _inside(value: dict[str, Any] | list[Any]) -> list[Any]:
    return [*value, *value.values()] if isinstance(value, dict) else value


def _check_texts(values: list[Any]) -> None:
    for text in values:
        if isinstance(text, str) and not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError("a text has half of a surrogate pair, which has no UTF-8 form")
