"""What a workdir holds for the report, read and checked: any part may be absent, none may be broken."""

import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from listopd_jax import files
from listopd_jax.errors import UserError
from listopd_jax.metrics_log import read_metrics
from listopd_jax.report import findings, plots
from listopd_jax.report.wording import is_number

METRICS = {
    "parse": "parse",
    "useful": "useful",
    "ndcg@1": "NDCG@1",
    "ndcg@3": "NDCG@3",
    "ndcg@5": "NDCG@5",
    "ndcg@10": "NDCG@10",
    "tau": "Kendall τ",
    "mae": "MAE",
}
"""The metrics of a record and their names."""

_NUMBERS = ("lambda", "seed", "steps", "n", *METRICS)
_CONFIG_PARTS = {"config": dict, "versions": dict, "notes": list}
_CALIBRATION_PARTS = {
    "reasons": dict,
    "intervals": dict,
    "classes": list,
    "flips": list,
    "curve": list,
    "notes": list,
}
_Json = Mapping[str, Any]


@dataclass(frozen=True)
class Inputs:
    """The files of a workdir as read; empty where there is none yet."""

    config: _Json = field(default_factory=dict)
    data: _Json = field(default_factory=dict)
    results: Sequence[_Json] = ()
    metrics: Sequence[_Json] = ()
    examples: Sequence[_Json] = ()
    calibration: _Json = field(default_factory=dict)

    @cached_property
    def found(self) -> findings.Findings:
        """What the results say."""
        return findings.find(self.results)

    @cached_property
    def policies(self) -> list[findings.Policy]:
        """The evaluated policies in the order of the report."""
        return findings.policies(self.results)

    @cached_property
    def colours(self) -> dict[float, str]:
        """λ -> colour, the same in every figure."""
        distilled = [x for x in (*self.results, *self.metrics) if x.get("stage") == "opd"]
        lams = sorted({x["lambda"] for x in distilled if is_number(x.get("lambda"))})
        return dict(zip(lams, plots.lambda_colours(len(lams)), strict=True))


def read_inputs(workdir: str | pathlib.Path) -> Inputs:
    """Read config.json, data/report.json, results.json, metrics.jsonl, examples.json and calibration.json.

    Raises UserError if there is no such folder, or a file in it is broken.
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir}: no such folder; give the --workdir of a run")
    config = _read(workdir / "config.json", dict, _CONFIG_PARTS)
    data = _read(workdir / "data" / "report.json", dict, {"notes": list})
    results = _read(workdir / "results.json", list)
    examples = _read(workdir / "examples.json", list)
    for i, record in enumerate(results):
        _check_record(record, f"{workdir / 'results.json'}: record {i}")
    for i, example in enumerate(examples):
        _check_example(example, f"{workdir / 'examples.json'}: example {i}")
    calibration = _read(workdir / "calibration.json", dict, _CALIBRATION_PARTS)
    _check_calibration(calibration, str(workdir / "calibration.json"))
    return Inputs(config, data, results, read_metrics(workdir), examples, calibration)


def _read(path: pathlib.Path, kind: type, parts: Mapping[str, type] = {}) -> Any:
    """A JSON file of one `kind`, its `parts` of theirs where they are there; an empty one for no file."""
    if not path.exists():
        return kind()
    value = files.read_json(path)
    _require(isinstance(value, kind), str(path), f"must hold {_KINDS[kind]}")
    for name, of in parts.items():
        _require(isinstance(value.get(name, of()), of), str(path), f"field '{name}' must be {_KINDS[of]}")
    return value


_KINDS = {dict: "a JSON object", list: "a list"}


def _check_record(record: Any, where: str) -> None:
    _check_identity(record, where)
    for name in _NUMBERS:
        absent = record.get(name) is None
        _require(absent or is_number(record[name]), where, f"field '{name}' must be a finite number or null")
    failures, intervals = record.get("failures", {}), record.get("intervals", {})
    counts = isinstance(failures, dict) and all(is_number(x) and x >= 0 for x in failures.values())
    _require(counts, where, "field 'failures' must map classes to counts")
    pairs = isinstance(intervals, dict) and all(x is None or _is_pair(x) for x in intervals.values())
    _require(pairs, where, "field 'intervals' must map metrics to [low, high] or null")


def _check_example(example: Any, where: str) -> None:
    _check_identity(example, where)
    for name in ("true_scores", "scores"):
        _require(isinstance(example.get(name) or [], list), where, f"field '{name}' must be a list or null")


def _check_calibration(calibration: _Json, where: str) -> None:
    """Numbers or null everywhere, but for the parts, the names of rows and the reasons."""
    numbers = {name: value for name, value in calibration.items() if name not in _CALIBRATION_PARTS}
    rows = [row for part in ("classes", "flips", "curve") for row in calibration.get(part, ())]
    for row in (numbers, *rows):
        _require(isinstance(row, dict), where, "every class, flip and point of the curve must be an object")
        for name, value in row.items():
            fits = value is None or is_number(value) or name in ("class", "positions", "reason")
            _require(fits, where, f"field '{name}' must be a finite number or null")
    pairs = all(x is None or _is_pair(x) for x in calibration.get("intervals", {}).values())
    _require(pairs, where, "field 'intervals' must map fields to [low, high] or null")
    points = calibration.get("curve", ())
    drawn = all(is_number(row.get(name)) for row in points for name in ("lambda", "structural", "all"))
    _require(drawn, where, "field 'curve' must have numbers 'lambda', 'structural' and 'all' at every point")


def _check_identity(record: Any, where: str) -> None:
    staged = isinstance(record, dict) and isinstance(record.get("stage"), str)
    _require(staged, where, "must be an object with a text field 'stage'")
    lam = record.get("lambda")
    _require(lam is None or is_number(lam), where, "field 'lambda' must be a finite number or null")


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def _require(holds: bool, where: str, what: str) -> None:
    if not holds:
        raise UserError(f"{where}: {what}; mend it, or choose another --workdir")
