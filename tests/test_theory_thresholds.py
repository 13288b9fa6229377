"""The closed forms against EC's printed figures, a 50-digit reference and their own algebra."""

import subprocess
import sys

import mpmath
import numpy as np
import oracles
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from listopd_jax import theory

mpmath.mp.dps = 50

# method.md §3 (figures of EC), as printed
PRINTED = [
    (0.9993, 0.5, 5, "1.2216"),
    (0.9993, 0.7910, 5, "1.2714"),
    (0.9993, 0.7, 5, "1.2509"),
    (0.9993, 0.95, 5, "1.3727"),
    (0.9993, 0.81, 1.5, "1.070"),
    (0.9993, 0.5, 1.5, "1.056"),
    (0.9984, 0.81, 5, "1.32"),
    (0.9993, 0.8105, 5, "1.2771"),
    (0.9993, 0.8286, 5, "1.2831"),
    (0.9993, 0.9, 5, "1.3178"),
    (0.9993, 0.99, 5, "1.6033"),
    (0.9993, 0.5, 2, "1.095"),
    (0.7, 0.5, 5, "3.25"),
    (0.9, 0.5, 5, "1.77"),
    (0.999, 0.5, 5, "1.23"),
    # method.md prints 1.186 for b = .81, where Eq. 4 gives 1.185496; b = .8105 gives 1.186. EC prints 1.18.
    (0.99996, 0.81, 5, "1.185"),
    (0.99996, 0.8105, 5, "1.186"),
]

tails = st.floats(-30, -1.001).map(lambda x: float(2.0**x))  # 1 − p of a modal token
bases = st.floats(1e-6, 1 - 1e-6)
clips = st.floats(1.001, 1e6)


def exact_clip_lambda(p, b, c):
    """EC Eq. 4 as printed, to 50 digits."""
    p, b, c = map(mpmath.mpf, (p, b, c))
    base = mpmath.log((1 - b) / b)
    return (mpmath.log((1 - p) / (c - 1 + p)) - base) / (mpmath.log((1 - p) / p) - base)


def relative_error(value, exact):
    return abs((mpmath.mpf(value) - exact) / exact)


@pytest.mark.parametrize(("p", "b", "c", "printed"), PRINTED)
def test_table_of_method_section_3(p, b, c, printed):
    digits = len(printed.split(".")[1])
    assert f"{theory.clip_safe_lambda(p, b, c):.{digits}f}" == printed


@given(tails, bases, clips)
def test_clip_lambda_agrees_with_fifty_digits(tail, b, c):
    p = 1 - tail
    assume(b < p)
    assert relative_error(theory.clip_safe_lambda(p, b, c), exact_clip_lambda(p, b, c)) < 1e-13


@pytest.mark.parametrize("b", [0.5, 0.8105, 0.999, 1 - 2e-9])
@pytest.mark.parametrize("c", [1.0001, 1.5, 5.0, 1e9])
def test_exact_at_one_minus_1e9(b, c):
    p = 1 - 1e-9
    assert relative_error(theory.clip_safe_lambda(p, b, c), exact_clip_lambda(p, b, c)) < 1e-13
    assert relative_error(theory.log_odds_gap(p, b), _exact_gap(p, b)) < 1e-13


def _exact_gap(p, b):
    p, b = mpmath.mpf(p), mpmath.mpf(b)
    return mpmath.log(p * (1 - b) / (b * (1 - p)))


def test_log_odds_form_goes_where_float64_probabilities_cannot():
    P, B, c = 60.0, 5.0, 5.0  # 1 − p = 9e-27: p is 1 in float64
    p, b = (1 / (1 + mpmath.exp(-x)) for x in (mpmath.mpf(P), mpmath.mpf(B)))
    assert relative_error(theory.clip_safe_lambda_log_odds(P, B, c), exact_clip_lambda(p, b, c)) < 1e-13


@given(tails, bases, clips)
def test_both_forms_agree(tail, b, c):
    p = 1 - tail
    assume(b < 0.999 * p)
    in_log_odds = theory.clip_safe_lambda_log_odds(theory.log_odds(p), theory.log_odds(b), c)
    assert theory.clip_safe_lambda(p, b, c) == pytest.approx(in_log_odds, rel=1e-9)


