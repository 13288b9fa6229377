"""Which λ is recommended: properties of the rule, what it says of our own measurements, and a run that trains there."""

import dataclasses
import json
import pathlib
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import small_config, start_from

from listopd_jax import config as config_module
from listopd_jax.errors import UserError
from listopd_jax.recommend import CONTRACT_HOLDS, PARSE_LOST, Option, Setting, choose, recommend
from listopd_jax.records import Calibration, FlipRow, ForecastFlips, Result, read_results, read_runs, results
from listopd_jax.report.inputs import Inputs
from listopd_jax.report.recommendation import recommendation
from listopd_jax.stages import pipeline

DOCS = pathlib.Path(__file__).parents[1] / "docs" / "results"


def forecasts(*rows):
    """Forecasts of (λ, parse) or (λ, parse, useful), the interval of useful being ± .03."""
    wide = [(*row, None)[:3] for row in rows]
    return [
        Result(
            stage="forecast", lam=lam, parse=parse, useful=useful,
            intervals={} if useful is None else {"useful": [useful - 0.03, useful + 0.03]},
        )
        for lam, parse, useful in wide
    ]  # fmt: skip


def flips(percentile_5):
    return Calibration(flips=(FlipRow(positions="structural", percentile_5=percentile_5),))


def said(*rows, limit=None, **setting):
    return recommend(forecasts(*rows), flips(limit), Setting(**setting))


ROWS = st.lists(st.tuples(st.floats(0, 1), st.none() | st.floats(0, 1)), min_size=1, max_size=6)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.2)), min_size=1, max_size=6))
def test_the_smallest_about_as_useful_as_the_most_useful(cases):
    options = [Option(1 + i, useful, useful - width) for i, (useful, width) in enumerate(cases)]
    best = max(options, key=lambda o: o.useful)
    chosen = options[int(choose(options[::-1]).lam) - 1]
    assert chosen.useful >= best.low and all(o.useful < best.low for o in options if o.lam < chosen.lam)
    assert choose([o._replace(useful=None) for o in options]) is None


@given(ROWS, st.none() | st.floats(1, 4), st.booleans())
def test_what_is_recommended_is_forecast_to_hold_and_so_is_all_below(cases, limit, guarded):
    rows = [(1 + 0.5 * i, parse, useful) for i, (parse, useful) in enumerate(cases)]
    found = said(*rows, limit=limit, guarded=guarded)
    first = rows[0][1]
    assert 1 <= found.lam <= found.holds_to and len(found.lines) == 3
    assert all("\n" not in line for line in found.lines)
    for lam, parse, _ in rows[1:]:
        if lam <= found.holds_to:
            assert first >= CONTRACT_HOLDS and parse >= first - PARSE_LOST - 1e-6
            assert guarded or limit is None or lam < limit


def test_where_useful_is_unknown_it_is_the_largest_that_holds():
    found = said((1, 0.99), (1.5, 0.98), (2, 0.9), (3, 0.99))
    assert (found.lam, found.parse, found.holds_to) == (1.5, 0.98, 1.5)
    use, why, then = found.lines
    assert use == "recommended: λ = 1.5, where the forecast parses 0.980 (at λ = 1 parses 0.990)"
    assert "up to λ = 1.5; at 2 it parses 0.900; without right answers" in why
    assert then.endswith("--config.opd.guard.margin=1.25 --config.opd.guard.fallback=base")


def test_flips_end_what_holds_unless_a_guard_stands():
    rows = (1, 0.99, 0.5), (2, 0.99, 0.6), (3, 0.99, 0.7)
    assert said(*rows).lam == 3 and said(*rows, limit=2.5).lam == 2
    assert "5 % of the teacher's answers flip a structural token below 2.5" in said(*rows, limit=2.5).lines[1]
    assert said(*rows, limit=1.2, guarded=True).lam == 3
    own = tuple(ForecastFlips(lam=lam, agreement=0, flipped=x) for lam, x in ((1, 0), (2, 0.05), (3, 0.06)))
    found = recommend(forecasts(*rows), Calibration(forecasts=own), Setting())
    assert found.lam == 2 and "at 3 more than 5 % of its own answers flip" in found.lines[1]
    assert recommend(forecasts(*rows), Calibration(forecasts=own), Setting(guarded=True)).lam == 3


def test_a_teacher_that_breaks_the_contract_speaks_for_no_larger_lambda():
    found = said((1, 0.5, 0.4), (2, 0.9, 0.8))
    assert (found.lam, found.holds_to) == (1, 1) and "parse below 0.8" in found.lines[1]
    assert "guard" not in found.lines[2]
    of_reviews = recommend(forecasts((1, 0.5, 0.4), (2, 0.9, 0.8)), None, Setting(reviews=True))
    assert of_reviews.lam == 1 and "--config.opd.guard.mask=True" in of_reviews.lines[2]
    masked = recommend(forecasts((1, 0.5, 0.4)), None, Setting(guarded=True, reviews=True))
    assert "guard" not in masked.lines[2]


