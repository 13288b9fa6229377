"""python -m launch.gather --root=ROOT

Make one run of a grid: ROOT/results.json, metrics.jsonl, completions.jsonl, examples.json, errors.json,
calibration.json, recommendation.json, data.json, config.json and report.html, from the common stages and every point
that is done, in the order and with the contents of a single run of them all. The same grid gives the same bytes.

A point that is missing or broken is named here and in the report; exit code 0: none, 1: some, 2: a mistake to fix.
"""

import json
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from launch import cli
from launch.grid import COMMON, Grid, Point, read_grid
from listopd_jax import files
from listopd_jax.errors import UserError, exit_code
from listopd_jax.metrics_log import COMPLETIONS, FILE, read_metrics
from listopd_jax.records import (
    CALIBRATION,
    ERRORS,
    EXAMPLES,
    RECOMMENDATION,
    RESULTS,
    STAMP,
    Result,
    write_records,
)
from listopd_jax.report.inputs import Inputs, read_inputs
from listopd_jax.report.write import write_report


class Gathered(NamedTuple):
    """The finished parts, the common stages first, and why the rest is missing, by name."""

    inputs: list[Inputs]
    missing: dict[str, str]
    completions: list[dict[str, Any]]  # that were logged


def main(argv: Sequence[str]) -> int:
    """Parse, gather, say what is missing."""
    parser = cli.parser("launch.gather", __doc__)
    parser.add_argument("--root", required=True, type=pathlib.Path, help="folder of the grid")
    grid = read_grid(parser.parse_args(argv).root)
    gathered = gather(grid)
    for name, why in gathered.missing.items():
        print(f"missing: {name}: {why}", file=sys.stderr)
    for folder in strangers(grid):
        print(f"left out: {folder}: not in the grid of the last launch", file=sys.stderr)
    print(f"{len(gathered.inputs) - 1} of {len(grid.points)} points; report: {write(grid, gathered)}")
    return 1 if gathered.missing else 0


def gather(grid: Grid) -> Gathered:
    """Read and check the common stages and every point; UserError if there is nothing yet, or it is broken."""
    common, state = grid.workdir(COMMON), grid.state(COMMON)
    if not (common / "report.html").exists():
        raise UserError(f"{common}: nothing to gather, the common stages are {state}")
    shared = read_inputs(common)
    found, missing, completions = [shared], {} if grid.done(COMMON) else {COMMON: str(state)}, []
    for point in grid.points:
        try:
            found.append(read_point(grid, point, shared))
            completions += _rows_of(point, read_metrics(grid.workdir(point.name), COMPLETIONS))
        except UserError as e:
            missing[point.name] = str(e)
    return Gathered(found, missing, completions)


def read_point(grid: Grid, point: Point, shared: Inputs) -> Inputs:
    """The results of a point alone; UserError if it is not done, broken, or did not resume from the common stages."""
    if not grid.done(point.name):
        raise UserError(str(grid.state(point.name)))
    workdir = grid.workdir(point.name)
    inputs = read_inputs(workdir)
    if _models(inputs) != _models(shared):
        raise UserError(
            f"{workdir}: resumes from other models than {grid.workdir(COMMON)} has; delete it and launch again"
        )

    results = [r for r in inputs.results if r.identity[:3] == _mine(point)]
    examples = [e for e in inputs.examples if e.identity[:3] == _mine(point)]
    errors = [e for e in inputs.errors if e.identity[:3] == _mine(point)]
    metrics = _rows_of(point, inputs.metrics)
    if not results:
        raise UserError(
            f"{workdir / RESULTS}: has no record of this point; delete {workdir} and launch again"
        )
    return Inputs(inputs.config, {}, results, metrics, examples, errors=errors)


def _mine(point: Point) -> tuple[str, float, int]:
    """Stage, λ and seed of a point's own results."""
    return ("opd", point.lam, point.seed)


def _rows_of(point: Point, rows: Sequence[Any]) -> list[Any]:
    """The rows of a log that are the point's."""
    return [row for row in rows if tuple(map(row.get, ("stage", "lambda", "seed"))) == _mine(point)]


def _models(inputs: Inputs) -> list[Result]:
    """The records of the SFT models."""
    return [record for record in inputs.results if record.stage in ("sft_teacher", "sft_student")]


def write(grid: Grid, gathered: Gathered) -> pathlib.Path:
    """Write what was gathered as the workdir of one run and its report; returns the path of the report."""
    common, root = gathered.inputs[0], grid.root

    def all_of(part: Callable[[Inputs], Sequence[Any]]) -> list[Any]:
        return [row for inputs in gathered.inputs for row in part(inputs)]

    files.write_json(root / "config.json", describe(grid, gathered))
    write_records(root / RESULTS, all_of(lambda x: x.results))
    write_records(root / EXAMPLES, all_of(lambda x: x.examples))
    if errors := all_of(lambda x: x.errors):
        write_records(root / ERRORS, errors)
    for name, rows in ((FILE, all_of(lambda x: x.metrics)), (COMPLETIONS, gathered.completions)):
        files.write_text(root / name, "".join(json.dumps(row) + "\n" for row in rows))
    for name, record in ((CALIBRATION, common.calibration), (RECOMMENDATION, common.recommendation)):
        if record is not None:
            files.write_json(root / name, record.to_json())
    if common.data:
        files.write_json(root / "data" / "report.json", common.data)
    if common.noise is not None:
        files.write_json(root / STAMP, {"noise": common.noise})
    return write_report(root)


def describe(grid: Grid, gathered: Gathered) -> dict[str, Any]:
    """The config.json of the whole: that of the common stages, the grid, and notes of what is missing or differs."""
    saved = dict(gathered.inputs[0].config)
    notes = [f"{name} is missing: {why}" for name, why in gathered.missing.items()]
    others = sorted({r for inputs in gathered.inputs for r in _revisions(inputs)} - {saved.get("revision")})
    if others:
        notes.append(f"Some points ran with other code than the common stages: {', '.join(others)}")
    return saved | {
        "config": grid.config,
        "command": shlex.join(["python", "-m", "listopd_jax.main", *grid.arguments]),
        "notes": [*saved.get("notes", ()), *notes],
    }


def _revisions(inputs: Inputs) -> set[str]:
    """The revisions of the code that a workdir was made and resumed with."""
    calls = (inputs.config, *inputs.config.get("resumed", ()))
    return {
        call["revision"] for call in calls if isinstance(call, dict) and isinstance(call.get("revision"), str)
    }


def strangers(grid: Grid) -> list[pathlib.Path]:
    """Folders of points that the grid does not have (or no longer has)."""
    folder = grid.root / "points"
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [x for x in entries if x.is_dir() and not x.name.startswith(".") and x.name not in grid.names]


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
