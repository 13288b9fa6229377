"""Edits that break files as people and disks do, drawn from a seeded generator: of bytes, of lines, of JSON values."""

import copy
import gzip
import io
import json
import random
import zipfile
from typing import Any

HUGE, DEEP = 10**400, 100
TOKENS = [
    b"", b"\0", b"\n", b"\r", b"\r\n", b" ", b"\t", b",", b'"', b'""', b"'", b"\\", b"{", b"}", b"[", b"]", b":",
    b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"-1", b"0", b"9" * 30, b"9" * 5000, b"1e999", b"NaN", b"null",
    b"true", b"1,234", b"&#39;", b"&#" + b"9" * 5000 + b";", "\u2028\x85\u0663\x0c\x1c".encode(), b".I 1\n", b".W\n",
    b"\x1f\x8b", b"PK\3\4",
]  # fmt: skip
"""What is put into files of bytes: what ends a field, a line or a text elsewhere, and numbers beyond their kind."""

VALUES = [
    None, True, False, 0, 1, -1, 3.0, 0.5, 2**31, 2**64, 10**20, HUGE, 1e308, float("nan"), float("inf"), "", " ", "1",
    "-1", "1,234", "12", "1e3", "inf", "\n", "a\nb", "\x1b[31m", "\0", "\u2028", "\ud800", "\u0663",
    "&#" + "9" * 5000 + ";", [], [1], ["1", 2], [[]], [None], {}, {"1": 2}, {"a": {"b": [1]}}, {"1": 1, "2": 2},
    "smollm3", "llama", "qwen2",
]  # fmt: skip
"""What stands in place of a JSON value."""


def edited(rng: random.Random, data: bytes, most: int = 1) -> bytes:
    """`data` after one to `most` edits."""
    for _ in range(rng.randint(1, most)):
        data = _edited_once(rng, data)
    return data


def _edited_once(rng: random.Random, data: bytes) -> bytes:
    i, j = sorted(rng.randint(0, len(data)) for _ in range(2))
    j = rng.choice((j, min(i + 1, j), min(i + 4, j)))
    changes = {
        "flip": lambda: data[:i] + bytes(b ^ 1 << rng.randrange(8) for b in data[i : i + 1]) + data[i + 1 :],
        "byte": lambda: data[:i] + rng.randbytes(1) + data[i + 1 :],
        "put": lambda: data[:i] + rng.choice(TOKENS) + data[i:],
        "put over": lambda: data[:i] + rng.choice(TOKENS) + data[j:],
        "cut": lambda: data[:i] + data[j:],
        "end": lambda: data[:i],
        "twice": lambda: data[:j] + data[i:],
        "zeros": lambda: data[:i] + bytes(j - i) + data[j:],
    }
    return changes[rng.choice(list(changes))]()


def edited_line(rng: random.Random, data: bytes, separator: bytes | None = None) -> tuple[int, bytes]:
    """The number from 0 of a line, and `data` in which it is changed, gone, there twice or elsewhere."""
    lines = data.splitlines(keepends=True)
    i = rng.randrange(len(lines))
    kind, line = rng.randrange(6), lines[i].rstrip(b"\r\n")
    if kind == 0:
        lines[i] = b""
    elif kind == 1:
        lines[i] *= 2
    elif kind == 2:
        lines.insert(rng.randrange(len(lines)), lines.pop(i))
    elif kind == 3 or separator is None:
        lines[i] = edited(rng, line) + b"\n"
    else:
        fields = line.split(separator)
        fields[rng.randrange(len(fields))] = rng.choice(TOKENS)
        lines[i] = separator.join(fields) + b"\n"
    return i, b"".join(lines)


def edited_value(rng: random.Random, value: Any) -> Any:
    """A JSON value in which one value, at any depth, is another, or a key is gone or has another name."""
    box = [copy.deepcopy(value)]
    container, key = rng.choice(list(_places(box)))
    kind = rng.randrange(5)
    if kind == 0 and container is not box:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[rng.choice(("", "extra", "a\nb", "\ud800", f"{key}s", str(key).upper()))] = container.pop(
            key
        )
    elif kind == 2:
        other, place = rng.choice(list(_places(box)))
        container[key] = copy.deepcopy(other[place])
    else:
        container[key] = drawn_value(rng)
    return box[0]


def drawn_value(rng: random.Random) -> Any:
    """One of VALUES, or nesting deeper than readers agree on."""
    if rng.random() < 0.02:
        return json.loads("[" * DEEP + "]" * DEEP)
    return copy.deepcopy(rng.choice(VALUES))


def _places(value: Any):
    """(container, key or index) of each value in a JSON value."""
    for key, inner in list(value.items()) if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def edited_json(rng: random.Random, text: bytes) -> bytes:
    """A file of one JSON value after an edit of the value, or of the bytes."""
    if rng.random() < 0.2:
        return edited(rng, text)
    return spelled(edited_value(rng, json.loads(text)))


def spelled(value: Any) -> bytes:
    """JSON, and what else Python's writer lets through: NaN, infinities, half of a surrogate pair as an escape."""
    return json.dumps(value).encode()


def packed(rng: random.Random, data: bytes) -> bytes:
    """`data` as it is, gzip or zip."""
    kind = rng.randrange(3)
    if kind == 0:
        return data
    if kind == 1:
        return gzip.compress(data, mtime=0)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED))) as archive:
        archive.writestr(
            zipfile.ZipInfo("data/é.txt"), data, archive.compression
        )  # of no time: the same bytes again
    return out.getvalue()
