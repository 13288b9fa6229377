"""python -m launch.point --name=lambda1.2_seed7 --root=ROOT --config=configs/fashion.py:paper [--config.field=value]

What every engine runs, on every host of a point: the common stages (--name=common) or one point, from the start or from
where it stopped, to its end. Prints what the run prints and keeps it in ROOT/logs.

Exit code 0: done; 75: stopped and saved, run it again; otherwise that of listopd_jax.main (2: a mistake to fix).
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TextIO

from launch import cli
from launch.grid import COMMON, Grid, State
from listopd_jax import files
from listopd_jax.errors import UserError, exit_code

STOPPED = 75  # EX_TEMPFAIL of sysexits.h
OWN = (
    ".lock",
    "report.html",
    "tensorboard",
    "export",
    "track.json",
    "wandb",
)  # that a point does not take over
LAST_LINES = 20


def main(argv: Sequence[str]) -> int:
    """Parse and run."""
    parser = cli.grid_parser("launch.point", __doc__)
    parser.add_argument("--name", required=True, help=f"{COMMON}, or a point, e.g. lambda1.2_seed7")
    args, arguments = cli.parse_grid(parser, argv)
    grid = cli.load(args, arguments, record=args.name == COMMON)
    if args.name != COMMON:
        grid.point(args.name)
    return run(grid, args.name)


def run(grid: Grid, name: str, program: Sequence[str] = ("-m", "listopd_jax.main")) -> int:
    """Bring a stage to its end with Python's `program` and keep how it went; returns the exit code."""
    if grid.done(name):
        return 0
    try:
        if name != COMMON:
            begin(grid, name)
        (grid.workdir(name) / "report.html").unlink(missing_ok=True)
    except UserError as e:
        keep(grid, name, State("failed", str(e)))
        raise
    keep(grid, name, State("started", f"process {os.getpid()} on {os.uname().nodename}"))
    code, lines = logged([sys.executable, *program, *grid.main_arguments(name)], log_path(grid, name))
    state, code = outcome(grid, name, code, lines)
    keep(grid, name, state)
    return code


def begin(grid: Grid, name: str) -> None:
    """Make the workdir of a point, once, from that of the common stages; UserError if these are not done.

    Everything is copied except what is large and only read, or safe to share: checkpoints and compiled programs are
    linked. Several hosts may do this at one time: the first to finish wins.
    """
    common, workdir = grid.workdir(COMMON), grid.workdir(name)
    if workdir.exists():
        return
    if not grid.done(COMMON):
        raise UserError(f"{common}: the common stages are not done; run --name={COMMON} first")
    try:
        with files.atomic_folder(workdir, replace=False) as new:
            new.chmod(common.stat().st_mode)
            _take_over(common, new)
    except OSError as e:
        if not workdir.exists():
            raise UserError(
                f"{workdir}: cannot be made ({e.strerror or e}); free space or fix the folder"
            ) from e


def _take_over(common: pathlib.Path, workdir: pathlib.Path) -> None:
    """Copy or link the entries of `common` into `workdir`."""
    for entry in sorted(common.iterdir()):
        if entry.name == "checkpoints":
            (workdir / entry.name).mkdir()
            for run_folder in sorted(entry.iterdir()):
                _link(run_folder, workdir / entry.name / run_folder.name)
        elif entry.name == "compile_cache":
            _link(entry, workdir / entry.name)
        elif entry.is_dir() and entry.name not in OWN:
            shutil.copytree(entry, workdir / entry.name)
        elif entry.name not in OWN:
            shutil.copy(entry, workdir / entry.name)


def _link(target: pathlib.Path, link: pathlib.Path) -> None:
    """A relative link: the folder of a grid may be moved or mounted elsewhere."""
    link.symlink_to(os.path.relpath(target.absolute(), link.parent.absolute()), target_is_directory=True)


def logged(command: Sequence[str], log: pathlib.Path) -> tuple[int, list[str]]:
    """Run `command`, pass on and append to `log` what it prints; returns its exit code and its last lines.

    SIGTERM and SIGINT to this process reach it as SIGTERM, which saves. Code -n: killed by signal n.
    """
    last: deque[str] = deque(maxlen=LAST_LINES)
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    with appended(log) as file, terminating() as children:
        process = children.start(command, **pipe)
        for line in process.stdout:
            for out in (file, sys.stdout):
                out.write(line)
                out.flush()
            last.append(line.strip())
        return process.wait(), [line for line in last if line]


def appended(log: pathlib.Path) -> TextIO:
    """The file of a log, open at its end; UserError if it cannot be written."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        return log.open("a", encoding="utf-8")
    except OSError as e:
        raise files.not_written(log, e, "another --root") from e


class Children:
    """Processes to end, and the signals that came for them."""

    def __init__(self):
        self.processes: list[subprocess.Popen] = []
        self.signals: list[int] = []

    def start(self, command: Sequence[str], **options) -> subprocess.Popen:
        """Start one; a signal that came meanwhile is for it too."""
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)
        self.processes.append(process)
        if self.signals:
            process.terminate()
        return process

    def forward(self, number: int, _frame) -> None:
        """The handler of a signal: SIGTERM to each."""
        self.signals.append(number)
        for process in self.processes:
            process.terminate()


@contextlib.contextmanager
def terminating() -> Iterator[Children]:
    """While inside, SIGTERM and SIGINT to this process are SIGTERM to the children that it starts."""
    children = Children()
    before = {number: signal.signal(number, children.forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield children
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def outcome(grid: Grid, name: str, code: int, lines: Sequence[str]) -> tuple[State, int]:
    """How a run that ended with `code` went, and the exit code to return; the first host decides whether it is done."""
    said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    if code == 0 and (host_index() or grid.done(name)):
        return State("done"), 0
    if code in (0, -signal.SIGTERM):
        return State("stopped", said), STOPPED
    if code < 0:
        return State(
            "failed", f"killed by {signal.Signals(-code).name}; last said: {said or 'nothing'}"
        ), 128 - code
    return State("failed", said or f"exit code {code}"), code


def keep(grid: Grid, name: str, state: State) -> None:
    """Write the state of a stage; only the first host of a point does."""
    if host_index() == 0:
        files.write_json(grid.root / "status" / f"{name}.json", state._asdict())


def log_path(grid: Grid, name: str) -> pathlib.Path:
    """Where this host keeps what the run prints."""
    host = f".host{host_index()}" if host_index() else ""
    return grid.root / "logs" / f"{name}{host}.log"


def host_index() -> int:
    """Which host of a point this is, as launch.tpu_vm, SLURM and Kubernetes (indexed jobs) say; 0 elsewhere."""
    names = ("LISTOPD_HOST", "SLURM_PROCID", "JOB_COMPLETION_INDEX")
    found = next((os.environ[name] for name in names if name in os.environ), "0")
    return int(found) if found.isdigit() else 0


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
