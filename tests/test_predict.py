"""The predict stage on a planted pair, and locks of what it predicts."""

import dataclasses
import json
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest

from listopd_jax.errors import UserError
from listopd_jax.prereg import __main__ as prereg
from listopd_jax.prereg.curve import judge_curve, make_curve_lock, noise_floor
from listopd_jax.prereg.curves import figures, judged_pairs
from listopd_jax.records import PREDICTIONS, Prediction, Result, read_predictions, write_records
from listopd_jax.report.inputs import Inputs
from listopd_jax.report.prediction_section import prediction_section, prediction_series
from listopd_jax.stages import predict as stage

SHARED = SimpleNamespace(frozen=None)  # of models, which are not looked at
LAMBDAS, SEEDS, STEPS = (1.1, 1.2, 1.3, 1.4, 1.6, 1.8), (7, 13), 100


def target(lam):
    """Parse of greedy answers from the target, and 0.05 further right from the limit."""
    return 1 / (1 + np.exp((np.asarray(lam) - 1.25) / 0.04))


def trained(lam):
    return target(0.99 + 0.7 * (np.asarray(lam) - 1))


@pytest.fixture
def job(tmp_path, monkeypatch):
    """What the stage reads of a job; models are stood in for by the planted curves."""
    guard = SimpleNamespace(margin=0, mask=False, floor=0, structure=-1, scope="all", fallback="teacher")
    opd = SimpleNamespace(
        lambdas=LAMBDAS, seeds=SEEDS, steps=STEPS, guard=guard, estimator="sampled", ratio="teacher_student",
        normalize=False, clip=5.0, kl_to_base=0.0, entropy_bonus=0.0, contract_reward=0.0, ema=0.0,
        on_policy=1.0, updates_per_batch=1, constrained_rollouts="",
    )  # fmt: skip
    options = SimpleNamespace(anchors=(1.2, 1.4, 1.6), seeds=(1, 2), largest_gap=0.05, fixed_text_lists=0)
    decoded = []

    def parse_at(job, frozen, lambdas, guard):
        decoded.append(lambdas)
        return target(lambdas - 0.05 * (guard is not None))

    monkeypatch.setattr(stage, "_decoded", parse_at)
    monkeypatch.setattr(
        stage, "evaluated", lambda workdir, run: Result(stage=run.stage, parse=float(trained(run.lam)))
    )
    validation = SimpleNamespace(prompts=range(1000))
    return SimpleNamespace(
        workdir=tmp_path, config=SimpleNamespace(opd=opd, predict=options), validation=validation,
        guard_of=lambda text: None, decoded=decoded,
    )  # fmt: skip


def predictions(job):
    return {p.predictor: p for p in read_predictions(job.workdir / PREDICTIONS)}


def test_the_anchors_find_the_planted_curve(job, capsys):
    stage.predict(job, SHARED)
    found = predictions(job)
    assert list(found) == ["nominal", "limit", "anchors"] and [p.chosen for p in found.values()] == [
        False,
        False,
        True,
    ]
    chosen = found["anchors"]
    assert chosen.lambdas == list(LAMBDAS) and chosen.anchors == 6 and chosen.steps == STEPS
    np.testing.assert_allclose(chosen.parse, trained(LAMBDAS), atol=0.02)
    assert chosen.fit["slope"] == pytest.approx(0.7, abs=0.02)
    np.testing.assert_allclose(found["nominal"].parse, target(LAMBDAS), atol=0.03)
    assert "anchors" in capsys.readouterr().err


def test_a_prediction_is_made_once_for_a_sweep(job):
    stage.predict(job, SHARED)
    calls, before = len(job.decoded), (job.workdir / PREDICTIONS).read_bytes()
    stage.predict(job, SHARED)
    assert len(job.decoded) == calls and (job.workdir / PREDICTIONS).read_bytes() == before
    job.config.opd.lambdas = LAMBDAS[1:]
    stage.predict(job, SHARED)
    assert predictions(job)["anchors"].lambdas == list(LAMBDAS[1:])


def test_a_prediction_stays_once_its_sweep_has_begun(job):
    stage.predict(job, SHARED)
    before = (job.workdir / PREDICTIONS).read_bytes()
    (job.workdir / "results.json").write_text(json.dumps(sweep(0.0)[:1]))
    job.config.opd.lambdas, job.config.predict.anchors = (*LAMBDAS, 2.0), (1.2, 1.3)
    stage.predict(job, SHARED)
    assert (job.workdir / PREDICTIONS).read_bytes() == before


