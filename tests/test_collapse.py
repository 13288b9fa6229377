"""The watch over a run that collapses: its verdicts, its state, what it does; on real tiny models that do collapse."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_average import Numbers

from configs.fashion import tiny
from listopd_jax.config import validate
from listopd_jax.metrics_log import read_metrics
from listopd_jax.records import RESULTS, Result, read_results
from listopd_jax.report.findings import find, sentences
from listopd_jax.stages.export import policy_model
from listopd_jax.stages.pipeline import run_stages
from listopd_jax.train.collapse import Seen, Thresholds, Watch, collapse
from listopd_jax.train.loop import Run, Saving, train
from listopd_jax.train.optimizer import apply_gradients, init_state

AT = Thresholds(window=3, parse_drop=0.2, length_change=0.5, flips=0.1)
TX = optax.scale_by_adam()


def row(parse, length=40.0, flips=0.0):
    return {"parse": parse, "completion_length": length, "flip_structural": flips}


def watch(action="warn", at=AT):
    return Watch("opd_lambda2.0_seed0", action, at, lower=0.5)


# ---- verdicts


@given(parse=st.lists(st.floats(0, 1), max_size=30), window=st.integers(1, 5), drop=st.floats(0.05, 0.9))
def test_a_fall_of_the_parse_rate_is_found_at_the_first_window_that_shows_it(parse, window, drop):
    """Against float64 over the whole series: means of windows, and the best of them so far."""
    means = np.convolve(parse, np.ones(window) / window, "valid") if len(parse) >= window else np.zeros(0)
    falls = np.maximum.accumulate(means) - means
    if np.isclose(falls, drop, atol=1e-9).any():
        return
    expected = np.flatnonzero(falls > drop)
    one = watch(at=Thresholds(window, drop, math.inf, 1.0))
    logged = [one.observe(step, row(x)) for step, x in enumerate(parse, 1)]
    first = expected[0] + window if expected.size else None
    assert one.collapses[:1] == ([] if first is None else [first])
    assert [x["collapsed"] for x in logged[:first]] == [0.0] * ((first or len(parse) + 1) - 1) + [1.0] * bool(
        first
    )


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (Seen(0.7, 40, 0.0), "parse fell from 0.95 to 0.70"),
        (Seen(0.9, 61, 0.0), "from 40 to 61 tokens"),
        (Seen(0.9, 19, 0.0), "from 40 to 19 tokens"),
        (Seen(0.9, 40, 0.2), "flips at 0.200"),
        (Seen(0.8, 50, 0.1), ""),
    ],
)
def test_each_threshold_says_what_it_saw(now, says):
    found = collapse(now, Seen(0.95, 40, 0.0), AT)
    assert says in found and bool(found) == bool(says)


def test_a_student_that_rises_from_nothing_never_collapses():
    """Though its answers become a tenth as long."""
    one = watch("stop")
    for step in range(1, 30):
        one.observe(step, row(min(1.0, step / 20), length=400 if step < 5 else 40))
    assert not one.collapses and not one.stopped


def test_a_fall_is_warned_of_once_and_lambda_is_lowered_by_it(capsys):
    series = [1.0] * 4 + [0.4] * 6
    one = watch("lower_lambda")
    scales = [one.observe(step, row(x))["lambda_scale"] for step, x in enumerate(series, 1)]
    assert one.collapses == [5] and scales == [1.0] * 5 + [0.5] * 5
    assert one.lam(3.0) == 2.0 and one.lam(1.0) == 1.0 and one.lam(0.5) == 0.75
    assert watch().lam(1.3) == 1.3
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("warning: opd_lambda2.0_seed0, step 5: parse fell")


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"collapsed_at": [7]}, ""),
        ({"collapsed_at": [7], "checkpoint": 5}, "A run at λ = 2 was stopped when it collapsed"),
        ({"collapsed_at": [7], "lambda_end": 1.5}, "A run at λ = 2 continued with a lower λ"),
    ],
)
def test_the_report_says_what_was_done(extra, says):
    records = [
        Result(stage="opd", lam=lam, seed=0, steps=9, parse=0.5, useful=0.4, extra=of)
        for lam, of in ((1.0, {}), (2.0, extra))
    ]
    said = [s.replace("\xa0", " ") for s in sentences(find(records))]
    assert any(says in s for s in said) and any("collapsed" in s for s in said) == bool(says)


# ---- in the loop


def train_with(workdir, one, steps, last=12):
    """A run of `last` steps, brought to `steps`, whose parse rate falls after step 5 and whose steps depend on λ."""

    def update(state, batch, step):
        grads = {"w": state.params["w"] - one.lam(3.0) * batch}
        return apply_gradients(state, grads, jnp.float32(0.1), TX), {
            "loss": 0.0,
            "tokens": 1,
            **row(1.0 if step < 5 else 0.2 + 0.01 * step),
        }

    run = Run("opd_lambda3.0_seed0", "opd", lam=3.0, seed=0, steps=steps)
    start = lambda: init_state({"w": jnp.arange(4.0)}, TX)  # noqa: E731
    return np.asarray(train(workdir, run, start, Numbers(), update, Saving(1, 2), one)["w"])


def test_a_run_that_lowers_lambda_resumes_exactly(tmp_path):
    """From every step, also those within the window before the fall."""
    one = watch("lower_lambda")
    whole = train_with(tmp_path / "whole", one, 12)
    assert one.collapses == [6] and one.lam(3.0) == 2.0
    for steps in range(1, 13):
        pieces = train_with(tmp_path / "pieces", watch("lower_lambda"), steps)
    assert pieces.tobytes() == whole.tobytes()
    rows = [
        [(r["step"], r["lambda_scale"], r["collapsed"]) for r in read_metrics(tmp_path / name)]
        for name in ("whole", "pieces")
    ]
    assert rows[0] == rows[1]


def test_a_run_that_is_stopped_ends_there_and_stays_so(tmp_path):
    one = watch("stop")
    stopped = train_with(tmp_path, one, 12)
    assert one.stopped and [r["step"] for r in read_metrics(tmp_path)] == list(range(1, 7))
    again = watch("stop")
    assert train_with(tmp_path, again, 12).tobytes() == stopped.tobytes()
    assert again.stopped and again.collapses == [6] and len(read_metrics(tmp_path)) == 6


# ---- on models


def job_config(**opd):
    """Lists of two reviews; a teacher that truncates, a base that does not, and λ = 3: parse falls within 6 steps."""
    config = tiny()
    config.task.update(k=2, max_prompt=96, max_review_words=8)
    config.data.validation_share = 0.2
    config.data.synthetic.products = 60
    config.tokenizer.vocab_size = 400
    config.evaluation.update(max_lists=16, batch_size=16, bootstrap=10)
    config.forecast.lambdas = ()
    for role, steps, truncated in (("teacher", 90, "truncate:0.3"), ("student", 60, "")):
        config[role].update(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1)
        config.sft[role].update(steps=steps, batch_size=16, lr=1e-2, warmup_steps=5)
        config.sft[role].noise = truncated
    config.opd.update({"lambdas": (3.0,), "steps": 10, "batch_size": 8, "rollouts": 2, "lr": 3e-3} | opd)
    config.opd.collapse.window = 3
    config.train.update(checkpoint_every=100, keep_checkpoints=3, export=True)
    return config


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with the models that all distillation here is of; of their training only the end is saved."""
    workdir = tmp_path_factory.mktemp("pair")
    run_stages(validate(job_config(lambdas=())), workdir)
    return workdir / "export"


