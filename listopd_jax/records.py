"""The files that a run leaves for others to read, field by field: runs.json, results.json, examples.json, errors.json,
calibration.json, recommendation.json and predictions.json.

Whoever writes these files makes these records, and whoever reads them gets them back. A field that a file lacks (an
older one) has its default; fields that are not known here (a newer one's) are kept in `extra` and written again. A
value of a wrong type is a UserError that names file and field.
"""

import dataclasses
import os
import pathlib
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

from listopd_jax import files
from listopd_jax.errors import UserError

RUNS, RESULTS, EXAMPLES, CALIBRATION = "runs.json", "results.json", "examples.json", "calibration.json"
PREDICTIONS = "predictions.json"
ERRORS = "errors.json"
RECOMMENDATION = "recommendation.json"
STAMP = "data.json"

EVALUATE = "evaluate"
"""The stage of a checkpoint from elsewhere: for such policies, `run` is the name of the checkpoint."""

Counts = dict[str, int]  # class -> lists
Intervals = dict[str, list[float] | None]  # name of a number -> [low, high]


class Record:
    """A dataclass that is written to files as a JSON object; the last field of each is `extra`."""

    @classmethod
    def from_json(cls, value: Any, where: str) -> Self:
        """The record that a JSON value spells; UserError, which begins with `where`, if it spells none."""
        _require(isinstance(value, dict), where, "must be an object")
        given, rest = {}, dict(value)
        for field in _fields(cls):
            name = json_name(field.name)
            if name in rest:
                given[field.name] = _checked(field.type, rest.pop(name), name, where)
            else:
                _require(_has_default(field), where, f"field '{name}' is missing")
        return cls(**given, extra=rest)

    def to_json(self) -> dict[str, Any]:
        """The JSON object, fields in their order."""
        fields = {json_name(field.name): _plain(getattr(self, field.name)) for field in _fields(type(self))}
        return fields | self.extra


def _extra() -> Any:
    return dataclasses.field(default_factory=dict, compare=False)


