"""What the page shows, as JSON: each workdir's stage, progress and ETA, its grid, and the curves of the chosen ones."""

import pathlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from listopd_jax.errors import UserError
from listopd_jax.metrics_log import binned
from listopd_jax.records import Planned, Result, is_number
from listopd_jax.report.findings import policy_name
from listopd_jax.report.wording import cut, visible
from listopd_jax.watch.workdirs import (
    PointState,
    Workdir,
    at_work,
    grid_states,
    logged_until,
    read_workdir,
    session_start,
    workdirs,
)

CURVES = {
    "opd": {
        "parse": "Sampled parse",
        "loss": "OPD loss",
        "reverse_kl": "Reverse KL to the teacher",
        "entropy": "Entropy of the student",
        "completion_length": "Completion length",
        "grad_norm": "Gradient norm",
    },
    "sft": {
        "loss": "SFT loss",
        "accuracy": "Token accuracy",
        "entropy": "Entropy",
        "grad_norm": "Gradient norm",
    },
}
"""Metrics and their names, by the start of a stage's name."""
DISTILLED = ("anchor", "opd")
"""The stages that come after calibration and forecast, and have runs of several seeds."""
POINTS = 120  # of a curve; longer ones are means of neighbouring steps
COMPLETIONS = 8  # shown, the newest
MAX_TEXT = 4000  # characters of a completion or prompt
EVALUATED = ("parse", "useful", "ndcg@1")


def page_state(root: pathlib.Path, chosen: str = "") -> dict[str, Any]:
    """Everything under `root`; `chosen` names the workdir whose curves, completions and results are sent with it."""
    found = workdirs(root)
    read = {name: _read(root, path) for name, path in found.items()}
    overview = [_overview(name, found[name], workdir) for name, workdir in read.items()]
    overview = _with_points(root, overview)
    name = chosen if chosen in read else _default_choice(overview)
    shown = [read[n] for n in _of(name, read) if isinstance(read[n], Workdir)]
    return {
        "root": visible(str(root)),
        "workdirs": overview,
        "chosen": name,
        "curves": _curves(shown),
        "completions": _completions(shown),
        "results": list(
            {(r.identity, r.run): _result(r) for workdir in shown for r in workdir.results}.values()
        ),
    }


def _read(root: pathlib.Path, path: pathlib.Path) -> Workdir | UserError:
    try:
        return read_workdir(root, path)
    except UserError as e:
        return e


def _overview(name: str, path: pathlib.Path, workdir: Workdir | UserError) -> dict[str, Any]:
    """State, stage and progress of a workdir."""
    if isinstance(workdir, UserError):
        return _named(name) | {"state": "broken", "why": visible(str(workdir)), "runs": []}
    runs, working = _runs(workdir), at_work(path)
    current = next((run for run in runs if run["state"] == "current"), None)
    complete = bool(runs) and current is None and workdir.reported
    state = "running" if working else "done" if complete else "stopped"
    if current is not None:
        current["state"] = "running" if working else "stopped"
    return _named(name) | {
        "state": state,
        "stage": "" if complete and not working else _stage(workdir, current),
        "done": sum(run["step"] for run in runs),
        "total": sum(run["steps"] for run in runs),
        "eta": _seconds_left(path, runs, current) if working else None,
        "report": workdir.reported,
        "runs": runs,
    }


def _runs(workdir: Workdir) -> list[dict[str, Any]]:
    """The trainings that are planned, each with its state: done, current (the first that is not) or waiting."""
    last = {row["run"]: row["step"] for row in workdir.metrics}
    results = {r.identity: r for r in workdir.results}
    # A run that is evaluated on its way is planned once per budget; the last of these is the full run.
    longest = {run.run: run for run in sorted(workdir.planned, key=lambda run: run.steps or 0)}
    order = dict.fromkeys(run.run for run in workdir.planned)
    runs, current = [], "current"
    for plan in (longest[name] for name in order):
        result = results.get(plan.identity)
        runs.append(_run(plan, last.get(plan.run, 0), "done" if result else current, result))
        current = current if result else "waiting"
    return runs


def _run(plan: Planned, step: int, state: str, result: Result | None) -> dict[str, Any]:
    steps = plan.steps or 0
    about = {"run": plan.run, "label": _label(plan.to_json()), "stage": plan.stage}
    # Points that have not begun are known by their names alone.
    about |= {"lambda": plan.lam, "seed": plan.seed, "plain": "_plain_seed" in plan.run}
    values = {name: None if result is None else result.metric(name) for name in ("parse", "useful")}
    return about | {"step": steps if result else min(step, steps), "steps": steps, "state": state} | values


def _stage(workdir: Workdir, current: Mapping[str, Any] | None) -> str:
    """The current work of a job, in words."""
    if not workdir.planned:
        return "preparing data and models"
    if current is None:
        return "writing the report"
    if current["step"] >= current["steps"]:
        return f"evaluating {current['label']}"
    begun = any(row["stage"] in DISTILLED for row in workdir.metrics)
    if current["stage"] in DISTILLED and not current["step"] and not begun:
        return "forecasting" if workdir.calibrated else "calibrating"
    return f"training {current['label']}"