def test_where_anchors_say_nothing_the_limit_is_chosen(job, monkeypatch):
    monkeypatch.setattr(stage, "evaluated", lambda workdir, run: Result(stage=run.stage, parse=1.0))
    stage.predict(job, SHARED)
    found = predictions(job)
    assert found["limit"].chosen and found["anchors"].parse is None
    assert "0 of 6 anchor runs" in found["anchors"].why


def test_students_on_fixed_texts_are_a_predictor_if_asked_for(job, monkeypatch):
    parse = np.stack([trained(LAMBDAS), np.clip(trained(LAMBDAS) + 0.02, 0, 1)])
    monkeypatch.setattr(stage, "fixed_text_parse", lambda job, shared, lambdas: parse)
    stage.predict(job, SHARED)
    job.config.predict.fixed_text_lists, job.config.opd.ema = 64, 0.9
    stage.predict(job, SHARED)  # another prediction
    found = predictions(job)
    assert list(found) == ["nominal", "limit", "anchors", "fixed_text", "both"]
    assert [name for name, p in found.items() if p.chosen] == ["both"] and found["both"].anchors == 6
    middle = np.mean([found["anchors"].parse, found["fixed_text"].parse], 0)
    np.testing.assert_allclose(found["both"].parse, middle)
    assert all(np.less(found["both"].low, middle)) and all(np.less(middle, found["both"].high))
    np.testing.assert_allclose(found["fixed_text"].parse, parse.mean(0))
    assert all(np.less_equal(found["fixed_text"].low, found["fixed_text"].parse))
    assert found["fixed_text"].why.endswith("64 lists, without rollouts, 2 seeds, without ema")


def test_where_anchors_say_nothing_fixed_texts_are_chosen(job, monkeypatch):
    job.config.predict.fixed_text_lists = 64
    monkeypatch.setattr(stage, "fixed_text_parse", lambda job, shared, lambdas: np.ones((2, len(lambdas))))
    monkeypatch.setattr(stage, "evaluated", lambda workdir, run: Result(stage=run.stage, parse=1.0))
    stage.predict(job, SHARED)
    assert [name for name, p in predictions(job).items() if p.chosen] == ["fixed_text"]
    assert "both" not in predictions(job)


def test_a_target_that_is_the_limit_is_decoded_once(job):
    job.config.opd.estimator = "full_vocab"
    stage.predict(job, SHARED)
    assert list(predictions(job)) == ["nominal", "anchors"]


@pytest.mark.parametrize("sweep", [LAMBDAS, (0.25, 0.5, 0.8), (1.0,)])
def test_the_decoded_grid_holds_every_lambda_of_the_sweep(job, sweep):
    job.config.opd.lambdas, job.config.predict.anchors = sweep, sweep[:1]
    found = stage.shape(job, None, None).lambdas
    assert found[0] <= min(sweep) and found[-1] >= max(sweep)
    assert (np.diff(found) > 0).all()


def test_fixed_texts_predict_without_anchors(job, monkeypatch):
    job.config.predict.anchors, job.config.predict.fixed_text_lists = (), 64
    monkeypatch.setattr(stage, "fixed_text_parse", lambda job, shared, lambdas: np.ones((2, len(lambdas))))
    stage.predict(job, SHARED)
    assert (
        list(predictions(job)) == ["nominal", "limit", "fixed_text"] and predictions(job)["fixed_text"].chosen
    )


def test_without_anchors_nothing_is_predicted(job):
    job.config.predict.anchors = ()
    stage.predict(job, SHARED)
    assert not (job.workdir / PREDICTIONS).exists() and not job.decoded


# --- locks ---

CONFIG = {"opd": {"lambdas": list(LAMBDAS), "seeds": list(SEEDS), "steps": STEPS}, "predict": {"only": True}}


def sweep(shift, spread=0.02):
    means = np.clip(trained(LAMBDAS) + shift, 0, 1)
    signs = {seed: sign for seed, sign in zip(SEEDS, (1, -1), strict=True)}
    return [
        {
            "stage": "opd",
            "lambda": lam,
            "seed": seed,
            "steps": STEPS,
            "parse": float(np.clip(y + s * spread, 0, 1)),
        }
        for seed, s in signs.items()
        for lam, y in zip(LAMBDAS, means, strict=True)
    ]


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, "pass"), (0.2, "fail")])
def test_a_locked_curve_is_judged_by_its_rmse(job, shift, verdict):
    stage.predict(job, SHARED)
    lock = make_curve_lock(job.workdir, CONFIG)
    found = judge_curve(lock, sweep(shift))
    assert found["verdict"] == verdict and found["goal"] == max(0.05, 1.25 * found["floor"])
    by_name = {p["predictor"]: p for p in found["predictors"]}
    if verdict == "pass":
        assert by_name["nominal"]["rmse"] > 0.1 > by_name["anchors"]["rmse"]
        assert by_name["anchors"]["inside"] >= 4


