"""The files of a workdir for the report, read and checked: any part may be absent, none may be broken."""

import copy
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from listopd_jax import files
from listopd_jax.errors import UserError
from listopd_jax.metrics_log import read_metrics
from listopd_jax.records import (
    CALIBRATION,
    ERRORS,
    EXAMPLES,
    PREDICTIONS,
    RECOMMENDATION,
    RESULTS,
    STAMP,
    Calibration,
    Errors,
    Example,
    Prediction,
    Recommendation,
    Result,
    is_number,
    read_calibration,
    read_errors,
    read_examples,
    read_predictions,
    read_recommendation,
    read_results,
)
from listopd_jax.report import findings, plots
from listopd_jax.task.corruptions import parse_noise

METRICS = {
    "parse": "parse",
    "useful": "useful",
    "ndcg@1": "NDCG@1",
    "ndcg@3": "NDCG@3",
    "ndcg@5": "NDCG@5",
    "ndcg@10": "NDCG@10",
    "tau": "Kendall τ",
    "mae": "MAE",
    "ended": "ends",
}
"""The metrics that the report has names for."""
USEFUL = "parse · NDCG@1"
"""The meaning of useful where the data report does not say: that of reviews."""

UNSWEPT = "no sweep"
_Json = Mapping[str, Any]
Place = tuple[float, str]  # λ, and its guard


@dataclass(frozen=True)
class Inputs:
    """The files of a workdir as read; empty where there is none yet."""

    config: _Json = field(default_factory=dict)
    data: _Json = field(default_factory=dict)
    results: Sequence[Result] = ()
    metrics: Sequence[_Json] = ()
    examples: Sequence[Example] = ()
    calibration: Calibration | None = None
    predictions: Sequence[Prediction] = ()
    recommendation: Recommendation | None = None  # of the forecasts
    errors: Sequence[Errors] = ()
    noise: Mapping[str, Mapping[str, float]] | None = None  # planted, by role; None: not written down yet
    beside: Mapping[str, "Inputs"] = field(default_factory=dict)  # other runs to compare with, by name
    point: str = ""  # of opd.sweep, that all of this belongs to

    @cached_property
    def found(self) -> findings.Findings:
        """The findings from the results."""
        return findings.find(self.results)

    @cached_property
    def policies(self) -> list[findings.Policy]:
        """The evaluated policies in the order of the report."""
        return findings.policies(self.results)

    @cached_property
    def metrics_shown(self) -> dict[str, str]:
        """The metrics that the records have, and their names."""
        return metric_columns(self.results)

    def halves(self) -> dict[str, "Inputs"]:
        """Policies without a guard and under one, each kind as a run: plain, guarded; of one kind: "", the run."""
        if not self.found.guarded:
            return {"": self}
        return {name: self._only(on) for name, on in (("plain", False), ("guarded", True))}

    def _only(self, guarded: bool) -> "Inputs":
        """Without the distilled policies and forecasts of the other kind."""
        results = [r for r in self.results if r.stage not in ("opd", "forecast") or bool(r.guard) == guarded]
        metrics = [r for r in self.metrics if r.get("stage") != "opd" or bool(r.get("guard")) == guarded]
        return replace(self, results=results, metrics=metrics)

    def points(self) -> dict[str, "Inputs"]:
        """The points of opd.sweep, each as a run with what all share; "" and itself for a run that sweeps nothing.

        Policies distilled before there was a sweep are a point of their own, UNSWEPT.
        """
        labels = dict.fromkeys(record.sweep for record in self.results if record.stage == "opd")
        return {label or UNSWEPT: self._at(label) for label in labels} if any(labels) else {"": self}

    def _at(self, label: str) -> "Inputs":
        """What belongs to that point or to all; forecasts are those under its guard, or under none."""
        results, examples, errors = (
            [r for r in records if r.stage != "opd" or r.sweep == label]
            for records in (self.results, self.examples, self.errors)
        )
        guards = {"", *(r.guard for r in results if r.stage == "opd")}
        return replace(
            self,
            config=self.config | {"config": _at_point(self.config.get("config", {}), label)},
            # A forecast is of a guard, not of a point: points that share a guard share it.
            results=[r for r in results if r.stage != "forecast" or r.guard in guards],
            examples=examples,
            errors=errors,
            metrics=[r for r in self.metrics if r.get("stage") != "opd" or r.get("sweep", "") == label],
            point=label or UNSWEPT,
        )

    def planted(self, role: str) -> list[tuple[str, float]]:
        """(corruption, share) of the answers that the SFT of `role` trained on; for an old run, from its config."""
        if self.noise is not None:
            return list(self.noise.get(role, {}).items())
        sft: Any = self.config.get("config")
        for name in ("sft", role):
            sft = sft.get(name) if isinstance(sft, dict) else None
        trains = isinstance(sft, dict) and (sft.get("steps", 1) or sft.get("epochs", 1))
        noise = sft.get("noise") if trains else None
        return list(parse_noise(noise) or ()) if isinstance(noise, str) else []

    @property
    def useful(self) -> str:
        """The meaning of useful."""
        return str(self.data.get("useful", USEFUL))

    @cached_property
    def colours(self) -> dict[Place, str]:
        """λ and guard -> colour, the same in every figure."""
        found = {(r.lam, r.guard) for r in self.results if r.stage == "opd" and r.lam is not None}
        found |= {place for row in self.metrics if (place := logged_place(row))}
        places = sorted(found)
        return dict(zip(places, plots.lambda_colours(len(places)), strict=True))


