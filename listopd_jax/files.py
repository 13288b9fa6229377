"""Small files written whole or not at all: a reader never meets a half-written result, even after kill -9."""

import hashlib
import json
import os
import pathlib
import tempfile
from typing import IO, Any

from listopd_jax.errors import UserError

_on_process_0 = True


def run_on_process_0(yes: bool) -> None:
    """Say whether this process is process 0 (parallel/hosts.py does): of many, only that one writes."""
    global _on_process_0
    _on_process_0 = yes


def on_process_0() -> bool:
    """Whether this process writes; true until it is told otherwise."""
    return _on_process_0


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically: temporary file, fsync, rename. Only process 0 writes.

    Raises UserError if the folder cannot be written (full disk, read-only).
    """
    if not _on_process_0:
        return
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as f:
            _write_and_rename(f, path, text)
    except OSError as e:
        raise UserError(
            f"{path}: cannot be written ({e.strerror or e}); free space or choose another --workdir"
        ) from e


def _write_and_rename(f: IO[str], path: pathlib.Path, text: str) -> None:
    """Make the open temporary file `f` into `path`; it is removed if that fails or is interrupted."""
    try:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
        os.chmod(f.name, 0o666 & ~_umask())  # NamedTemporaryFile makes files that only their owner can read
        os.replace(f.name, path)
    except BaseException:
        pathlib.Path(f.name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinities are refused (they are not JSON)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def json_sha256(value: Any, **form: Any) -> str:
    """SHA-256 of `value` as JSON with sorted keys; `form` is json.dumps's: another form has another digest."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, **form).encode()).hexdigest()


def sha256(path: pathlib.Path) -> str:
    """SHA-256 of a file, read in pieces; UserError if it cannot be read."""
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from e


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file; UserError if it is missing or broken."""
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file") from e
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not readable as JSON ({e}); restore it, or choose another --workdir") from e