def test_the_floor_is_the_error_of_means():
    parse = np.array([[0.4, 0.9], [0.6, 0.9]])
    assert noise_floor(parse) == pytest.approx(np.sqrt((0.02 / 2 + 0) / 2))


def test_a_curve_is_locked_before_its_sweep_and_never_after(job, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"config": CONFIG}))
    with pytest.raises(UserError, match="no prediction to lock"):
        make_curve_lock(tmp_path, CONFIG)
    stage.predict(job, SHARED)
    path = tmp_path / "lock.json"
    assert prereg.main(["curve", f"--workdir={tmp_path}", f"--out={path}"]) == 0
    assert prereg.main(["verify", f"--lock={path}", f"--config={tmp_path / 'config.json'}"]) == 0
    goes_on = {"config": CONFIG | {"predict": {"only": False}}, "revision": "another"}
    (tmp_path / "config.json").write_text(json.dumps(goes_on))
    (tmp_path / "results.json").write_text(json.dumps(sweep(0.0)))
    assert prereg.main(["verdict", f"--lock={path}", f"--workdir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "anchors (chosen): RMSE" in said and "run with another" in said
    with pytest.raises(UserError, match="holds 12 runs of the sweep"):
        make_curve_lock(tmp_path, CONFIG)
    changed = json.loads(path.read_text())
    changed["predictions"][-1]["parse"][0] = 0.0
    path.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="changed since it was locked"):
        prereg.run(["verdict", f"--lock={path}", f"--workdir={tmp_path}"])


@pytest.mark.parametrize(("field", "values"), [("seeds", (7,)), ("lambdas", (1.3,))])
def test_a_curve_that_no_verdict_could_judge_is_not_locked(job, field, values):
    setattr(job.config.opd, field, values)
    stage.predict(job, SHARED)
    with pytest.raises(UserError, match="two"):
        make_curve_lock(job.workdir, CONFIG)


def test_several_curves_are_one_list_beside_what_needs_no_predictor(job, tmp_path):
    stage.predict(job, SHARED)
    locks = []
    for pair, shift in (("near", 0.0), ("far", 0.2)):
        locks.append(tmp_path / f"{pair}.json")
        locks[-1].write_text(json.dumps(make_curve_lock(job.workdir, CONFIG)))
        (tmp_path / pair).mkdir()
        (tmp_path / pair / "results.json").write_text(json.dumps(sweep(shift)))
    out = tmp_path / "forecast.json"
    assert prereg.main(["curves", *map(str, locks), f"--runs={tmp_path}", f"--out={out}"]) == 0
    rows = {(r["pair"], r["predictor"]): r for r in json.loads(out.read_text())}
    assert (
        rows["near", "anchors"]["chosen"]
        and rows["near", "anchors"]["pass"]
        and not rows["far", "anchors"]["pass"]
    )
    assert (
        rows["near", "anchors"]["rmse"]
        < rows["near", "nominal"]["rmse"]
        < rows["near", "best_constant"]["rmse"]
    )
    assert rows["near", "logistic_of_far"]["baseline"] and rows["near", "logistic_of_far"]["rmse"] > 0.1


def test_the_committed_file_is_what_the_committed_locks_and_records_give():
    """Up to the last digits of the logistics, which are fitted."""
    docs = pathlib.Path(__file__).resolve().parents[1] / "docs"
    locks = sorted((docs / "locks" / "forecast").glob("*.json"))
    found = figures(judged_pairs(locks, docs / "results" / "forecast"), locks)
    committed = json.loads((docs / "results" / "forecast.json").read_text("utf-8"))
    for row, expected in zip(committed, found, strict=True):
        path = pathlib.Path(expected["lock"]).relative_to(docs.parent).as_posix()
        assert row == expected | {"lock": path, "rmse": pytest.approx(expected["rmse"], abs=1e-6)}
    chosen = [row["pair"] for row in committed if row["chosen"]]
    assert chosen == [path.stem for path in locks]


def test_two_locks_of_one_name_and_the_lock_of_a_threshold_are_one_line(job, tmp_path):
    stage.predict(job, SHARED)
    paths = [tmp_path / "pair.json", tmp_path / "pair" / "pair.json"]
    paths[1].parent.mkdir()
    (tmp_path / "pair" / "results.json").write_text(json.dumps(sweep(0.0)))
    for path in paths:
        path.write_text(json.dumps(make_curve_lock(job.workdir, CONFIG)))
    more = [f"--runs={tmp_path}", f"--out={tmp_path / 'out.json'}"]
    with pytest.raises(UserError, match="a second lock called pair"):
        prereg.main(["curves", *map(str, paths), *more])
    threshold = sorted((pathlib.Path(__file__).parents[1] / "docs/locks").rglob("clip_200.json"))[0]
    with pytest.raises(UserError, match="is the lock of a threshold, not of a curve"):
        prereg.main(["curves", str(threshold), *more])


# --- the report ---


def test_the_report_shows_the_chosen_curve_beside_what_came(job):
    stage.predict(job, SHARED)
    found = list(predictions(job).values())
    results = [Result.from_json(r, "r") for r in sweep(0.0)]
    section = prediction_section(Inputs(predictions=found, results=results))
    assert [t.caption for t in section.tables] == ["Predictors", "Parse by anchors"]
    rows = section.tables[0].rows
    assert [row[0].text for row in rows] == ["nominal", "limit", "anchors, chosen"]
    judged = judge_curve(make_curve_lock(job.workdir, CONFIG), sweep(0.0))
    for row, verdict in zip(rows, judged["predictors"], strict=True):
        assert row[1].small == "and 0 s" and row[2].text == f"{verdict['rmse']:.3f}"
        assert row[2].small == f"floor {judged['floor']:.3f}"
    (series,) = prediction_series(Inputs(predictions=found))
    assert series.name == "predicted (anchors)" and len(series.points) == len(LAMBDAS)
    assert prediction_section(Inputs()) is None and prediction_series(Inputs()) == []


def test_the_trained_curve_is_that_under_the_guard_if_there_is_one():
    """`opd.plain_lambdas` trains the same λ without it, of which nothing is predicted."""
    curve = Prediction(predictor="nominal", lambdas=[2.0], parse=[0.9], chosen=True)
    parse = {"margin=1.25": (0.8, 0.9), "": (0.0, 0.1)}
    results = [
        Result(stage="opd", lam=2.0, seed=seed, steps=9, guard=guard, parse=rate)
        for guard, rates in parse.items()
        for seed, rate in enumerate(rates)
    ]
    for order in (results, results[::-1]):
        section = prediction_section(Inputs(predictions=[curve], results=order))
        assert section.tables[0].rows[0][2] == ("0.050", "floor 0.050")
        assert section.tables[1].rows[0][3].text == "0.850"


def test_the_report_says_why_a_predictor_has_no_curve():
    none = Prediction(predictor="anchors", lambdas=[1.0], anchors=6, why="no anchor broke")
    curve = Prediction(predictor="nominal", lambdas=[1.0], parse=[0.5], chosen=True)
    assert prediction_section(Inputs(predictions=[none])) is None
    section = prediction_section(Inputs(predictions=[curve, none]))
    assert [cell.text for cell in section.tables[0].rows[1]] == ["anchors", "6", "–", "no anchor broke"]
    assert section.tables[0].rows[0][2].text == "not trained yet"


def test_predictions_come_back_from_their_file(job):
    record = Prediction(
        predictor="limit", lambdas=[1.0], parse=[0.5], chosen=True, extra={"made_from": {"a": 1}}
    )
    write_records(job.workdir / PREDICTIONS, [record])
    (back,) = read_predictions(job.workdir / PREDICTIONS)
    assert back == record and back.extra == record.extra and dataclasses.asdict(back)["low"] is None


@pytest.mark.parametrize(
    "broken",
    [{"parse": [0.5]}, {"parse": [0.5, "high"]}, {"low": [0.1, 0.2]}, {"lambdas": None, "parse": [0.5]}],
)
def test_a_broken_prediction_is_one_line(tmp_path, broken):
    record = {"predictor": "limit", "lambdas": [1.0, 1.2], "chosen": True} | broken
    path = tmp_path / PREDICTIONS
    path.write_text(json.dumps([record]))
    with pytest.raises(
        UserError, match="prediction 0: must have a number of each curve at each of 'lambdas'"
    ):
        read_predictions(path)