class Identity(NamedTuple):
    """The fields that identify the evaluation of a policy."""

    stage: str
    lam: float | None
    seed: int | None
    steps: int | None
    checkpoint: str | None = None  # its name, for stage EVALUATE alone
    guard: str = ""
    sweep: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OfPolicy(Record):
    """The first fields of a record of a policy."""

    run: str = ""
    stage: str
    lam: float | None = None
    seed: int | None = None
    steps: int | None = None
    guard: str = ""  # the options of opd.guard of the policy or forecast; "": none
    sweep: str = ""  # the policy's point of opd.sweep; "": none

    @property
    def identity(self) -> Identity:
        """There is one result per identity."""
        checkpoint = self.run if self.stage == EVALUATE else None
        return Identity(self.stage, self.lam, self.seed, self.steps, checkpoint, self.guard, self.sweep)

    @property
    def policy(self) -> tuple[str, float | None, str | None, str, str]:
        """Stage, λ, checkpoint, guard and point: the records of one policy differ in seed and steps alone."""
        return (self.stage, self.lam, self.identity.checkpoint, self.guard, self.sweep)

    def to_json(self) -> dict[str, Any]:
        """The JSON object; without the point of a sweep where there is none."""
        values = super().to_json()
        return values if self.sweep else {name: x for name, x in values.items() if name != "sweep"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned(_OfPolicy):
    """A policy that a job is to train and evaluate, an entry of runs.json."""

    extra: dict[str, Any] = _extra()


OPTIONAL = (
    "checkpoint",
    "collapsed_at",
    "forgetting",
    "guarded",
    "lambda_end",
    "structural_margin",
    "weights",
)
"""Further fields that some `Result`s have, in their `extra`."""

FREE, REPAIRED = "free", "_repaired"
"""The decoding of a policy as it is; the ending of a decoding's name where its task repaired the answers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding(Record):
    """One way to decode a policy: FREE, or under a constraint; other metrics of its task are in `extra`.

    `ms_per_token`: the time of a batch over its longest answer, None for what only repairs another decoding.
    """

    decoding: str
    ms_per_token: float | None = None
    n: int | None = None
    parse: float | None = None
    useful: float | None = None
    ended: float | None = None
    failures: Counts = dataclasses.field(default_factory=dict)
    intervals: Intervals = dataclasses.field(default_factory=dict)
    extra: dict[str, Any] = _extra()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The record of values by their names in the file."""
        known = {field.name for field in _fields(cls)}
        fields = {name: value for name, value in values.items() if name in known}
        return cls(**fields, extra={name: value for name, value in values.items() if name not in known})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result(_OfPolicy):
    """An evaluated policy, an entry of results.json: what task.metrics.summarize says about its answers.

    A metric is None where no list defines it.
    """

    n: int | None = None  # lists
    gain: str | None = None
    parse: float | None = None
    ndcg_1: float | None = None
    ndcg_3: float | None = None
    ndcg_5: float | None = None
    ndcg_10: float | None = None
    tau: float | None = None
    mae: float | None = None
    useful: float | None = None
    expected_mae: float | None = (
        None  # of expected scores, over all lists, parsed or not (stages/expected.py)
    )
    ended: float | None = None  # share of answers that close with EOS before the budget does, parsed or not
    failures: Counts = dataclasses.field(default_factory=dict)
    counted: Counts = dataclasses.field(default_factory=dict)  # metric -> lists in its mean
    intervals: Intervals = dataclasses.field(default_factory=dict)
    decodings: tuple[Decoding, ...] = ()  # of evaluation.constrained
    extra: dict[str, Any] = _extra()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The record of values by their names in the file or here; metrics that only one task has are `extra`."""
        known = {field.name for field in _fields(cls)}
        given = {attribute(name): value for name, value in values.items()}
        fields = {name: value for name, value in given.items() if name in known}
        return cls(**fields, extra={name: value for name, value in given.items() if name not in known})

    def to_json(self) -> dict[str, Any]:
        """The JSON object; without decodings that were not asked for and, of a task that does not rank, rankings."""
        absent = {name for name in _OF_RANKINGS if self.counted and name not in self.counted}
        values = {k: v for k, v in super().to_json().items() if v is not None or k not in absent}
        if not self.decodings:
            del values["decodings"]
        return values

    def metric(self, name: str) -> float | None:
        """A metric by its name in the file, e.g. ndcg@1; None too for one that the record does not have."""
        value = getattr(self, attribute(name)) if attribute(name) in _NUMBERS else self.extra.get(name)
        return value if is_number(value) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(_OfPolicy):
    """One answer of an evaluated policy, an entry of examples.json."""

    key: str = ""
    prompt: str = ""
    output: str = ""
    failure: str = ""
    true_scores: list[float] | None = None
    scores: list[float] | None = None
    extra: dict[str, Any] = _extra()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Errors(_OfPolicy):
    """The errors behind `expected_mae`, list by list: an entry of errors.json, for differences paired by list."""

    errors: list[float]
    extra: dict[str, Any] = _extra()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassRow(Record):
    """One token class in a calibration; p, b and λ* over kept positions, λ_flip (None: no λ flips it) over all."""

    token_class: str = ""
    positions: int | None = None
    kept: int | None = None
    p: float | None = None
    b: float | None = None
    lam: float | None = None
    reason: str | None = None  # why there is no λ*
    flip_min: float | None = None
    flip_percentile_1: float | None = None
    flip_percentile_5: float | None = None
    flip_percentile_25: float | None = None
    flip_percentile_50: float | None = None
    extra: dict[str, Any] = _extra()


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlipRow(Record):
    """Over lists, the smallest λ_flip of a list's structural positions or of all; None stands for ∞."""

    positions: str = ""  # structural or all
    min: float | None = None
    percentile_1: float | None = None
    percentile_5: float | None = None
    percentile_25: float | None = None
    percentile_50: float | None = None
    never: float | None = None  # share of lists without any flip
    extra: dict[str, Any] = _extra()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForecastFlips(Record):
    """Along the forecast's own answers at λ: over lists, the smallest λ_flip of a list's structural positions.

    There, structural is where the contract dictates the teacher's token or the one that is written in its place: a
    mark where the teacher has a score breaks a list, too. None stands for ∞.
    """

    lam: float
    agreement: float  # share of answers that are the teacher's own greedy answer
    flipped: (
        float  # share of lists with a structural flip below λ: the target left the teacher's structure there
    )
    min: float | None = None
    percentile_1: float | None = None
    percentile_5: float | None = None
    percentile_25: float | None = None
    percentile_50: float | None = None
    never: float | None = None  # share of lists without any flip
    guard: str = ""  # of the forecast
    extra: dict[str, Any] = _extra()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvePoint(Record):
    """The share of lists with a flip below λ."""

    lam: float
    structural: float
    all: float
    extra: dict[str, Any] = _extra()


@dataclasses.dataclass(frozen=True, kw_only=True)
class StripToken(Record):
    """One token of one answer of the teacher: its probability under teacher (p) and base (b), and its λ_flip."""

    text: str
    token_class: str = ""
    p: float
    b: float
    flip: float | None = None  # None: no λ flips it
    extra: dict[str, Any] = _extra()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration(Record):
    """The thresholds that teacher and base give before any update, calibration.json (stages/calibrate.py).

    Over the positions with p ≥ tau (EC Prop. 4.3; means over prompts of within-prompt means): p_typ and p_safe, mean
    and maximum over prompts of the within-prompt mean of p; b_measured, mean of b; b_implied, p_typ·exp(−mean(log π_T −
    log π_B)); each λ* is that of p_typ or p_safe with one of the b. p_max … p_min: over the positions alone.
    """

    clip: float | None = None  # None: no clip
    tau: float | None = None
    prompts: int | None = None
    positions: int | None = None
    kept: int | None = None
    p_typ: float | None = None
    p_safe: float | None = None
    b_measured: float | None = None
    b_implied: float | None = None
    lambda_typ_measured: float | None = None
    lambda_typ_implied: float | None = None
    lambda_safe_measured: float | None = None
    lambda_safe_implied: float | None = None
    p_max: float | None = None
    p_mean: float | None = None
    p_geometric_mean: float | None = None
    p_percentile_5: float | None = None
    p_min: float | None = None
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)  # field -> why it is None
    intervals: Intervals = dataclasses.field(default_factory=dict)  # 95 % percentile bootstrap over prompts
    classes: tuple[ClassRow, ...] = ()
    flips: tuple[FlipRow, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    forecasts: tuple[ForecastFlips, ...] = ()  # ascending λ, at each the plain one first
    strip: tuple[StripToken, ...] = ()  # the answer in which a structural token flips first
    notes: list[str] = dataclasses.field(default_factory=list)
    extra: dict[str, Any] = _extra()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction(Record):
    """The parse of trained students as a predictor gives it before they are trained, an entry of predictions.json.

    `low` and `high`: a 90 % band for the mean over the sweep's seeds; None where the predictor has none.
    """

    predictor: str  # nominal, limit, anchors, fixed_text or both (stages/predict.py)
    lambdas: list[float] | None = None
    parse: list[float] | None = None
    low: list[float] | None = None
    high: list[float] | None = None
    steps: int | None = None  # of the runs it predicts
    seeds: list[float] | None = None
    anchors: int = 0  # runs that it looked at
    seconds: float | None = None  # that it took here, without its anchors
    fit: dict[str, Any] = dataclasses.field(default_factory=dict)  # what it took from the anchors
    why: str = ""
    chosen: bool = False  # by the rule of stages/predict.py
    extra: dict[str, Any] = _extra()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recommendation(Record):
    """The recommendation of the forecasts before any training, recommendation.json (recommend.py)."""

    lam: float
    parse: float  # forecast at λ
    useful: float | None = None
    holds_to: float  # the largest λ up to which the forecast holds the contract
    lines: list[str] = dataclasses.field(default_factory=list)  # λ, why and what next, in words
    extra: dict[str, Any] = _extra()


# --- files ---


def read_runs(path: str | os.PathLike) -> list[Planned]:
    """The records of a runs.json; [] if there is no such file."""
    return _entries(Planned, _read(path), str(path), "run")


def results(value: Any, where: str) -> list[Result]:
    """The records of results.json from its JSON value; UserError, which begins with `where`, if it holds others."""
    return _entries(Result, value, where, "record")


def read_results(path: str | os.PathLike) -> list[Result]:
    """The records of a results.json; [] if there is no such file."""
    return results(_read(path), str(path))


def read_examples(path: str | os.PathLike) -> list[Example]:
    """The records of an examples.json; [] if there is no such file."""
    return _entries(Example, _read(path), str(path), "example")


def read_errors(path: str | os.PathLike) -> list[Errors]:
    """The records of an errors.json; [] if there is no such file."""
    found = _entries(Errors, _read(path), str(path), "record")
    for i, record in enumerate(found):
        numbers = all(map(is_number, record.errors)) and len(record.errors) == len(found[0].errors) > 0
        _require(numbers, f"{path}: record {i}", "must have one number per list in 'errors'")
    return found


def read_calibration(path: str | os.PathLike) -> Calibration | None:
    """The record of a calibration.json; None if there is no such file."""
    return _only(Calibration, path)


def read_predictions(path: str | os.PathLike) -> list[Prediction]:
    """The records of a predictions.json; [] if there is no such file."""
    found = _entries(Prediction, _read(path), str(path), "prediction")
    for i, record in enumerate(found):
        columns = [x for x in (record.lambdas, record.parse, record.low, record.high) if x is not None]
        fits = all(len(x) == len(record.lambdas or ()) and all(map(is_number, x)) for x in columns)
        fits = fits and (record.low is None) == (record.high is None)
        _require(fits, f"{path}: prediction {i}", "must have a number of each curve at each of 'lambdas'")
    return found


def read_recommendation(path: str | os.PathLike) -> Recommendation | None:
    """The record of a recommendation.json; None if there is no such file."""
    return _only(Recommendation, path)


def write_records(path: str | os.PathLike, records: Sequence[Record]) -> None:
    """Write a results.json or examples.json, whole or not at all."""
    files.write_json(path, [record.to_json() for record in records])


def _read(path: str | os.PathLike) -> Any:
    return files.read_json(path) if pathlib.Path(path).exists() else []


def _only(kind: type[Record], path: str | os.PathLike) -> Any:
    """The record of a file that holds one; None if there is no such file."""
    return kind.from_json(files.read_json(path), str(path)) if pathlib.Path(path).exists() else None


def _entries(kind: type[Record], value: Any, where: str, called: str) -> list[Any]:
    _require(isinstance(value, list), where, "must hold a list")
    return [kind.from_json(entry, f"{where}: {called} {i}") for i, entry in enumerate(value)]


# --- fields ---


def taken_names() -> set[str]:
    """The names of the records' own fields: a metric of that name would overwrite one."""
    fields = [field.name for kind in (Result, Decoding) for field in _fields(kind)]
    return {"extra", *OPTIONAL, *fields, *map(json_name, fields)}


_JSON_NAMES = {"lam": "lambda", "token_class": "class"} | {f"ndcg_{k}": f"ndcg@{k}" for k in (1, 3, 5, 10)}
_ATTRIBUTES = {name: attribute for attribute, name in _JSON_NAMES.items()}


def json_name(attribute: str) -> str:
    """The name in the files of a field of a record."""
    return _JSON_NAMES.get(attribute, attribute)


def attribute(name: str) -> str:
    """The name in a record of a field of the files."""
    return _ATTRIBUTES.get(name, name)


def is_number(value: Any) -> bool:
    """Whether `value`, read from JSON, is a finite float64: no boolean, NaN, infinity or huge integer."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def _maps_to(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


_TYPES: Mapping[Any, tuple[Callable[[Any], bool], str]] = {
    str: (lambda x: isinstance(x, str), "be text"),
    str | None: (lambda x: x is None or isinstance(x, str), "be text or null"),
    float: (is_number, "be a finite number"),
    float | None: (lambda x: x is None or is_number(x), "be a finite number or null"),
    int | None: (lambda x: x is None or is_number(x), "be a finite number or null"),
    int: (is_number, "be a finite number"),
    bool: (lambda x: isinstance(x, bool), "be true or false"),
    dict[str, Any]: (lambda x: isinstance(x, dict), "be an object"),
    list[str]: (lambda x: isinstance(x, list), "be a list"),
    list[float]: (lambda x: isinstance(x, list), "be a list"),
    list[float] | None: (lambda x: x is None or isinstance(x, list), "be a list or null"),
    dict[str, str]: (lambda x: isinstance(x, dict), "be an object"),
    Counts: (_maps_to(lambda x: is_number(x) and x >= 0), "map names to counts"),
    Intervals: (_maps_to(lambda x: x is None or _is_pair(x)), "map names to [low, high] or null"),
}
"""The rule for a field of each type."""


_OF_RANKINGS = ("gain", "ndcg@1", "ndcg@3", "ndcg@5", "ndcg@10", "tau", "mae")

_NUMBERS = frozenset("parse ndcg_1 ndcg_3 ndcg_5 ndcg_10 tau mae useful expected_mae ended".split())
"""The metrics that every record has a field for."""


def _fields(kind: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(kind) if field.name != "extra"]


def _has_default(field: dataclasses.Field) -> bool:
    return (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)


def _checked(kind: Any, value: Any, name: str, where: str) -> Any:
    """The value of a field of type `kind`; UserError if it is of another."""
    if typing.get_origin(kind) is tuple:
        _require(isinstance(value, list), where, f"field '{name}' must be a list")
        row = typing.get_args(kind)[0]
        return tuple(row.from_json(x, f"{where}: {name} {i}") for i, x in enumerate(value))
    fits, what = _TYPES[kind]
    _require(fits(value), where, f"field '{name}' must {what}")
    return value


def _plain(value: Any) -> Any:
    return [row.to_json() for row in value] if isinstance(value, tuple) else value


def _require(holds: bool, where: str, what: str) -> None:
    if not holds:
        raise UserError(f"{where}: {what}; fix it, or delete the file to have it made again")
