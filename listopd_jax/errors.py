"""A user's mistake: the exception, how it is worded, and how a command answers it with one line and exit code 2."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

MOST_TEXT = 1000
"""Characters of a message; of a longer one, its start and its end."""


class UserError(Exception):
    """A mistake the user can fix. The message is one line that names the file or field and the fix.

    What it quotes of a file may hold anything: line ends and control characters are shown as their escapes.
    """

    def __init__(self, message: object = ""):
        super().__init__(shortened(printable(str(message))))


class Interrupted(BaseException):
    """The job stopped early on request with everything saved: main prints the message and exits with 0.

    Not an Exception, like KeyboardInterrupt: a signal may raise it anywhere, and what it cuts short has not failed.
    """


# --- wording ---


def printable(text: str) -> str:
    """The text with unprintable characters escaped: no line ends, no terminal commands."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, most: int = MOST_TEXT) -> str:
    """The text, or its start and its end, where file and fix are, if it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-(most // 2 - 3) :]}"


def did_you_mean(value: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """ "did you mean 'x'? " with the known name closest to `value`; "" if none is as similar as `cutoff` (of 1)."""
    close = difflib.get_close_matches(value, known, n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}? " if close else ""


def unknown_name(field: str, value: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not in a closed set, with the closest one that is."""
    known = tuple(known)
    return UserError(f"{field}={value!r} is unknown; {did_you_mean(value, known)}known: {', '.join(known)}")


def require(condition: bool, message: str) -> None:
    """UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def one_line(e: BaseException) -> str:
    """The message of any exception on one line; the name of its type if it has none."""
    return " ".join(str(e).split()) or type(e).__name__


def first_line(e: BaseException) -> str:
    """The first line of the message of any exception; the name of its type if it has none."""
    return next(iter(str(e).strip().splitlines()), type(e).__name__)


def is_panic(e: BaseException) -> bool:
    """Whether `e` is a panic of a library written in Rust, which is not an Exception."""
    return type(e).__name__ == "PanicException"


# --- commands ---


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError for a mistake instead of printing its usage and exiting."""

    def parse_known_args(self, args=None, namespace=None):
        """argparse's, which reports a missing flag before the misspelt one that was meant."""
        self._given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        """argparse's hook for every mistake in the arguments."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        names = (arg.split("=")[0] for arg in self._given if arg.startswith("--"))
        unknown = next((n for n in names if not any(k.startswith(n) for k in known)), None)
        if unknown and "are required" in message:
            message = f"{unknown} is unknown; {did_you_mean(unknown, known)}{message}"
        raise UserError(f"{message}; see {self.prog} --help")


def positive(text: str) -> int:
    """A whole number of at least 1, as an argparse type."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def denied(path: object) -> str:
    """The message for a path without permission to read it."""
    return f"{path}: permission denied; correct its permissions"


def mistake(e: UserError | PermissionError) -> str:
    """The message of a mistake; a permission error is one wherever it occurs."""
    return denied(e.filename) if isinstance(e, PermissionError) else str(e)


def print_error(text: str) -> None:
    """One line on stderr, in one write, so that output of other threads does not land in it."""
    sys.stderr.write(f"error: {text}\n")
    sys.stderr.flush()


def exit_code(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """The result of `main(argv)` (None: 0); 2 for a UserError, whose line goes to stderr, and 130 for Ctrl-C."""
    try:
        return main(argv) or 0
    except (UserError, PermissionError) as e:
        print_error(mistake(e))
        return 2
    except KeyboardInterrupt:
        return 130


def end_now(code: int) -> NoReturn:
    """End the process with `code`, whatever its other threads do: no exit handler runs, only output is flushed.

    With 1 in place of 0 if output cannot be written; a closed pipe is not a failure.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            pass
        except (OSError, ValueError):  # a full disk, a stream that is closed
            code = code or 1
    os._exit(code)
