"""What the commands of a launch share: their arguments, the list of points they print, one line for a mistake."""

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence

from launch.grid import COMMON, Grid, open_grid
from listopd_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """Arguments of an engine; a mistake is a UserError, not argparse's usage block."""

    def __init__(self, module: str, description: str):
        super().__init__(
            prog=f"python -m {module}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


def grid_parser(module: str, description: str) -> Parser:
    """A parser for the arguments that say which grid and where; engines add theirs."""
    parser = Parser(module, description)
    parser.add_argument(
        "--config", required=True, help="configs/NAME.py[:PRESET]; override with --config.field=value"
    )
    parser.add_argument(
        "--root", required=True, type=pathlib.Path, help="folder of the grid; the same goes on"
    )
    return parser


def parse_grid(parser: Parser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The engine's arguments, and those that describe the grid; UserError for an unknown one."""
    args, overrides = parser.parse_known_args(argv)
    strange = [x for x in overrides if not (x.startswith("--config.") and "=" in x)]
    if strange:
        raise UserError(f"{strange[0]!r} is not known; see {parser.prog} --help")
    return args, [f"--config={args.config}", *overrides]


def checked_config(arguments: Sequence[str]):
    """The checked configuration that `arguments` give; they must stand on the command line of this process."""
    from listopd_jax import main  # registers absl flags: only where they are needed

    return main.parse(["launch", *arguments, "--workdir=not-used"])[0]


def load(args: argparse.Namespace, arguments: Sequence[str], record: bool = True) -> Grid:
    """The grid of a command line, checked and recorded in its folder."""
    return open_grid(args.root, arguments, checked_config(arguments), record)


def positive(text: str) -> int:
    """A whole number above zero, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def list_states(grid: Grid, skip: Iterable[str] = ()) -> None:
    """Print where the common stages and every point stand, on stderr; not those in `skip`."""
    for name in (COMMON, *grid.names):
        if name not in skip:
            print(f"{name}: {grid.state(name)}", file=sys.stderr)


def main(run: Callable[[Sequence[str]], int]) -> int:
    """The exit code of `run` on the command line; a user's mistake is one line and 2."""
    try:
        return run(sys.argv[1:])
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