@given(tails, tails, bases, clips)
def test_decreasing_in_p_increasing_in_b_and_c(tail1, tail2, b, c):
    p_low, p_high = sorted((1 - tail1, 1 - tail2))
    assume(b < p_low < p_high * (1 - 1e-12))
    assert theory.clip_safe_lambda(p_high, b, c) < theory.clip_safe_lambda(p_low, b, c)
    assert theory.clip_safe_lambda(p_low, (b + p_low) / 2, c) > theory.clip_safe_lambda(p_low, b, c)
    assert theory.clip_safe_lambda(p_low, b, 1.1 * c) > theory.clip_safe_lambda(p_low, b, c) > 1


def test_limits():
    assert theory.clip_safe_lambda(0.99, 0.8, 1 + 1e-12) == pytest.approx(1, abs=1e-11)
    assert theory.clip_safe_lambda(0.99, 0.99 - 1e-13, 5) > 1e10
    assert theory.clip_safe_lambda(0.99, 0.8, np.inf) == np.inf
    assert theory.clip_safe_lambda_base_neutral(0.9993, 5) == theory.clip_safe_lambda(0.9993, 0.5, 5)


@given(tails, bases, clips)
def test_fixed_point_meets_the_boundary_at_the_threshold(tail, b, c):
    p = 1 - tail
    assume(b < 0.99 * p)
    at_threshold = theory.fixed_point_log_odds(p, b, theory.clip_safe_lambda(p, b, c))
    assert at_threshold == pytest.approx(theory.clip_boundary_log_odds(p, c), rel=1e-9, abs=1e-9)


@given(bases, bases, st.floats(-3, 5))
def test_fixed_point_is_the_normalised_target(p, b, lam):
    weights = [
        mpmath.mpf(y) * (mpmath.mpf(x) / mpmath.mpf(y)) ** mpmath.mpf(lam)
        for x, y in ((p, b), (1 - p, 1 - b))
    ]
    assert theory.fixed_point(p, b, lam) == pytest.approx(
        float(weights[0] / sum(weights)), rel=1e-9, abs=1e-300
    )


@given(st.floats(1e-6, 0.999), st.floats(1, 1e3))
def test_clip_boundary_is_where_the_tail_ratio_is_c(p, c):
    q = theory.clip_boundary(p, c)
    assert (1 - p) / (1 - q) == pytest.approx(c, rel=1e-9)
    assert theory.log_odds(q) == pytest.approx(theory.clip_boundary_log_odds(p, c), rel=1e-9, abs=1e-9)


@given(tails, bases)
def test_flip_turns_the_target_over_and_needs_a_surer_base(tail, b):
    p = 1 - tail
    assume(abs(p - b) > 1e-9)
    lam = theory.flip_lambda(p, b)
    if b < p:
        assert lam == np.inf
    else:
        exact = mpmath.log(mpmath.mpf(b) / (1 - mpmath.mpf(b))) / -_exact_gap(p, b)
        assert lam > 1 and relative_error(lam, exact) < 1e-13
        assert theory.fixed_point_log_odds(p, b, lam) == pytest.approx(0, abs=1e-7 * lam)


@given(st.floats(0.51, 0.999), st.floats(0.001, 0.999))
def test_full_distribution_flip_of_two_tokens_is_the_bernoulli_form(p, b):
    assume(abs(p - b) > 1e-6)
    pair = [np.log([[x, 1 - x]]) for x in (p, b)]
    expected = theory.flip_lambda(p, b)
    assert oracles.flip_lambda(*pair)[0] == pytest.approx(expected, rel=1e-6)


