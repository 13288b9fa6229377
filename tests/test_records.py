"""The records of a run's files: what is written is read back, older and newer files too."""

import dataclasses
import json

import pytest

from listopd_jax import config as config_module
from listopd_jax.errors import UserError
from listopd_jax.records import (
    Calibration,
    ClassRow,
    CurvePoint,
    Example,
    FlipRow,
    ForecastFlips,
    Result,
    read_calibration,
    read_examples,
    read_recommendation,
    read_results,
    results,
    write_records,
)
from listopd_jax.stages.evaluate import Answer, result_record
from listopd_jax.task.contract import Parsed
from listopd_jax.task.metrics import METRICS
from listopd_jax.task.prompt import ListExample
from listopd_jax.tasks.reviews import Reviews

HEAD = {"run": "opd_lambda1.2_seed0", "stage": "opd", "lam": 1.2, "seed": 0, "steps": 60}
ANSWERS = [
    Answer(0, "[…]", Parsed("ok", (3.0, 1.0)), ended=False),
    Answer(1, "?", Parsed("no_json")),
]
LISTS = [ListExample(key, "p", "t", ("a", "b"), scores) for key, scores in (("one", (3, 1)), ("two", (0, 2)))]
TASK = Reviews(None, config_module.defaults().task)
MADE = Calibration(
    clip=5.0, prompts=2, p_typ=0.9, reasons={"lambda_typ_measured": "b ≥ p"}, intervals={"p_typ": [0.8, 1.0]},
    classes=(ClassRow(token_class="comma", positions=3, lam=1.3),), notes=["two prompts"],
    flips=(FlipRow(positions="all", min=1.1, never=0.5),), curve=(CurvePoint(lam=1.0, structural=0, all=0.25),),
    forecasts=(ForecastFlips(lam=1.5, agreement=0.5, flipped=0.25, min=1.2),),
)  # fmt: skip


def test_a_result_has_every_metric_under_its_name_and_comes_back(tmp_path):
    made = result_record(TASK, LISTS, ANSWERS, HEAD, bootstrap=20)
    write_records(tmp_path / "results.json", [made])
    (saved,) = json.loads((tmp_path / "results.json").read_text())
    assert list(saved)[:8] == ["run", "stage", "lambda", "seed", "steps", "guard", "n", "gain"]
    assert list(saved)[8:] == [*METRICS, "expected_mae", "ended", "failures", "counted", "intervals"]
    assert [made.metric(name) for name in METRICS] == [saved[name] for name in METRICS]
    assert read_results(tmp_path / "results.json") == [made] and made.parse == 0.5
    assert made.ended == 0.5, "an answer that parses and never stops is told from one that ends"


def test_a_calibration_comes_back(tmp_path):
    (tmp_path / "calibration.json").write_text(json.dumps(MADE.to_json()))
    assert read_calibration(tmp_path / "calibration.json") == MADE
    assert MADE.to_json()["classes"][0]["class"] == "comma" and MADE.to_json()["curve"][0]["lambda"] == 1.0


def test_no_file_is_nothing_yet(tmp_path):
    assert read_results(tmp_path / "results.json") == read_examples(tmp_path / "examples.json") == []
    assert read_calibration(tmp_path / "calibration.json") is None


def test_an_older_record_has_defaults_and_what_a_newer_one_has_besides_is_kept():
    (bare,) = results([{"stage": "opd"}], "here")
    assert bare == Result(stage="opd") and bare.useful is None and bare.intervals == {}
    newer = Example(stage="opd").to_json() | {"grammar": "json", "depth": [1]}
    assert Example.from_json(newer, "here").to_json() == newer


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        (Result, [], "here: must be an object"),
        (Result, {"lambda": 1.0}, "here: field 'stage' is missing"),
        (Result, {"stage": 3}, "here: field 'stage' must be text"),
        (Result, {"stage": "opd", "ndcg@1": True}, "here: field 'ndcg@1' must be a finite number or null"),
        (Example, {"stage": "opd", "output": None}, "here: field 'output' must be text"),
        (Calibration, {"classes": {}}, "here: field 'classes' must be a list"),
        (Calibration, {"classes": [{"lambda": "1"}]}, "here: classes 0: field 'lambda' must be a finite"),
    ],
)
def test_what_is_no_record_is_one_line_with_file_and_field(kind, value, says):
    with pytest.raises(UserError) as error:
        kind.from_json(value, "here")
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["NaN", "1e999", '"\\ud800"', "[" * 9000 + "]" * 9000])
def test_what_could_not_be_written_again_is_not_read(tmp_path, value):
    """Fields that are not known are kept, so they must be JSON that a file can hold."""
    path = tmp_path / "results.json"
    path.write_text(f'[{{"stage": "opd", "grammar": {value}}}]')
    with pytest.raises(UserError, match="results.json: not readable as JSON"):
        read_results(path)


@pytest.mark.parametrize("read", [read_calibration, read_recommendation])
def test_a_file_that_holds_null_is_not_taken_for_none(tmp_path, read):
    (tmp_path / "file.json").write_text("null")
    with pytest.raises(UserError, match="file.json: must be an object"):
        read(tmp_path / "file.json")


@pytest.mark.parametrize("kind", [Result, Example, ClassRow, FlipRow, CurvePoint, Calibration])
def test_every_field_has_a_type_that_is_checked(kind):
    numbers = {"lam": 1.0, "structural": 0.0, "all": 0.0, "stage": "opd"}
    given = {f.name: numbers[f.name] for f in dataclasses.fields(kind) if f.name in numbers}
    made = kind(**given)
    assert kind.from_json(made.to_json(), "here") == made
