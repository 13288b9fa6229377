"""Write the report of a workdir again, with other runs next to it if there are any.

python -m listopd_jax.report runs/plain --beside runs/guard [--out=FILE]
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from listopd_jax import files
from listopd_jax.errors import Parser, UserError, exit_code
from listopd_jax.report.inputs import read_inputs
from listopd_jax.report.write import REPORT, render


def main(argv: Sequence[str]) -> None:
    """Write the page and say where; UserError for a folder that holds no run."""
    parser = Parser(
        prog="python -m listopd_jax.report", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--beside", nargs="+", type=pathlib.Path, default=[], help="workdirs of other runs")
    parser.add_argument("--out", type=pathlib.Path, help=f"default: WORKDIR/{REPORT}")
    args = parser.parse_args(argv)
    others = {folder.resolve().name: read_inputs(folder) for folder in args.beside}
    if len(others) < len(args.beside):
        raise UserError("--beside: two folders have one name; rename one, or link to it")
    inputs = dataclasses.replace(read_inputs(args.workdir), beside=others)
    out = args.out or args.workdir / REPORT
    files.write_text(out, render(inputs))
    print(out)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
