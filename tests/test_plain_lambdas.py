"""opd.plain_lambdas: students without the guard and under it in one run, and what the report says of both."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from processes import REPO
from test_report import Page, record, sweep, workdir
from test_report import read as records_of

from configs.fashion import get_config
from launch.grid import COMMON, make_grid
from listopd_jax import config as config_module
from listopd_jax.errors import UserError
from listopd_jax.recommend import Setting, recommend
from listopd_jax.records import ERRORS, RESULTS, RUNS, Errors, read_calibration, read_errors, read_results
from listopd_jax.report.findings import find, headline
from listopd_jax.report.guarded_section import difference, gain
from listopd_jax.report.inputs import Inputs, read_inputs
from listopd_jax.report.recommendation import choose
from listopd_jax.report.write import render, write_report
from listopd_jax.stages.opd import opd_saving
from listopd_jax.stages.pipeline import run_stages
from listopd_jax.train.loop import Run, checkpoint_folder, open_checkpoints

GUARD = "fallback=base margin=1.25 scope=structure"


def settings(**fields):
    """A job of seconds: λ = 1 and 2 without the guard, 2 under it."""
    config = config_module.defaults()
    config.task.update(k=2, max_prompt=96, max_response=64, max_review_words=8, prompt_buckets=1)
    config.data.synthetic.update(products=16, reviews_per_product=8)
    config.data.validation_share = 0.25
    config.tokenizer.vocab_size = 400
    for role in ("teacher", "student"):
        config[role].update(hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1)
        config.sft[role].update(steps=2, batch_size=4, lr=1e-2, seed=1 + (role == "teacher"))
    config.evaluation.update(max_lists=4, batch_size=4, bootstrap=2, examples=1, expected=True, margins=True)
    config.opd.update(
        lambdas=(2.0,), plain_lambdas=(1.0, 2.0), steps=2, batch_size=2, rollouts=1, lr=1e-3, ratio="none",
        estimator="full_vocab",
    )  # fmt: skip
    config.opd.guard.update(margin=1.25, fallback="base", scope="structure")
    config.forecast.update(lambdas=(1.0,), batch_size=4)
    config.train.update(checkpoint_every=1, export=False)
    config.update_from_flattened_dict(fields)
    return config_module.validate(config)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The workdir of a whole run, and what it left when its grid was still smaller."""
    folder = tmp_path_factory.mktemp("plain")
    run_stages(settings(**{"opd.plain_lambdas": (1.0,)}), folder)
    before = (folder / RESULTS).read_text()
    run_stages(settings(), folder)
    return folder, json.loads(before)


def of(records, stage):
    return [(r.lam, r.guard) for r in records if r.stage == stage]


def test_one_run_has_both_and_their_records_tell_them_apart(job):
    folder, _ = job
    records = read_results(folder / RESULTS)
    assert sorted(of(records, "opd")) == [(1.0, ""), (2.0, ""), (2.0, GUARD)]
    assert len({r.identity for r in records}) == len(records) == len({(r.run, r.guard) for r in records})
    assert {r.run for r in records if r.stage == "opd"} == {
        "opd_lambda1.0_plain_seed0", "opd_lambda2.0_plain_seed0", "opd_lambda2.0_seed0",
    }  # fmt: skip
    planned = [
        (r["lambda"], r["guard"]) for r in json.loads((folder / RUNS).read_text()) if r["stage"] == "opd"
    ]
    assert planned == [(1.0, ""), (2.0, ""), (2.0, GUARD)]
    rows = {(r["lambda"], r.get("guard", "")) for r in read_inputs(folder).metrics if r["stage"] == "opd"}
    assert rows == {(1.0, ""), (2.0, ""), (2.0, GUARD)}


def test_the_guard_is_on_in_training_where_the_record_says_so(job):
    rows = [r for r in read_inputs(job[0]).metrics if r["stage"] == "opd"]
    share = {bool(r.get("guard")): r["guarded_fraction"] for r in rows if r["lambda"] == 2.0}
    assert share[False] == 0 < share[True]
    records = [r for r in read_results(job[0] / RESULTS) if r.stage == "opd"]
    assert [(r.guard == GUARD) for r in records] == ["guarded" in r.extra for r in records]
    assert all("structural_margin" in r.extra for r in records)  # None: these models write none of its tokens
    (guarded,) = (r.extra["guarded"] for r in records if r.guard)
    assert guarded == pytest.approx(np.mean([r["guarded_fraction"] for r in rows if r.get("guard")]))


