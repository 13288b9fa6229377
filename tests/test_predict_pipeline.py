"""Anchors, prediction and sweep as stages of a run, on models that know nothing."""

import json

import pytest
from test_reference import config_of, models  # noqa: F401 (a fixture)

from listopd_jax.stages.pipeline import run_stages

ANCHORS = {
    "predict.anchors": (1.0, 1.5),
    "predict.seeds": (1, 2),
    "opd.lambdas": (2.0,),
    "opd.seeds": (7,),
    "predict.largest_gap": 1.0,
    "predict.fixed_text_lists": 2,
}


def records(workdir, stage):
    found = json.loads((workdir / "results.json").read_text())
    return [(r["lambda"], r["seed"]) for r in found if r["stage"] == stage]


@pytest.mark.soak
def test_the_prediction_comes_before_the_sweep_and_stays(models, tmp_path):  # noqa: F811
    run_stages(config_of(models, **ANCHORS, **{"predict.only": True}), tmp_path)
    predictions = (tmp_path / "predictions.json").read_bytes()
    assert records(tmp_path, "anchor") == [(1.0, 1), (1.5, 1), (1.0, 2), (1.5, 2)] and not records(
        tmp_path, "opd"
    )
    found = json.loads(predictions)
    assert [p["predictor"] for p in found] == ["nominal", "limit", "anchors", "fixed_text"]
    assert [p["chosen"] for p in found] == [False, False, False, True], (
        "anchors of models that know nothing say nothing"
    )
    assert all(0 <= x <= 1 for p in found[:2] for x in p["parse"]) and found[0]["lambdas"] == [2.0]

    run_stages(config_of(models, **ANCHORS), tmp_path)
    assert records(tmp_path, "opd") == [(2.0, 7)] and len(records(tmp_path, "anchor")) == 4
    assert (tmp_path / "predictions.json").read_bytes() == predictions
