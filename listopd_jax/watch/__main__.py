"""Watch a run, or all runs under a folder, in a browser.

    python -m listopd_jax.watch runs/demo          # a workdir
    python -m listopd_jax.watch runs               # every workdir below, or the --root of a launch

Serves one page on this machine's loopback until Ctrl-C. It only reads. From another machine:
ssh -L 8765:127.0.0.1:8765 HOST.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from listopd_jax.errors import Parser, UserError, exit_code
from listopd_jax.watch.server import Server


def main(argv: Sequence[str]) -> None:
    """Serve until interrupted; UserError for a folder that is not there or a port that is taken."""
    parser = Parser(
        prog="python -m listopd_jax.watch", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("root", type=pathlib.Path, help="a workdir, or a folder with some below it")
    parser.add_argument("--port", type=int, default=8765, help="default 8765; 0: a free one")
    args = parser.parse_args(argv)
    if not args.root.is_dir():
        raise UserError(
            f"{args.root}: no such folder; give the --workdir of a run, or a folder with some below it"
        )
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port={args.port}: must be from 0 to 65535")
    with Server(args.root, args.port) as server:
        print(f"{args.root}: {server.url} (Ctrl-C stops it)", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