def first_point(inputs: Inputs) -> Inputs:
    """The first point of a sweep with the others next to it, and each point of other runs; without a sweep `inputs`."""
    (_, first), *others = inputs.points().items()
    runs = {
        f"{name} {label}".strip(): at
        for name, run in inputs.beside.items()
        for label, at in run.points().items()
    }
    return replace(first, beside={**dict(others), **runs})


def _at_point(config: _Json, label: str) -> _Json:
    """A config's JSON values with the options of a point, "clip=1.5 guard.margin=1.25", in section opd."""
    changed = copy.deepcopy(dict(config))
    for name, _, text in (pair.partition("=") for pair in label.split()):
        *sections, option = ("opd", *name.split("."))
        section = functools.reduce(_section, sections, changed)
        section[option] = _option(text)
    return changed


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """The section of that name, made where there is none: a label in a file may say anything."""
    if not isinstance(tree.get(name), dict):
        tree[name] = {}
    return tree[name]


def _option(text: str) -> float | bool | str:
    """The value in config.json of an option that a label spells: infinity is text there."""
    if text in ("True", "False"):
        return text == "True"
    try:
        # JSON has no infinity, so config.json spells it.
        return text if math.isinf(float(text)) else float(text)
    except ValueError:
        return text


def logged_place(row: _Json) -> Place | None:
    """λ and guard of the run that a row of metrics.jsonl is of; None if it is not distilled."""
    if row.get("stage") != "opd" or not is_number(row.get("lambda")):
        return None
    return row["lambda"], str(row.get("guard") or "")


def metric_columns(results: Sequence[Result]) -> dict[str, str]:
    """The metrics of some records and their names: those of METRICS that they count, then those of their task alone."""
    counted = dict.fromkeys(name for record in results for name in record.counted)
    if not counted:
        return METRICS
    named = {metric: name for metric, name in METRICS.items() if metric in counted}
    return (
        named | {metric: metric for metric in counted if metric not in METRICS} | {"ended": METRICS["ended"]}
    )


def read_inputs(workdir: str | pathlib.Path) -> Inputs:
    """Read config.json, data.json, data/report.json, results.json, metrics.jsonl, examples.json, calibration.json,
    predictions.json, recommendation.json and errors.json.

    Raises UserError if there is no such folder, or a file in it is broken.
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir}: no such folder; give the --workdir of a run")
    config = _read(workdir / "config.json", {"config": dict, "versions": dict, "notes": list})
    data = _read(workdir / "data" / "report.json", {"notes": list})
    return Inputs(
        config,
        data,
        read_results(workdir / RESULTS),
        read_metrics(workdir),
        read_examples(workdir / EXAMPLES),
        read_calibration(workdir / CALIBRATION),
        read_predictions(workdir / PREDICTIONS),
        read_recommendation(workdir / RECOMMENDATION),
        read_errors(workdir / ERRORS),
        _read_noise(workdir / STAMP),
    )


def _read_noise(path: pathlib.Path) -> Mapping[str, Mapping[str, float]] | None:
    noise = _read(path, {"noise": dict}).get("noise")
    known = all(isinstance(of, dict) and all(map(is_number, of.values())) for of in (noise or {}).values())
    _require(known, path, "field 'noise' must hold the shares of corruptions by role")
    return noise


def _read(path: pathlib.Path, parts: Mapping[str, type]) -> _Json:
    """A JSON object from a file, its `parts` of their types where they are there; {} for no file."""
    value = files.read_json(path) if path.exists() else {}
    _require(isinstance(value, dict), path, "must hold a JSON object")
    for name, kind in parts.items():
        fits, called = (
            isinstance(value.get(name, kind()), kind),
            {dict: "a JSON object", list: "a list"}[kind],
        )
        _require(fits, path, f"field '{name}' must be {called}")
    return value


def _require(holds: bool, path: pathlib.Path, what: str) -> None:
    if not holds:
        raise UserError(f"{path}: {what}; fix it, or choose another --workdir")
