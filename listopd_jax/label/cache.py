"""Paid replies, one JSON line each: on disk before they count, so that none is paid for twice."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from listopd_jax import files
from listopd_jax.data.json_lines import read_object
from listopd_jax.errors import UserError
from listopd_jax.label.judges import Reply, Settings
from listopd_jax.label.questions import Question

FORMAT = 1
"""Part of the digest: raise it when the same settings and question are sent in another form."""
START = b'{"request": "'
"""How every line starts: an unfinished line that starts otherwise is not a reply cut off by a kill."""


def digest(settings: Settings, question: Question) -> str:
    """SHA-256 of all that decides a reply: judge, settings, rubric and review."""
    return files.json_sha256([FORMAT, dataclasses.asdict(settings), question.system, question.text])


class Cache:
    """Replies by digest. Made by `open_cache`."""

    def __init__(self, path: pathlib.Path, file: Any):
        self._path, self._file = path, file
        self.replies = _read(path, file)

    def put(self, key: str, of: str, reply: Reply) -> None:
        """Keep the reply to the question with digest `of` about the review `key`. UserError if it cannot be written.

        Half of a surrogate pair, which JSON can spell and UTF-8 cannot, becomes `?`: the line could not be read again.
        """
        if reply.text is not None:
            reply = dataclasses.replace(reply, text=reply.text.encode("utf-8", "replace").decode())
        line = json.dumps({"request": of, "key": key, **dataclasses.asdict(reply)})
        try:
            self._file.write(f"{line}\n".encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as e:
            raise files.not_written(self._path, e, "another --out or --cache") from e
        self.replies[of] = reply


@contextlib.contextmanager
def open_cache(path: pathlib.Path) -> Iterator[Cache]:
    """The cache in a file, made if absent and locked against other processes.

    Raises UserError: the file cannot be written, is in use, or has a line that is not a reply; it then stays as it is.
    The rest of a line that was cut off by a kill is dropped.
    """
    found = os.path.lexists(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab+")
    except OSError as e:
        raise files.not_written(path, e, "another --out or --cache") from e
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(
                f"{path}: another process writes replies there; wait for it or choose another --cache"
            ) from e
        cache = Cache(path, file)
        try:
            yield cache
        finally:
            if not cache.replies and not found:
                # Nothing was asked, as with --estimate: no empty file is left.
                path.unlink()


def _read(path: pathlib.Path, file: Any) -> dict[str, Reply]:
    """The replies in an open file, whose last line is ended, or cut off if it is the start of a reply."""
    replies, line, torn = {}, b"\n", b""
    file.seek(0)
    for number, line in enumerate(file, 1):
        try:
            replies |= [_reply(line, f"{path}:{number}")] if line.strip() else []
        except UserError:
            if line.endswith(b"\n") or not line.startswith(START[: len(line)]):
                raise
            torn = line
    # All lines were looked at: from here on the file is ours to change.
    if torn:
        file.truncate(file.seek(0, os.SEEK_END) - len(torn))
    elif not line.endswith(b"\n"):
        file.write(b"\n")
    return replies


def _reply(line: bytes, where: str) -> tuple[str, Reply]:
    """Digest and reply of a line; UserError if it has none."""
    row = read_object(line, where)
    of, text = row.get("request"), row.get("text", 0)
    tokens = [row.get(f"tokens_{way}") for way in ("in", "out")]
    if not (isinstance(of, str) and isinstance(text, str | None) and all(type(n) is int for n in tokens)):
        raise UserError(f"{where}: is not a reply of a judge; delete the line, or choose another --cache")
    return of, Reply(text, *tokens)
