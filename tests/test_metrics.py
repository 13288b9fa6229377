"""Metrics against scikit-learn, scipy and ranx; macro-averages by hand; bootstrap intervals against scipy."""

import json
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from listopd_jax import config as config_module
from listopd_jax.errors import UserError
from listopd_jax.task.contract import Parsed
from listopd_jax.task.metrics import (
    CUTOFFS,
    METRICS,
    bootstrap_intervals,
    kendall_tau,
    list_metrics,
    ndcg,
)
from listopd_jax.task.metrics import summarize as summarize_task
from listopd_jax.task.prompt import ListExample
from listopd_jax.tasks.reviews import Reviews


def summarize(lists, gain="linear", **options):
    """The summary of verdicts and labels by the task of reviews."""
    settings = config_module.defaults().task
    settings.ndcg_gain = gain
    records = [(p, ListExample(str(i), "p", "t", (), tuple(true))) for i, (p, true) in enumerate(lists)]
    return summarize_task(Reviews(None, settings), records, **options)


def random_lists(n, k, seed, distinct=False):
    """n pairs (predicted, true), integers 0..10 with many ties unless predictions are `distinct`."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        predicted = rng.permutation(k) if distinct else rng.integers(0, 11, k)
        yield predicted.astype(float), rng.integers(0, 11, k).astype(float)


@pytest.mark.parametrize("k", [2, 4, 8, 12])
@pytest.mark.parametrize("gain", ["linear", "exponential"])
def test_ndcg_equals_scikit_learn(k, gain):
    for predicted, true in random_lists(100, k, seed=k):
        if not true.any():
            continue
        relevance = true if gain == "linear" else 2**true - 1
        for cutoff in CUTOFFS:
            expected = ndcg_score([relevance], [predicted], k=cutoff)
            assert ndcg(predicted, true, cutoff, gain) == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow  # numba compiles ranx for 20 s
@pytest.mark.parametrize("gain, name", [("linear", "ndcg"), ("exponential", "ndcg_burges")])
def test_ndcg_equals_ranx_where_no_scores_tie(gain, name):
    ranx = pytest.importorskip("ranx")
    lists = list(random_lists(60, 8, seed=3, distinct=True))
    qrels = ranx.Qrels(
        {f"q{i}": {f"d{j}": int(s) for j, s in enumerate(t)} for i, (_, t) in enumerate(lists)}
    )
    run = ranx.Run({f"q{i}": {f"d{j}": s + 1.0 for j, s in enumerate(p)} for i, (p, _) in enumerate(lists)})
    metrics = [f"{name}@{k}" for k in CUTOFFS]
    ranx.evaluate(qrels, run, metrics)
    for i, (predicted, true) in enumerate(lists):
        for k in CUTOFFS:
            assert ndcg(predicted, true, k, gain) == pytest.approx(
                run.scores[f"{name}@{k}"][f"q{i}"], abs=1e-9
            )


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=12))
def test_tau_equals_scipy(pairs):
    predicted, true = np.array(pairs, float).T
    expected = scipy.stats.kendalltau(predicted, true).statistic
    assert kendall_tau(predicted, true) == pytest.approx(expected, abs=1e-12, nan_ok=True)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 10), min_size=2, max_size=10))
def test_right_and_reversed_scores(true):
    true = np.array(true, float)
    right = list_metrics(Parsed("ok", tuple(true)), true)
    assert right["mae"] == 0
    if true.any():
        assert [right[f"ndcg@{k}"] for k in CUTOFFS] == pytest.approx([1.0] * 4)
    if len(set(true)) > 1:
        assert right["tau"] == pytest.approx(1.0)
        assert kendall_tau(-true, true) == pytest.approx(-1.0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 10)), min_size=2, max_size=8), st.randoms())
def test_the_order_of_the_input_does_not_matter(pairs, random):
    shuffled = random.sample(pairs, len(pairs))
    one, other = (
        list_metrics(Parsed("ok", tuple(p)), t) for p, t in (zip(*x, strict=True) for x in (pairs, shuffled))
    )
    assert one == pytest.approx(other, nan_ok=True)


def test_ties_share_the_mean_gain_of_their_places():
    constant, true = np.zeros(4), np.array([10.0, 0, 0, 2])
    assert ndcg(constant, true, 1) == pytest.approx(np.mean(true) / 10)


def test_right_scores_of_gains_that_no_float_holds_give_no_more_than_one():
    """The mean of three gains of 0.1 is above 0.1."""
    scores = np.array([1.0, 1, 1, 2, 0, 0, 2, 2])
    assert ndcg(scores, np.choose(scores.astype(int), [0.0, 0.01, 0.1]), 1) == 1.0


def test_gains_differ_as_documented():
    predicted, true = np.array([2.0, 1]), np.array([1.0, 3])
    assert ndcg(predicted, true, 1, "linear") == pytest.approx(1 / 3)
    assert ndcg(predicted, true, 1, "exponential") == pytest.approx(1 / 7)
    with pytest.raises(UserError, match="linear"):
        ndcg(predicted, true, 1, "cubic")
    with pytest.raises(UserError, match="linear"):
        summarize([(Parsed("no_json"), (1, 2))], gain="cubic")


def test_undefined_cases():
    flat = list_metrics(Parsed("ok", (5.0, 5.0)), (0, 4))
    assert math.isnan(flat["tau"]) and flat["ndcg@1"] == 0.5 and flat["mae"] == 3
    worthless = list_metrics(Parsed("ok", (5.0, 6.0)), (0, 0))
    assert (
        all(math.isnan(worthless[m]) for m in ("ndcg@1", "ndcg@10", "useful", "tau"))
        and worthless["parse"] == 1
    )
    failed = list_metrics(Parsed("no_json"), (1, 2))
    assert failed["parse"] == failed["useful"] == 0
    assert all(math.isnan(failed[m]) for m in METRICS if m not in ("parse", "useful"))
    assert math.isnan(list_metrics(Parsed("no_json"), (0, 0))["useful"])


LISTS = [
    (Parsed("ok", (9.0, 1.0, 5.0)), (8, 2, 4)),
    (Parsed("ok", (1.0, 2.0, 3.0)), (6, 3, 0)),
    (Parsed("ok", (5.0, 5.0, 5.0)), (0, 0, 6)),
    (Parsed("ok", (1.0, 0.0, 0.0)), (0, 0, 0)),
    (Parsed("truncated_k_minus_1"), (1, 2, 3)),
    (Parsed("bad_score"), (0, 0, 0)),
]


def test_summary_by_hand():
    s = summarize(LISTS, bootstrap=50)
    assert s["n"] == 6 and s["gain"] == "linear"
    assert s["parse"] == pytest.approx(4 / 6)
    assert s["ndcg@1"] == pytest.approx((1 + 0 + 1 / 3) / 3)
    assert s["useful"] == pytest.approx((1 + 0 + 1 / 3 + 0) / 4)
    assert s["tau"] == pytest.approx((1 - 1) / 2)
    assert s["mae"] == pytest.approx(np.mean([1, 3, 11 / 3, 1 / 3]), abs=1e-12)
    assert s["counted"] == {
        "parse": 6, "ndcg@1": 3, "ndcg@3": 3, "ndcg@5": 3, "ndcg@10": 3, "tau": 2, "mae": 4, "useful": 4
    }  # fmt: skip
    assert {name: count for name, count in s["failures"].items() if count} == {
        "ok": 4, "truncated_k_minus_1": 1, "bad_score": 1
    }  # fmt: skip
    assert sum(s["failures"].values()) == s["n"]


@pytest.mark.parametrize(
    "lists", [[], LISTS[4:], LISTS[:1], LISTS, [(Parsed("ok", (1e308, -1e308)), (1, 0))] * 3]
)
def test_summary_is_always_json(lists):
    for bootstrap in (0, 20):
        s = summarize(lists, bootstrap=bootstrap)
        assert json.loads(json.dumps(s, allow_nan=False)) == s
        assert set(s["intervals"]) == set(METRICS)


def test_nothing_parsed_is_null_not_zero():
    s = summarize(LISTS[4:5], bootstrap=20)
    assert s["parse"] == s["useful"] == 0 and s["intervals"]["useful"] == [0, 0]
    for metric in ("ndcg@1", "ndcg@10", "tau", "mae"):
        assert s[metric] is None and s["intervals"][metric] is None


def test_intervals_are_seeded_and_hold_the_estimate():
    rng = np.random.default_rng(0)
    lists = [
        (Parsed("ok", tuple(p)) if rng.random() < 0.8 else Parsed("no_json"), t)
        for p, t in random_lists(200, 8, 5)
    ]
    one, again, other = (summarize(lists, seed=seed) for seed in (1, 1, 2))
    assert one == again and one["intervals"] != other["intervals"]
    for metric in METRICS:
        low, high = one["intervals"][metric]
        assert low < one[metric] < high


def test_intervals_agree_with_scipy():
    rng = np.random.default_rng(4)
    values = rng.beta(2, 1, 150)
    [[low, high]] = bootstrap_intervals(values[:, None], 20_000, seed=0)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    width = expected.high - expected.low
    assert low == pytest.approx(expected.low, abs=0.03 * width)
    assert high == pytest.approx(expected.high, abs=0.03 * width)


def test_intervals_of_a_metric_on_parsed_lists_resample_the_denominator():
    """With undefined rows the statistic is a ratio; scipy's bootstrap of nanmean is the oracle."""
    rng = np.random.default_rng(5)
    values = np.where(rng.random(120) < 0.4, np.nan, rng.normal(size=120))
    [[low, high]] = bootstrap_intervals(values[:, None], 20_000, seed=0)
    expected = scipy.stats.bootstrap(
        (values,), np.nanmean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (low, high) == pytest.approx(
        (expected.low, expected.high), abs=0.03 * (expected.high - expected.low)
    )


def test_coverage_of_the_intervals():
    """Of 400 samples of 100 lists at a parse rate of .8, about 95 % of intervals hold it (s.d. 1.1 %)."""
    rng = np.random.default_rng(6)
    samples = (rng.random((100, 400)) < 0.8).astype(float)
    intervals = np.array(bootstrap_intervals(samples, 1000, seed=0))
    covered = np.mean((intervals[:, 0] <= 0.8) & (intervals[:, 1] >= 0.8))
    assert 0.90 <= covered <= 0.98