def _seconds_left(
    path: pathlib.Path, runs: Sequence[Mapping[str, Any]], current: Mapping[str, Any] | None
) -> float | None:
    """Training time left in the current stage at the current run's pace; None before a pace is known."""
    began = session_start(path, current["run"]) if current else None
    if began is None or current["step"] <= began[1]:
        return None
    pace = (logged_until(path) - began[0]) / (current["step"] - began[1])
    # Only the current stage's runs: steps of another stage have another pace.
    left = sum(run["steps"] - run["step"] for run in runs if run["stage"] == current["stage"])
    return max(0.0, pace * left)


def _with_points(root: pathlib.Path, overview: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`overview` with the points of a launch: those that failed, and those that wait for their workdir."""
    try:
        states = list(grid_states(root))
    except UserError as e:
        states = []
        overview = [_named("grid.json") | {"state": "broken", "why": visible(str(e)), "runs": []}, *overview]
    known = {entry["name"]: entry for entry in overview}
    for point in states:
        if point.name not in known:
            overview.append(_without_workdir(point))
        elif point.word == "failed" and known[point.name]["state"] == "stopped":
            entry = known[point.name]
            runs = [run | {"state": "failed"} if run["state"] == "stopped" else run for run in entry["runs"]]
            entry |= {"state": "failed", "why": visible(point.why), "runs": runs}
    return overview


def _without_workdir(point: PointState) -> dict[str, Any]:
    """The overview of a point without a workdir."""
    state = "failed" if point.word == "failed" else "waiting"
    plan = Planned(run=point.name, stage="opd", lam=point.lam, seed=point.seed)
    return _named(point.name) | {
        "state": state,
        "why": visible(point.why),
        "runs": [_run(plan, 0, state, None)],
    }


def _named(name: str) -> dict[str, str]:
    """A workdir's name for requests and, with nothing hidden in it, to be shown."""
    return {"name": name, "label": visible(name)}


def _default_choice(overview: Sequence[Mapping[str, Any]]) -> str:
    """The workdir to show when none was chosen: one at work, else the first that has something to show."""
    order = {"running": 0, "broken": 2}
    return min(overview, key=lambda entry: order.get(entry["state"], 1), default={"name": ""})["name"]


def _of(name: str, read: Mapping[str, Any]) -> list[str]:
    """The workdirs that belong to a choice: itself and, for the folder of a launch, its points."""
    points = [other for other in read if name == "common" and other.startswith("points/")]
    return [name, *points] if name in read else []


def _curves(shown: Sequence[Workdir]) -> list[dict[str, Any]]:
    """The figures of each stage: title, metric and one curve per training run, by λ and seed; only what was logged."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for workdir in shown:
        known = set(groups)  # a point's log begins with that of the common stages
        for row in workdir.metrics:
            if row["run"] not in known:
                groups[row["run"]].append(row)
    runs = sorted(groups.values(), key=lambda rows: _order(rows[0]))
    figures = []
    for stage, metrics in CURVES.items():
        of_stage = [rows for rows in runs if str(rows[0].get("stage")).startswith(stage)]
        for metric, title in metrics.items():
            curves = [curve for rows in of_stage if (curve := _curve(rows, metric))["points"]]
            figures += (
                [{"stage": stage, "metric": metric, "title": title, "curves": curves}] if curves else []
            )
    return figures


def _order(row: Mapping[str, Any]) -> tuple[float, float]:
    lam, seed = (row.get(key) if is_number(row.get(key)) else -1 for key in ("lambda", "seed"))
    return lam, seed


def _curve(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    points = [(row["step"], row[metric]) for row in rows if is_number(row.get(metric))]
    lam = rows[0].get("lambda")
    return {
        "label": _label(rows[0]),
        "stage": str(rows[0].get("stage")),
        "lambda": lam if is_number(lam) else None,
        "points": list(map(list, binned(points, POINTS))),
    }


def _completions(shown: Sequence[Workdir]) -> list[dict[str, Any]]:
    """The newest sampled completions, their texts visible and cut."""
    newest = [row for workdir in shown for row in workdir.completions[-COMPLETIONS:]][-COMPLETIONS:]
    return [
        {"label": _label(row), "step": row["step"], "failure": visible(str(row.get("failure")))}
        | {name: visible(cut(str(row.get(name, "")), MAX_TEXT)) for name in ("output", "prompt")}
        for row in newest
    ]


def _label(row: Mapping[str, Any]) -> str:
    """A run's readable name, from a row of its logs: OPD, λ = 1.2, seed 0."""
    stage, lam, seed = str(row.get("stage")), row.get("lambda"), row.get("seed")
    guard, sweep = str(row.get("guard") or ""), str(row.get("sweep") or "")
    name = policy_name(stage, lam if is_number(lam) else None, None, guard, sweep)
    return visible(f"{name}, seed {seed}" if stage in DISTILLED else name)


def _result(record: Result) -> dict[str, Any]:
    steps = record.steps or None  # a forecast has 0
    return {"label": _label(record.to_json()), "steps": steps, "n": record.n} | {
        name: record.metric(name) for name in EVALUATED
    }
