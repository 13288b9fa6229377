"""Lines of a file that may be plain, gzip or zip, and may be broken: each failure is one line to the user."""

import contextlib
import gzip
import io
import lzma
import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Iterator

from tqdm import tqdm

from listopd_jax.errors import UserError

MAX_LINE = 1 << 26
"""Bytes: no line of a review file is longer, so one that is would only fill the memory."""

_OTHER_FORMATS = (
    (257, b"ustar", "a tar archive", "unpack it"),
    (0, b"\x1f\x8b", "packed twice", "unpack it"),
    (0, b"PK\x03\x04", "packed twice", "unpack it"),
    (0, b"BZh", "a bzip2 file", "unpack it"),
    (0, b"\xfd7zXZ", "an xz file", "unpack it"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it"),
    (0, b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (0, b"PAR1", "a Parquet file", "write it as JSON lines or CSV"),
    (0, b"\xff\xfe", "UTF-16 text", "write it as UTF-8"),
    (0, b"\xfe\xff", "UTF-16 text", "write it as UTF-8"),
    (0, b"version https://git-lfs", "a Git LFS pointer", "fetch the file itself"),
    (0, b"<!doctype", "a web page", "download the file itself"),
    (0, b"<html", "a web page", "download the file itself"),
)
"""(offset, first bytes, what it is, what to do) of files that people have in place of reviews."""


def read_lines(path: str | os.PathLike) -> Iterator[bytes]:
    """Yield the file's lines one at a time, with a progress bar over its bytes.

    The kind of compression is read from the file's first bytes, not from its name.

    Raises:
      UserError: the file is missing, a folder, unreadable, a broken or truncated archive, an archive of
        several files, of a format that is not text, packed or not, or has a line above `MAX_LINE`.
    """
    path = pathlib.Path(path)
    with _readable(path), open(path, "rb") as raw, _decompressed(raw, path) as stream:
        _refuse_other_formats(stream.peek(512)[:512], path)
        size = os.fstat(raw.fileno()).st_size
        # In compressed bytes, of which the total is known. disable=None: a bar on terminals alone.
        with tqdm(
            total=size, desc=f"reading {path.name}", unit="B", unit_scale=True, leave=False, disable=None
        ) as bar:
            for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE), b""), 1):
                if len(line) == MAX_LINE:
                    raise UserError(
                        f"{path}: line {number} is longer than {MAX_LINE} bytes; is this a file of reviews?"
                    )
                if number % 4096 == 0:
                    bar.update(raw.tell() - bar.n)
                yield line


def read_text_lines(path: str | os.PathLike) -> Iterator[tuple[str, str]]:
    """(where, line without its end) of each line of `read_lines`, UTF-8; a mark of byte order is passed over.

    UserError, as `read_lines` raises it, and for a line that is not UTF-8.
    """
    for number, line in enumerate(read_lines(path), 1):
        where = f"{path}:{number}"
        try:
            yield where, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as e:
            raise UserError(f"{where}: not UTF-8 at byte {e.start + 1}; save the file as UTF-8") from e


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    """Turn what goes wrong while a file is read into a UserError that names it."""
    try:
        yield
    # First, because it is an OSError, too.
    except gzip.BadGzipFile as e:
        raise _damaged(path, e) from e
    except FileNotFoundError as e:
        raise UserError(
            f"{path}: no such file; set data.path (or data.meta_path, data.labels) to an existing one"
        ) from e
    except IsADirectoryError as e:
        raise UserError(f"{path}: is a folder; name the file in it") from e
    except (EOFError, ValueError, struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as e:
        raise _damaged(path, e) from e
    except (NotImplementedError, RuntimeError) as e:  # zipfile: unknown compression, password
        raise UserError(
            f"{path}: this kind of zip file cannot be read ({e}); unpack it and name the file inside"
        ) from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from e


def _damaged(path: pathlib.Path, e: Exception) -> UserError:
    return UserError(f"{path}: truncated or damaged archive ({e}); download it again")


def _decompressed(raw: io.BufferedReader, path: pathlib.Path) -> io.BufferedIOBase:
    magic = raw.read(4)
    raw.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.open(raw)
    if magic == b"PK\x03\x04":
        archive = zipfile.ZipFile(raw)
        return archive.open(_sole_member(archive, path))
    return raw


def _refuse_other_formats(head: bytes, path: pathlib.Path) -> None:
    for offset, magic, what, fix in _OTHER_FORMATS:
        if head[offset:].lower().startswith(magic.lower()):
            raise UserError(f"{path}: is {what}; {fix}, and name that file")


def _sole_member(archive: zipfile.ZipFile, path: pathlib.Path) -> zipfile.ZipInfo:
    members = [m for m in archive.infolist() if not m.is_dir() and not m.filename.startswith("__MACOSX/")]
    if len(members) != 1:
        raise UserError(
            f"{path}: holds {len(members)} files where one is expected; unpack it and name the right one"
        )
    return members[0]
