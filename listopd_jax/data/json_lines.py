"""Records of a file of JSON lines, whatever is wrong with it: each mistake is one line that names file and line."""

import os
from collections.abc import Iterator
from typing import Any

from listopd_jax.data.streams import read_lines
from listopd_jax.errors import UserError
from listopd_jax.task.strict_json import loads


def read_objects(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank; the file may be gzip or zip.

    Raises UserError: a line is not UTF-8, not strict JSON or no object; the file holds none.
    """
    number, found = 0, False
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        found = True
        yield number, read_object(line, f"{path}:{number}")
    if not found:
        raise UserError(f"{path}: is empty; give one JSON object per line")


def read_object(line: bytes, where: str) -> dict[str, Any]:
    """The object of one line; UserError, which begins with `where`, for anything else."""
    try:
        value = loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: not UTF-8 at byte {e.start + 1}; save the file as UTF-8") from e
    except ValueError as e:
        raise UserError(f"{where}: {e}; each line must be one JSON object") from e
    if not isinstance(value, dict):
        raise UserError(
            f"{where}: is {type(value).__name__}, not an object; each line must be one JSON object"
        )
    return value
