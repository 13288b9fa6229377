"""Shared by the commands of a launch: their arguments, and the list of points that they print."""

import argparse
import pathlib
import sys
from collections.abc import Iterable, Sequence

from launch.grid import COMMON, Grid, open_grid
from listopd_jax.errors import Parser, UserError


def parser(module: str, description: str) -> Parser:
    """A parser for the arguments of `module`, whose docstring is `description`."""
    return Parser(
        prog=f"python -m {module}", description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def grid_parser(module: str, description: str) -> Parser:
    """A parser for the arguments that say which grid and where; engines add theirs."""
    engine = parser(module, description)
    engine.add_argument(
        "--config", required=True, help="configs/NAME.py[:PRESET]; override with --config.field=value"
    )
    engine.add_argument(
        "--root", required=True, type=pathlib.Path, help="folder of the grid; the same folder resumes"
    )
    return engine


def parse_grid(engine: Parser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The engine's arguments, and those that describe the grid; UserError for an unknown one."""
    args, overrides = engine.parse_known_args(argv)
    strange = [x for x in overrides if not (x.startswith("--config.") and "=" in x)]
    if strange:
        raise UserError(f"{strange[0]!r} is not known; see {engine.prog} --help")
    return args, [f"--config={args.config}", *overrides]


def checked_config(arguments: Sequence[str]):
    """The checked configuration that `arguments` give; they must be on the command line of this process."""
    from listopd_jax import main  # registers absl flags: only where they are needed

    return main.parse(["launch", *arguments, "--workdir=not-used"])[0]


def load(args: argparse.Namespace, arguments: Sequence[str], record: bool = True) -> Grid:
    """The grid of a command line, checked and recorded in its folder."""
    return open_grid(args.root, arguments, checked_config(arguments), record)


def list_states(grid: Grid, skip: Iterable[str] = ()) -> None:
    """Print the state of the common stages and of every point, on stderr; not those in `skip`."""
    for name in (COMMON, *grid.names):
        if name not in skip:
            print(f"{name}: {grid.state(name)}", file=sys.stderr)


def last_line(said: object) -> str:
    """The last line of what a program or an exception said."""
    return (str(said).strip().splitlines() or ["no reason given"])[-1]
