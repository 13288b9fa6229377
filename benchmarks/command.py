"""What the benchmark commands share: a mistake in the flags is one line on stderr and exit code 2."""

import argparse
import sys
from collections.abc import Callable, Sequence

from listopd_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError instead of printing its usage and leaving."""

    def error(self, message: str):
        """argparse's hook for every mistake in the arguments."""
        raise UserError(f"{message}; --help lists the flags")


def positive(text: str) -> int:
    """A whole number of at least 1, as an argparse type."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def exit_code(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Run `main(argv)`; 0, or 2 with the line of a UserError on stderr."""
    try:
        main(argv)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