def test_without_lambda_one_nothing_can_be_compared():
    assert (
        recommend(forecasts((1.5, 0.9)), None, Setting()) is None and recommend([], None, Setting()) is None
    )
    assert said((0.5, 0.2), (1, 0.9), (2, 0.9)).holds_to == 2


# ---- our own measurements


def measured(path):
    value = json.loads((DOCS / path).read_text())
    value = value["records"] if isinstance(value, dict) else value
    return [record for record in results(value, path) if record.stage == "forecast"]


def test_the_pair_that_gained_is_told_to_go_beyond_one_under_the_guard_and_the_control_is_not():
    guarded = Setting(guarded=True, reviews=True)
    assert recommend(measured("gain/guarded/results.json"), None, guarded).lam == 1.5
    assert recommend(measured("gain/independent_guarded/results.json"), None, guarded).lam == 1


def test_without_a_guard_both_cliffs_are_seen_and_the_guard_is_named_where_it_pays():
    found = recommend(measured("gain/same/results.json"), None, Setting(reviews=True))
    assert found.lam == found.holds_to == 1 and "at 1.25 it parses 0.003" in found.lines[1]
    assert "scores gain (expected MAE 1.563 at λ = 1.5, 1.605 here)" in found.lines[2]
    assert found.lines[2].endswith("--config.opd.guard.mask=True")
    tiny = recommend(measured("tiny.json"), None, Setting(reviews=True))
    assert (tiny.lam, tiny.holds_to) == (1, 1.05)


def test_a_pretrained_pair_that_gains_nothing_is_told_where_it_breaks_and_to_stay():
    saved = json.loads((DOCS / "smollm2_h200.json").read_text())["second_call"]
    teacher, _, *rest = results(saved["records"], "smollm2_h200.json")
    first = dataclasses.replace(teacher, stage="forecast", lam=1.0)  # at λ = 1 the target is the teacher
    rows = [first, *(record for record in rest if record.stage == "forecast")]
    found = recommend(rows, Calibration.from_json(saved["calibration"], "smollm2"), Setting(reviews=True))
    assert (found.lam, found.holds_to) == (1, 2.5) and "at 3 it parses 0.930" in found.lines[1]


def test_past_a_cliff_that_gains_nothing_no_guard_is_named():
    rows = [Result(stage="forecast", lam=lam, parse=p, expected_mae=1.5) for lam, p in ((1, 0.9), (2, 0.1))]
    assert recommend(rows, None, Setting()).lines[2].startswith("next: stay here")


# ---- in a run


def test_a_run_trains_at_what_was_recommended_and_a_resumed_one_at_the_same(
    finished_job, tmp_path, monkeypatch, capsys
):
    fields = {"opd.recommend": True, "opd.lambdas": (2.0,), "forecast.lambdas": (1.0,)}
    config = small_config(**start_from(finished_job), **fields)
    monkeypatch.setattr(pipeline, "distil", distil := Mock())
    pipeline.run_stages(config, tmp_path)
    assert "recommended: λ = 1, " in capsys.readouterr().err
    first = (tmp_path / "recommendation.json").read_bytes()
    rows = read_results(tmp_path / "results.json")
    (tmp_path / "results.json").write_text(
        json.dumps(
            [r.to_json() | ({"parse": 0.9, "useful": None} if r.stage == "forecast" else {}) for r in rows]
        )
    )
    pipeline.run_stages(config, tmp_path)
    assert (tmp_path / "recommendation.json").read_bytes() == first, "though the forecasts now say 2"
    assert "\n".join(json.loads(first)["lines"]) in capsys.readouterr().err
    assert {r.lam for r in read_runs(tmp_path / "runs.json") if r.stage == "opd"} == {1.0}
    trained = [{(run.lam, run.seed) for run in call.args[2]} for call in distil.call_args_list]
    assert trained == [{(1.0, 0)}, {(1.0, 0)}]


def test_a_plain_run_has_its_recommendation_and_trains_its_own_lambdas(finished_job):
    found = json.loads((finished_job / "recommendation.json").read_text())
    assert found["lambda"] == 1.0 and len(found["lines"]) == 3
    assert {r.lam for r in read_results(finished_job / "results.json") if r.stage == "opd"} == {1.0, 2.0}


def test_before_distillation_the_report_says_what_the_forecasts_recommend():
    found = said((1, 0.99), (2, 0.98))
    assert [advice.text[:1] for advice in recommendation(Inputs(recommendation=found))] == ["R", "W", "N"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"opd.lambdas": (1.5, 2.0)}, "add 1.0 to forecast.lambdas"),
        ({"opd.advantage": "no_base"}, "base-relative target"),
    ],
)
def test_a_recommendation_that_cannot_be_made_is_refused(fields, says):
    config = config_module.defaults()
    config.update_from_flattened_dict({"opd.recommend": True} | fields)
    with pytest.raises(UserError, match=says):
        config_module.validate(config)
