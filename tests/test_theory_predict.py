"""Predicted curves from anchor runs: what is planted is found, and a band of 90 % holds about as often."""

import numpy as np
import pytest
from scipy import special

from listopd_jax.theory.predict import Shape, Undetermined, closest, gaps, predicted, reach

GRID = np.linspace(0.9, 2.5, 33)
LISTS = 1000


def falls(lam):
    """Parse of greedy answers without training."""
    return 1 / (1 + np.exp((lam - 1.25) / 0.05))


SHAPE = Shape(GRID, falls(GRID))


def trained(rng, lambdas, at_1, slope, spread, seeds):
    """Parse [seeds, λ] of runs that reach at_1 + slope(λ − 1), with noise of seeds and of lists."""
    places = at_1 + slope * (lambdas - 1) + spread * rng.standard_normal((seeds, len(lambdas)))
    return rng.binomial(LISTS, SHAPE.at(places)) / LISTS


def test_the_shape_is_its_points_and_finds_them_again():
    np.testing.assert_allclose(SHAPE.at(GRID), SHAPE.parse, atol=1e-12)
    np.testing.assert_allclose(
        SHAPE.where(np.array([0.9, 0.5, 0.1])), 1.25 + 0.05 * np.log([1 / 9, 1, 9]), atol=5e-3
    )
    assert SHAPE.at(np.array([0.0, 9.0])).tolist() == [SHAPE.parse[0], SHAPE.parse[-1]]


def test_gaps_are_where_the_curve_falls():
    coarse = Shape(GRID[::4], falls(GRID[::4]))
    assert gaps(coarse, 0.15).tolist() == pytest.approx([1.2]) or all(
        1.0 < x < 1.5 for x in gaps(coarse, 0.15)
    )
    assert not gaps(coarse, 1.0).size


def test_exact_anchors_give_the_reach():
    lam = np.array([1.2, 1.4, 1.6])
    found = reach(SHAPE, lam, SHAPE.at(0.98 + 0.6 * (lam - 1)))
    np.testing.assert_allclose(found.line, [0.98, 0.6], atol=5e-3)
    assert found.freedom == 1 and found.spread < 0.006


def test_anchors_that_say_nothing_are_refused():
    lam = np.array([1.2, 1.2, 1.2, 1.9])
    with pytest.raises(Undetermined, match="3 of 4 anchor runs"):
        reach(SHAPE, lam, np.array([0.5, 0.6, 0.55, 0.0]))  # one λ is left
    with pytest.raises(Undetermined, match="0 of 4"):
        reach(SHAPE, lam, np.array([1.0, 0.99, 1.0, 0.0]))


def test_the_shape_that_the_anchors_follow_is_used():
    rng, lam = np.random.default_rng(0), np.repeat([1.2, 1.4, 1.6], 2)
    parse = trained(rng, lam, 1.0, 0.6, 0.0, 1)[0]
    flat = Shape(GRID, 1 / (1 + np.exp((GRID - 1.4) / 0.4)))
    assert closest({"flat": flat, "right": SHAPE}, lam, parse)[0] == "right"


def test_a_predicted_curve_and_its_band_hold_what_comes():
    rng, anchors, lambdas = (
        np.random.default_rng(3),
        np.repeat([1.25, 1.45], 3),
        np.array([1.1, 1.2, 1.3, 1.4, 1.5, 1.7]),
    )
    inside, errors = [], []
    for _ in range(60):
        parse = trained(rng, anchors, 1.0, 0.7, 0.02, 1)[0]
        curve = predicted(SHAPE, reach(SHAPE, anchors, parse), lambdas, seeds=8, lists=LISTS, draws=400)
        mean = trained(rng, lambdas, 1.0, 0.7, 0.02, 8).mean(0)
        inside.append((mean >= curve.low) & (mean <= curve.high))
        errors.append(curve.parse - mean)
    assert 0.8 <= np.mean(inside) <= 0.99
    assert np.sqrt(np.mean(np.square(errors))) < 0.08 and abs(np.mean(errors)) < 0.02
    assert (curve.low <= curve.parse).all() and (curve.parse <= curve.high).all()


def test_the_spread_of_seeds_flattens_the_mean():
    lam = np.array([1.2, 1.3])
    steady = reach(SHAPE, np.array([1.2, 1.3, 1.4]), SHAPE.at(np.array([1.2, 1.3, 1.4])))
    noisy = steady._replace(spread=0.1)
    one, two = (predicted(SHAPE, r, lam, seeds=8, lists=LISTS).parse for r in (steady, noisy))
    assert two[0] < one[0] and two[1] > one[1]


def test_a_curve_that_does_not_come_to_the_anchors_is_not_used():
    """All of them would stand at its end, in perfect agreement."""
    grid = np.linspace(0.9, 2.5, 9)
    far, near = (Shape(grid, special.expit((at - grid) / width)) for at, width in ((3.2, 0.3), (1.6, 0.1)))
    lambdas = np.repeat([1.55, 1.65, 1.8], 2)
    parse = np.clip(near.at(lambdas) + np.tile([0.03, -0.03], 3), 0, 1)
    assert closest({"far": far, "near": near}, lambdas, parse)[0] == "near"
    with pytest.raises(Undetermined, match="does not come to the parse of every anchor"):
        closest({"far": far}, lambdas, parse)