def test_both_are_forecast_and_calibrated_along_their_own_answers(job):
    records, found = read_results(job[0] / RESULTS), read_calibration(job[0] / "calibration.json")
    forecasts = [(1.0, ""), (1.0, GUARD), (2.0, ""), (2.0, GUARD)]
    assert sorted(of(records, "forecast")) == [(row.lam, row.guard) for row in found.forecasts] == forecasts


def test_the_grid_may_grow_and_what_is_done_stays(job):
    folder, before = job
    now = [r.to_json() for r in read_results(folder / RESULTS)]
    assert [r for r in now if r in before] == before and len(now) == len(
        before
    ) + 2  # a forecast and a student


def test_a_checkpoint_of_the_other_kind_is_not_taken_for_ones_own(job):
    run = Run("opd_lambda2.0_seed0", "opd", 2.0, 0, 2)  # plain, where a guarded one lies
    with (
        open_checkpoints(job[0], run, opd_saving(settings(), job[0])) as saved,
        pytest.raises(UserError, match="guard"),
    ):
        saved.restore({"w": jax.ShapeDtypeStruct((), np.float32)}, 2)
    assert checkpoint_folder(job[0], run.name).is_dir()


def test_the_errors_of_a_policy_are_those_that_its_record_is_the_mean_of(job):
    records, errors = read_results(job[0] / RESULTS), read_errors(job[0] / ERRORS)
    maes = {r.identity: r.expected_mae for r in records if r.stage != "forecast"}
    assert {e.identity: pytest.approx(np.mean(e.errors), abs=1e-4) for e in errors} == maes


def test_the_recommendation_is_that_of_the_guarded_forecasts_alone(job):
    folder, _ = job
    forecasts = [r for r in read_results(folder / RESULTS) if r.stage == "forecast" and r.guard]
    alone = recommend(forecasts, None, Setting(guarded=True, reviews=True))
    assert json.loads((folder / "recommendation.json").read_text()) == alone.to_json()


def test_the_report_of_the_run_shows_both(job):
    text = Page(write_report(job[0]).read_text("utf-8")).text.replace("\xa0", " ")
    assert "Guarded vs. plain" in text and "OPD, λ = 2, guarded" in text and "OPD, λ = 2 " in text


def test_without_a_guard_there_is_nothing_to_leave_out():
    for field in ("opd.plain_lambdas", "forecast.plain_lambdas"):
        with pytest.raises(UserError, match=f"{field}=.*opd.guard is off"):
            settings(
                **{"opd.plain_lambdas": (), "opd.guard.margin": 0.0, "opd.guard.scope": "all", field: (1.0,)}
            )


def test_the_points_of_a_launch_are_plain_or_guarded(tmp_path):
    config = config_module.to_json(settings())
    grid = make_grid(tmp_path, ["--config.opd.plain_lambdas=1.0,2.0"], config)
    assert grid.names == ["lambda1.0_plain_seed0", "lambda2.0_plain_seed0", "lambda2.0_seed0"]
    given = {
        x.split("=")[0].removeprefix("--config."): x.split("=")[1] for x in grid.main_arguments(grid.names[1])
    }
    assert given["opd.plain_lambdas"] == "(2.0,)"
    assert {given[f] for f in ("opd.lambdas", "forecast.lambdas", "forecast.plain_lambdas")} == {"()"}
    common = grid.main_arguments(COMMON)
    assert "--config.forecast.plain_lambdas=(1.0,2.0)" in common and "--config.opd.plain_lambdas=()" in common


# ---- the report, from records alone


def guarded(lam, parse, mae, **more):
    return record("opd", lam, parse, **more) | {"run": f"g{lam}", "guard": GUARD, "expected_mae": mae}


def mixed(guarded_mae=1.5):
    plain = [record("opd", lam, parse) | {"expected_mae": 1.6} for lam, parse in ((1.0, 0.97), (2.0, 0.0))]
    return [*sweep({}), *plain, guarded(2.0, 0.98, guarded_mae)]


def errors_of(records, apart):
    """Errors of 200 lists: those of λ = 1, and of the guarded student `apart` of them."""
    rng = np.random.default_rng(0)
    first = rng.uniform(1, 2, 200)
    values = {"": first, GUARD: first + apart + rng.normal(0, 0.1, 200)}
    fields = ("run", "stage", "lam", "seed", "steps", "guard")
    return [
        Errors(**{f: getattr(r, f) for f in fields}, errors=values[r.guard].tolist())
        for r in records_of(records)
        if r.stage == "opd" and r.parse > 0.5
    ]


