"""Files and folders written whole or not at all: a reader never meets a half-written result, even after kill -9."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from listopd_jax.errors import UserError, denied

_on_process_0 = True


def run_on_process_0(yes: bool) -> None:
    """Say whether this process is process 0 (parallel/hosts.py does): of many, only that one writes."""
    global _on_process_0
    _on_process_0 = yes


def on_process_0() -> bool:
    """Whether this process writes; true unless `run_on_process_0` said otherwise."""
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
        raise not_written(path, e) from e


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


def not_written(path: str | os.PathLike, e: Exception, instead: str = "another --workdir") -> UserError:
    """The error for a file or folder that cannot be written: free space, or choose `instead`."""
    reason = getattr(e, "strerror", None) or e
    return UserError(f"{path}: cannot be written ({reason}); free space or choose {instead}")


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike, replace: bool = True) -> Iterator[pathlib.Path]:
    """A new folder to fill inside; at the end it is on disk and takes the name `folder`, unless the block failed.

    What stood there is removed. With `replace=False` anything but an empty folder stays: an OSError. OSErrors are for
    the caller to word (`not_written`).
    """
    folder = pathlib.Path(folder)
    temporary = _beside(folder)
    try:
        yield temporary
        _finish(temporary)
        if replace and folder.exists():
            retired = _beside(folder)
            os.replace(folder, retired)
            os.replace(temporary, folder)
            shutil.rmtree(retired)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(folder: pathlib.Path) -> pathlib.Path:
    """An empty hidden folder next to `folder`, on the same disk."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    made.chmod(0o777 & ~_umask())  # mkdtemp makes folders that only their owner can read
    return made


def _finish(folder: pathlib.Path) -> None:
    """Put every file under `folder` on disk, readable for whom the umask says; what links point to is left alone.

    Libraries that write by way of a temporary file leave files that only their owner can read (safetensors from 0.8).
    """
    readable = 0o666 & ~_umask()
    for place, _, names in os.walk(folder):
        for path in (pathlib.Path(place) / name for name in names):
            if not path.is_symlink():
                path.chmod(path.stat().st_mode | readable)
                with open(path, "rb") as f:
                    os.fsync(f.fileno())


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinities are refused (they are not JSON)."""
    write_text(path, _text(value))


def _text(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def json_sha256(value: Any, **form: Any) -> str:
    """SHA-256 of `value` as JSON with sorted keys; `form`: options of json.dumps, which change the digest."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, **form).encode()).hexdigest()


def sha256(path: pathlib.Path) -> str:
    """SHA-256 of a file, read in pieces; UserError if it cannot be read."""
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from e


def read_json(path: str | os.PathLike, fix: str = "restore it, or choose another --workdir") -> Any:
    """Read a JSON file; UserError if it is missing, or broken, which `fix` cures.

    What `write_json` would not write again is broken: NaN, infinities, half of a surrogate pair, nesting without end.
    """
    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        _text(value).encode()
        return value
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file") from e
    except PermissionError as e:
        raise UserError(denied(path)) from e
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: not readable as JSON ({e}); {fix}") from e
