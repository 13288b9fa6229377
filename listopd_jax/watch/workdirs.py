"""The workdirs under a folder, read for the page: what exists, what is at work, and what no link may lead out of."""

import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from listopd_jax import files
from listopd_jax.errors import UserError
from listopd_jax.metrics_log import COMPLETIONS, FILE, read_metrics
from listopd_jax.records import CALIBRATION, RESULTS, RUNS, Planned, Result, read_results, read_runs

CONFIG, REPORT, LOCK, GRID = "config.json", "report.html", ".lock", "grid.json"
INSIDE = {
    "checkpoints",
    "compile_cache",
    "data",
    "export",
    "logs",
    "status",
    "tensorboard",
    "tokenizer",
    "wandb",
}
"""Folders of a workdir or a grid that hold no workdirs."""
DEEPEST, MOST = 4, 400  # levels below the root, workdirs shown
FRESH_S = 120.0  # a workdir written to this recently counts as at work where locks cannot be seen


class Workdir(NamedTuple):
    """The content of one workdir's files."""

    planned: list[Planned]
    results: list[Result]
    metrics: list[dict[str, Any]]
    completions: list[dict[str, Any]]
    calibrated: bool
    reported: bool


def workdirs(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """The workdirs in and under `root` by their relative names, "." the root itself; links are not followed."""
    found = {}
    for place, folders, names in os.walk(root):
        path = pathlib.Path(place)
        depth = len(path.relative_to(root).parts)
        # In place: os.walk then goes into these alone.
        folders[:] = sorted(
            f for f in folders if f not in INSIDE and not f.startswith(".") and depth < DEEPEST
        )
        if CONFIG in names and len(found) < MOST:
            found[path.relative_to(root).as_posix()] = path
    return found


def read_workdir(root: pathlib.Path, path: pathlib.Path) -> Workdir:
    """Read the workdir `path` under `root`; UserError for a broken file, or one that a link takes from elsewhere."""
    for name in (RUNS, RESULTS, FILE, COMPLETIONS, REPORT):
        own_file(root, path / name)
    results = read_results(path / RESULTS)
    return Workdir(
        read_runs(path / RUNS) or _planned(results),
        results,
        _rows(path / FILE),
        _rows(path / COMPLETIONS),
        (path / CALIBRATION).exists(),
        (path / REPORT).exists(),
    )


def _planned(results: Sequence[Result]) -> list[Planned]:
    """The trainings of a workdir that an older version left without runs.json: those that are evaluated."""
    trained = [r for r in results if r.stage == "opd" or r.stage.startswith("sft_")]
    return [Planned(run=r.run, stage=r.stage, lam=r.lam, seed=r.seed, steps=r.steps) for r in trained]


def own_file(root: pathlib.Path, path: pathlib.Path) -> bool:
    """Whether `path` is a file; UserError if it is something else, or lies outside `root` by way of links."""
    if not (path.exists() or path.is_symlink()):
        return False
    if not (path.is_file() and path.resolve().is_relative_to(root.resolve())):
        raise UserError(f"{path}: no file of this folder; a page shows no others")
    return True


def at_work(path: pathlib.Path) -> bool:
    """Whether a process holds the lock of a workdir; looking takes no lock, which could keep a run out."""
    lock, locks = path / LOCK, pathlib.Path("/proc/locks")
    if not lock.exists():
        return False
    if not locks.exists():
        return _fresh(path)
    # `1: FLOCK ADVISORY WRITE pid major:minor:inode start end`; field 1 is `->` where a process waits.
    held = [line.split() for line in locks.read_text("ascii").splitlines()]
    return any(fields[1] == "FLOCK" and fields[-3].endswith(f":{lock.stat().st_ino}") for fields in held)


def _fresh(path: pathlib.Path) -> bool:
    logs = [path / name for name in (FILE, RESULTS) if (path / name).exists()]
    return any(time.time() - log.stat().st_mtime < FRESH_S for log in logs)


def session_start(path: pathlib.Path, run: str) -> tuple[float, int] | None:
    """When `run` was last started or resumed, by the clock of its TensorBoard file's name, and after which step."""
    events = []
    for file in (path / "tensorboard" / run).glob("events.out.tfevents.*.from*"):
        # events.out.tfevents.SECONDS.HOST… .fromSTEP: a host's name may have dots of its own.
        began, after = file.name.split(".")[3], file.name.rsplit(".from", 1)[1]
        if began.isdigit() and after.isdigit():
            events.append((float(began), int(after)))
    return max(events, default=None)


def logged_until(path: pathlib.Path) -> float:
    """When metrics.jsonl was last written to, in seconds of the epoch; 0 if never."""
    return (path / FILE).stat().st_mtime if (path / FILE).exists() else 0.0


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a log, read again only where it has changed."""
    stat = path.stat() if path.exists() else None
    version = (stat.st_mtime_ns, stat.st_size) if stat else None
    if _read_before.get(path, (None, []))[0] != version:
        _read_before[path] = version, read_metrics(path.parent, path.name)
    return _read_before[path][1] if version else []


_read_before: dict[pathlib.Path, tuple[Any, list[dict[str, Any]]]] = {}  # log -> its version and its rows


class PointState(NamedTuple):
    """A launch's record of one of its points: the name of its workdir, λ, seed, how it ended and why."""

    name: str
    lam: float
    seed: int
    word: str
    why: str


def grid_states(root: pathlib.Path) -> Iterator[PointState]:
    """Every point of the launch in `root`, in order; none if it holds none."""
    if not own_file(root, root / GRID):
        return
    saved = files.read_json(root / GRID)
    try:
        opd = saved["config"]["opd"]
        grids = (("_plain", opd.get("plain_lambdas", ())), ("", opd["lambdas"]))
        lambdas = [(float(lam), kind) for kind, values in grids for lam in values]
        points = [(lam, int(seed), kind) for seed in opd["seeds"] for lam, kind in lambdas]
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"{root / GRID}: not the record of a grid; launch again") from e
    for lam, seed, kind in points:
        name = f"lambda{lam}{kind}_seed{seed}"
        path = root / "status" / f"{name}.json"
        status = files.read_json(path) if own_file(root, path) else {}
        status = status if isinstance(status, dict) else {}
        yield PointState(f"points/{name}", lam, seed, str(status.get("word", "")), str(status.get("why", "")))
