"""python -m launch.local --root=runs/grid --processes=2 --config=configs/fashion.py:tiny --config.opd.lambdas=1.0,1.2

Run a grid as processes of this machine: the common stages, then --processes points at a time. What is done is left
alone; what failed or was stopped runs again. Each run's output is in ROOT/logs.

Ctrl-C and SIGTERM let every run save and stop; the same command resumes. Exit code 0: all done; 1: some failed;
2: a mistake to fix; 130 or 143: stopped.
"""

import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from launch import cli
from launch.grid import COMMON, Grid
from launch.point import appended, terminating
from listopd_jax.errors import exit_code, positive


def main(argv: Sequence[str]) -> int:
    """Parse, run the common stages, run the points."""
    parser = cli.grid_parser("launch.local", __doc__)
    parser.add_argument("--processes", type=positive, default=1, help="points at one time; default 1")
    args, arguments = cli.parse_grid(parser, argv)
    grid = cli.load(args, arguments)
    cli.list_states(grid)
    logs = grid.root / "logs"
    code = 0 if grid.done(COMMON) else run_all(_commands(grid, [COMMON]), 1, logs)
    if code == 0:
        code = run_all(_commands(grid, grid.pending()), args.processes, logs)
    cli.list_states(grid, skip=[name for name in (COMMON, *grid.names) if grid.done(name)])
    if code == 0:
        print(f"all {len(grid.points)} points are done: python -m launch.gather --root={args.root}")
    return code


def _commands(grid: Grid, names: Sequence[str]) -> dict[str, list[str]]:
    return {name: grid.point_command(name, sys.executable) for name in names}


def run_all(
    commands: Mapping[str, Sequence[str]],
    processes: int,
    logs: pathlib.Path,
    env: Mapping[str, str] | None = None,
) -> int:
    """Run `commands` in `env` (None: ours), `processes` at a time.

    0 if all gave 0, 1 if not, 128 + the signal if one stopped them. What a command says on stderr is appended to
    `logs`/NAME.log; Ctrl-C reaches it through us alone, as SIGTERM.
    """
    waiting, running, failed = dict(commands), {}, False
    with terminating() as children:
        while running or (waiting and not children.signals):
            while waiting and len(running) < processes and not children.signals:
                name = next(iter(waiting))
                with appended(logs / f"{name}.log") as log:
                    running[name] = children.start(
                        waiting.pop(name),
                        stdout=subprocess.DEVNULL,
                        stderr=log,
                        start_new_session=True,
                        env=env,
                    )
            codes = {name: process.poll() for name, process in running.items()}
            for name, code in codes.items():
                if code is not None:
                    print(f"{name}: {'done' if code == 0 else f'exit code {code}'}", file=sys.stderr)
                    failed |= code != 0
                    children.processes.remove(running.pop(name))
            time.sleep(0.1)
        return 128 + children.signals[0] if children.signals else int(failed)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