@pytest.mark.parametrize(
    ("apart", "says"),
    [(-0.1, "are nearer to"), (0.1, "are farther from"), (0.0, "are not clearly nearer to")],
)
def test_the_gain_of_one_seed_is_paired_by_list(apart, says):
    inputs = Inputs(results=records_of(mixed()), errors=errors_of(mixed(), apart))
    first, policy = inputs.found.opd[0], inputs.found.guarded[-1]
    values = np.subtract(*(e.errors for e in reversed(inputs.errors)))
    found, half = (
        difference(inputs, policy, first),
        1.97196 * values.std(ddof=1) / np.sqrt(200),
    )  # t, 199 degrees
    assert found == pytest.approx(
        {"mean": values.mean(), "low": values.mean() - half, "high": values.mean() + half}, abs=1e-6
    )
    text = gain(inputs)[0].replace("\xa0", " ")
    assert says in text and "98 % under the guard and 0 % without it" in text and "one seed" in text
    assert text in Page(render(inputs)).text.replace("\xa0", " ")


def test_several_seeds_are_compared_seed_by_seed():
    other = [
        r | {"seed": 1, "expected_mae": r["expected_mae"] + step}
        for r, step in zip(mixed()[2:], (0.1, 0.1, 0.14), strict=True)
    ]
    inputs = Inputs(results=records_of([*mixed(), *other]))
    found = difference(inputs, inputs.found.guarded[0], inputs.found.opd[0])
    assert found["mean"] == pytest.approx(-0.08) and found["low"] < found["mean"] < found["high"]
    assert "2 seeds" in gain(inputs)[0]


def test_without_lists_or_expected_scores_nothing_is_claimed():
    inputs = Inputs(results=records_of(mixed()))
    assert "not clearly nearer" in gain(inputs)[0] and "[" not in gain(inputs)[0]
    bare = [{k: v for k, v in r.items() if k != "expected_mae"} for r in mixed()]
    assert gain(Inputs(results=records_of(bare))) == gain(Inputs(results=records_of(sweep({1.0: 0.9})))) == []


def test_the_cliff_is_the_plain_curves_and_the_guarded_policy_may_be_the_one_to_use():
    found = find(records_of([*mixed()[:-1], guarded(2.0, 0.98, 1.5, ndcg=0.99)]))
    assert [p.lam for p in found.opd] == [1.0, 2.0] and [p.lam for p in found.guarded] == [2.0]
    assert (
        headline(found)
        .replace("\xa0", " ")
        .endswith("to 98 % at λ = 2, guarded; without the guard the contract breaks between λ = 1 and 2")
    )
    assert choose(found).guard == GUARD


def test_a_run_that_is_all_guarded_is_found_as_before():
    records = records_of([*sweep({}), guarded(1.0, 0.97, 1.6), guarded(2.0, 0.98, 1.5)])
    found, plain = find(records), find([dataclasses.replace(r, guard="") for r in records])
    assert [p.records[0].run for p in found.opd] == [
        p.records[0].run for p in plain.opd
    ] and not found.guarded
    assert [p.lam for p in found.cliff.held] == [p.lam for p in plain.cliff.held]


def test_beside_other_runs_each_kind_is_a_run_of_its_own(tmp_path):
    path = workdir(tmp_path / "a", results=mixed())
    halves = read_inputs(path).halves()
    assert {name: [p.lam for p in half.found.opd] for name, half in halves.items()} == {
        "plain": [1.0, 2.0],
        "guarded": [2.0],
    }


# ---- the demo


def test_the_demo_as_measured_keeps_under_the_guard_what_plain_training_loses():
    """In each of the three seeds of README's table; `make demo` is the first of them."""
    records = read_results(REPO / "docs" / "results" / "demo.json")
    opd = config_module.validate(get_config("demo")).opd
    grid = {(lam, False) for lam in opd.plain_lambdas} | {(lam, True) for lam in opd.lambdas}
    base = next(r for r in records if r.stage == "sft_student")
    trained = [r for r in records if r.stage == "opd"]
    assert opd.seeds == (0,) and {r.seed for r in trained} == {0, 1, 2}
    for seed in range(3):
        policies = {(r.lam, bool(r.guard)): r for r in trained if r.seed == seed}
        assert policies.keys() == grid
        one, plain, guard = (policies[at] for at in ((1.0, False), (2.0, False), (2.0, True)))
        assert plain.parse < one.parse - 0.3 and guard.parse > one.parse - 0.02
        assert base.parse < one.parse - 0.2 and guard.expected_mae < one.expected_mae
        assert {r.guard for r in (one, plain)} == {""}