@given(st.integers(0, 10**6), st.integers(2, 12))
def test_full_distribution_flip_is_where_greedy_changes(seed, vocab):
    rng = np.random.default_rng(seed)
    teacher, base = np.log(rng.dirichlet(np.full(vocab, 0.3), (2, 40)) + 1e-9)
    lam, mode = oracles.flip_lambda(teacher, base), teacher.argmax(-1)
    for factor, same in ((1 - 1e-6, True), (1 + 1e-6, False)):
        at = np.where(np.isfinite(lam), lam, 1e3) * factor
        target = at[:, None] * teacher + (1 - at[:, None]) * base
        keeps = target.argmax(-1) == mode
        assert np.all(keeps[np.isfinite(lam)] == same) and np.all(keeps[np.isinf(lam)])


def test_full_distribution_flip_at_the_edges():
    teacher = np.log([0.6, 0.4, 1e-9])
    with np.errstate(divide="ignore"):
        forbidding_base, forbidding_teacher = np.log([0.5, 0.0, 0.5]), np.log([0.7, 0.3, 0.0])
    assert oracles.flip_lambda(teacher, forbidding_base) == 1  # only the base forbids the rival
    assert oracles.flip_lambda(forbidding_teacher, np.log([0.6, 0.3, 0.1])) == np.inf
    assert oracles.flip_lambda(teacher, teacher) == np.inf
    assert oracles.flip_lambda(teacher + 3, np.log([0.9, 0.09, 0.01]) - 7) == pytest.approx(
        oracles.flip_lambda(teacher, np.log([0.9, 0.09, 0.01]))
    )


def test_log_odds_from_log_probs_keeps_a_tail_that_float64_would_lose():
    logits = np.array([[80.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    log_probs = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    expected = [80 - np.log(np.e + 1), 2 - np.log(np.e + 1)]
    np.testing.assert_allclose(oracles.log_odds(log_probs, [0, 2]), expected, rtol=1e-14)


def test_arrays_broadcast_and_scalars_stay_floats():
    grid = theory.clip_safe_lambda(np.array([0.99, 0.999])[:, None], np.array([0.5, 0.8, 0.9]), 5)
    assert grid.shape == (2, 3) and grid.dtype == np.float64
    assert (
        grid[1, 2] == theory.clip_safe_lambda(0.999, 0.9, 5)
        and type(theory.clip_safe_lambda(0.999, 0.9, 5)) is float
    )


@pytest.mark.parametrize(
    ("call", "condition"),
    [
        (lambda: theory.clip_safe_lambda(0.9, 0.9, 5), "b < p"),
        (lambda: theory.clip_safe_lambda(0.5, 0.3, 5), "p > ½"),
        (lambda: theory.clip_safe_lambda(0.9, 0.5, 1.0), "c > 1"),
        (lambda: theory.clip_safe_lambda_log_odds(1.0, 2.0, 5), "b < p"),
        (lambda: theory.clip_safe_lambda([0.9, 0.4], 0.3, 5), "p > ½"),
        (lambda: theory.flip_lambda(0.5, 0.9), "p > ½"),
        (lambda: theory.clip_boundary(0.9, 0.5), "c ≥ 1"),
    ],
)
def test_undefined_names_the_violated_condition(call, condition):
    with pytest.raises(theory.Undefined, match=condition):
        call()


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ((0.0, 0.5, 5), "p = 0"),
        ((0.9, 1.0, 5), "b = 1"),
        ((np.nan, 0.5, 5), "p = nan"),
        ((0.9, 0.5, -1), "c = -1"),
        ((0.9, 0.5, np.nan), "c = nan"),
        ((0.9, -np.inf, 5), "b = -inf"),
    ],
)
def test_values_outside_their_range_are_another_error(args, name):
    with pytest.raises(ValueError, match=name) as caught:
        theory.clip_safe_lambda(*args)
    assert not isinstance(caught.value, theory.Undefined)


def test_undefined_entries_may_be_nan():
    lam = theory.clip_safe_lambda([0.9, 0.9, 0.4], [0.5, 0.95, 0.3], 5, undefined="nan")
    assert np.isfinite(lam[0]) and np.isnan(lam[1:]).all()


def test_importing_the_theory_does_not_import_jax():
    heavy = ("jax", "flax", "optax", "matplotlib")
    code = f"import sys, listopd_jax.theory; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
