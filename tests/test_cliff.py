"""Cliff location against EC's own figures (method.md §4) and an independent isotonic fit."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.isotonic import IsotonicRegression

from listopd_jax.theory import cliff
from listopd_jax.theory.ec_figures import ROWS

EC_LAMBDAS = ROWS["five_seeds"].lambdas
FIVE_SEEDS = {  # EC's: parse of each seed at EC_LAMBDAS, 42 steps
    7: (0.901, 0.830, 0.731, 0.679),
    13: (0.934, 0.797, 0.873, 0.486),
    21: (0.863, 0.802, 0.901, 0.561),
    42: (0.934, 0.934, 0.651, 0.684),
    95: (0.858, 0.689, 0.788, 0.877),
}
EC_SEEDS = np.array(list(FIVE_SEEDS.values()))  # seeds 7, 13, 21, 42, 95 down, λ across


@pytest.fixture(scope="module")
def ec():
    return cliff.locate(EC_LAMBDAS, EC_SEEDS)


def test_means_are_ecs():
    # EC prints .810 and .658 at 1.20 and 1.24, from unrounded seeds; the printed seeds give .8104 and .6574
    np.testing.assert_allclose(EC_SEEDS.mean(0), ROWS["five_seeds"].parse, atol=7e-4)
    np.testing.assert_allclose(EC_SEEDS.std(0, ddof=1), [0.037, 0.088, 0.102, 0.149], atol=7e-4)


@pytest.mark.parametrize(
    ("threshold", "printed"), [("0.80", [1.204, 1.228]), ("0.85", [1.196, 1.228]), ("0.90", [1.180, 1.213])]
)
def test_onset_intervals_are_ecs_to_the_printed_digits(ec, threshold, printed):
    assert [round(x, 3) for x in ec["onset"][threshold]["grid"]["percentile_interval"]] == printed


def test_all_resamples_together_give_ecs_intervals_but_for_one_tie():
    everyone = np.array(list(itertools.product(range(5), repeat=5)))
    exact = {}
    for threshold in (0.80, 0.85, 0.90):
        onsets = cliff.grid_onsets(np.array(EC_LAMBDAS), EC_SEEDS, threshold)[everyone]
        with np.errstate(invalid="ignore"):
            mean = np.nansum(onsets, 1) / (~np.isnan(onsets)).sum(1)
        exact[threshold] = [round(x, 3) for x in np.nanpercentile(mean, [2.5, 97.5])]
    # 2.59 % of all 3125 resamples are ≤ 1.192: 10,000 draws put the 2.5 % point there or at EC's 1.196
    assert exact == {0.80: [1.204, 1.228], 0.85: [1.192, 1.228], 0.90: [1.180, 1.213]}


def test_midpoint_of_the_small_clip_run_is_ecs():
    located = cliff.locate(ROWS["small_clip"].lambdas, ROWS["small_clip"].parse)
    assert round(located["midpoint"]["interpolated"]["at"], 4) == 1.0695
    assert located["midpoint"]["interpolated"]["interval"] is None  # one seed


@pytest.mark.parametrize(("at_105", "expected"), [(0.703, 1.0507), (0.742, 1.0587)])
def test_midpoint_of_the_budget_run_is_near_ecs_but_not_its_1061(at_105, expected):
    # the same rule on method.md's figures, seed 42 and the three-seed mean at 1.05; EC prints 1.061
    located = cliff.locate([1.0, 1.05, 1.1], [0.934, at_105, 0.500])
    assert round(located["midpoint"]["interpolated"]["at"], 4) == expected


def test_result_is_json_and_reports_censoring(ec):
    json.dumps(ec, allow_nan=False)
    assert ec["onset"]["0.90"]["interpolated"]["at"] is None  # the mean curve starts at .898
    assert ec["onset"]["0.90"]["interpolated"]["interval"] is None
    assert ec["onset"]["0.90"]["grid"]["undefined"] == 0.2  # seed 95 never reaches .90
    assert ec["midpoint"]["interpolated"]["at_edge"] == 0.2  # and is above .70 at the grid's end


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_isotonic_is_the_least_squares_fit(curve):
    oracle = IsotonicRegression(increasing=False).fit_transform(np.arange(len(curve)), curve)
    np.testing.assert_allclose(cliff.isotonic(np.array(curve)), oracle, atol=1e-9)


@given(st.floats(0.05, 0.95), st.floats(1.05, 1.95))
def test_crossing_of_a_straight_line_is_exact(level, shift):
    lambdas = np.array([1.0, 1.3, 1.7, 2.0])
    curve = np.clip(1 - (lambdas - 1), 0, 1)[None]
    assert cliff.crossings(lambdas, curve, level)[0] == pytest.approx(2 - level)
    assert cliff.crossings(lambdas * shift, curve, level)[0] == pytest.approx((2 - level) * shift)


def test_crossing_takes_the_last_fall_and_marks_the_ends():
    lambdas = np.array([1.0, 2.0, 3.0, 4.0])
    curves = np.array([[0.9, 0.5, 0.9, 0.5], [0.9, 0.9, 0.9, 0.9], [0.1, 0.1, 0.1, 0.1]])
    np.testing.assert_allclose(cliff.crossings(lambdas, curves, 0.7), [3.5, 4.0, np.nan])
    np.testing.assert_allclose(cliff.grid_onsets(lambdas, curves, 0.7), [3.0, 4.0, np.nan])


def test_one_lucky_point_past_the_cliff_moves_the_raw_reading_but_not_the_isotonic_one():
    lambdas = [1.0, 1.1, 1.2, 1.3, 1.4]
    clean, lucky = [0.95, 0.9, 0.3, 0.1, 0.1], [0.95, 0.9, 0.3, 0.1, 0.75]
    raw, fitted = (
        [cliff.locate(lambdas, y)["midpoint"][name]["at"] for y in (clean, lucky)]
        for name in ("interpolated", "isotonic")
    )
    assert raw[1] - raw[0] > 0.2 and abs(fitted[1] - fitted[0]) < 0.03


def test_the_interval_of_ecs_rule_is_students():
    onsets = cliff.grid_onsets(np.array(EC_LAMBDAS), EC_SEEDS, 0.80)
    expected = stats.t.interval(0.95, 4, loc=onsets.mean(), scale=stats.sem(onsets))
    found = cliff.locate(EC_LAMBDAS, EC_SEEDS)["onset"]["0.80"]["grid"]
    np.testing.assert_allclose(found["interval"], expected)
    assert found["at"] == pytest.approx(onsets.mean())


def test_levels_that_differ_in_the_third_digit_have_an_onset_each():
    lambdas, parse = [1.0, 1.1, 1.2], [[0.95, 0.803, 0.2]]
    found = cliff.locate(lambdas, parse, thresholds=(0.8, 0.801, 0.804), of_peak=(0.9, 0.901))["onset"]
    assert list(found) == ["0.80", "0.801", "0.804", "0.90 of peak", "0.901 of peak"]
    assert [found[name]["grid"]["at"] for name in ("0.80", "0.801", "0.804")] == [1.1, 1.1, 1.0]


def test_where_the_crossing_is_linear_the_jackknife_is_students_interval_of_the_seeds_own_crossings():
    lambdas, shifts = np.array([1.0, 2.0, 3.0]), np.array([-0.3, 0.05, 0.1, 0.2, -0.15])
    parse = 0.5 + (2 + shifts[:, None] - lambdas) * 0.35  # a seed's own midpoint is 2 + its shift
    found = cliff.locate(lambdas, parse, midpoint=0.5)["midpoint"]["interpolated"]
    expected = stats.t.interval(0.95, 4, loc=2 + shifts.mean(), scale=stats.sem(shifts))
    np.testing.assert_allclose(found["interval"], expected)


def test_interval_covers_the_truth():
    rng, lambdas, hits = np.random.default_rng(0), np.linspace(1, 1.5, 11), 0
    for _ in range(300):
        shift = rng.normal(0, 0.03, (5, 1))  # a seed's cliff, around 1.25
        parse = 1 / (1 + np.exp((lambdas - 1.25 - shift) / 0.03))
        located = cliff.locate(lambdas, parse, midpoint=0.5, resamples=1)
        low, high = located["midpoint"]["interpolated"]["interval"]
        hits += low <= 1.25 <= high
    assert 0.92 <= hits / 300 <= 0.98


def test_a_percentile_bootstrap_of_five_seeds_covers_less_than_it_says_and_students_interval_does_not():
    rng, bootstrap, student = np.random.default_rng(0), 0, 0
    for trial in range(1000):
        onsets = rng.normal(0, 1, 5)
        low, high = cliff.percentile_interval(onsets, 0.95, 400, seed=trial)
        bootstrap += low <= 0 <= high
        student += abs(onsets.mean()) <= cliff.t_half_width(onsets, 0.95)
    assert 0.8 <= bootstrap / 1000 <= 0.87 and 0.935 <= student / 1000 <= 0.965


@pytest.mark.parametrize(
    ("parse", "reason"),
    [
        ([0.95, 0.94, 0.95, 0.93], "no drop"),
        ([0.2, 0.3, 0.1, 0.0], "no headroom"),
        ([0.5, 0.7, 0.8, 0.95], "no drop"),
    ],
)
def test_refuses_with_a_reason(parse, reason):
    with pytest.raises(cliff.NoCliff, match=reason):
        cliff.locate([1.0, 1.1, 1.2, 1.3], parse)


@pytest.mark.parametrize(
    ("lambdas", "parse", "message"),
    [
        ([1.0, 1.1], [[0.5]], "a row per seed"),
        ([1.1, 1.0], [0.9, 0.1], "ascend"),
        ([1.0, 1.1], [0.9, np.nan], "0, 1"),
    ],
)
def test_broken_tables_are_errors(lambdas, parse, message):
    with pytest.raises(ValueError, match=message):
        cliff.locate(lambdas, parse)


def test_table_from_records():
    records = [
        {"stage": "opd", "lambda": lam, "seed": seed, "parse": round(lam / 10 + seed, 3)}
        for lam, seed in itertools.product((1.2, 1.0), (1, 0))
    ]
    lambdas, seeds, parse = cliff.table([*records, {"stage": "sft_student", "lambda": None, "parse": 0.3}])
    assert lambdas.tolist() == [1.0, 1.2] and seeds == [0, 1]
    np.testing.assert_allclose(parse, [[0.1, 0.12], [1.1, 1.12]])
    with pytest.raises(ValueError, match=r"seed 0 has no result at λ = 1\b"):
        cliff.table(records[:-1])
    with pytest.raises(ValueError, match="appears twice"):
        cliff.table([*records, records[0]])