def distilled(exported, workdir, **opd):
    """The config of a run that distils those models and saves every step, run in `workdir`."""
    config = job_config(**opd)
    for role in ("teacher", "student"):
        config[role].weights = str(exported / f"sft_{role}")
        config.sft[role].update(steps=0, epochs=0.0)
    config.tokenizer.path = str(exported / "sft_teacher")
    config.train.checkpoint_every = 1
    config = validate(config)
    run_stages(config, workdir)
    return config


@pytest.fixture(scope="module")
def stopped(exported, tmp_path_factory):
    """The config and the workdir of a run that stops when it collapses."""
    workdir = tmp_path_factory.mktemp("stopped")
    return distilled(
        exported, workdir, on_collapse="stop", eval_steps=(2,), ema=0.5, lr_decay="linear"
    ), workdir


def opd_records(workdir):
    return [r for r in read_results(workdir / RESULTS) if r.stage == "opd"]


def test_a_run_that_collapses_stops_and_gives_its_most_useful_checkpoint(stopped):
    config, workdir = stopped
    rows = [r for r in read_metrics(workdir) if r["stage"] == "opd"]
    early, last = opd_records(workdir)
    (at,) = last.extra["collapsed_at"]
    assert rows[-1]["step"] == at < config.opd.steps and rows[-1]["collapsed"] == 1
    assert rows[0]["parse"] - rows[-1]["parse"] > 0.2 and rows[0]["flip_structural"] > 0
    assert (early.steps, last.steps) == (2, config.opd.steps) and not early.extra
    assert last.extra["checkpoint"] in {2, at - 2, at - 1, at} and last.useful >= early.useful


def test_the_checkpoint_of_a_stopped_run_is_what_is_exported(stopped):
    config, workdir = stopped
    last = opd_records(workdir)[-1]
    exported = policy_model(config, workdir, last).params
    (workdir / "export" / last.run).rename(workdir / "export" / "aside")
    saved = policy_model(config, workdir, last).params
    (workdir / "export" / "aside").rename(workdir / "export" / last.run)
    for a, b in zip(*(map(np.asarray, jax.tree.leaves(x)) for x in (exported, saved)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_stopped_job_run_again_changes_nothing(stopped):
    config, workdir = stopped
    before = (workdir / RESULTS).read_bytes(), (workdir / "metrics.jsonl").read_bytes()
    run_stages(config, workdir)
    assert before == ((workdir / RESULTS).read_bytes(), (workdir / "metrics.jsonl").read_bytes())


def test_lambda_is_lowered_where_the_same_run_collapses(exported, tmp_path):
    """With a reward for the contract and a control variate."""
    distilled(exported, tmp_path, on_collapse="lower_lambda", contract_reward=0.5, control_variate="optimal")
    (record,) = opd_records(tmp_path)
    assert record.extra["collapsed_at"] and 1 < record.extra["lambda_end"] < 3
    scales = {r["lambda_scale"] for r in read_metrics(tmp_path) if r["stage"] == "opd"}
    assert {1.0, 0.5} <= scales
    assert json.loads((tmp_path / RESULTS).read_text())[-1]["collapsed_at"] == record.extra["collapsed_at"]
