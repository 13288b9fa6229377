"""The mean-field budget shift against step-by-step integration."""

import numpy as np
import pytest

from listopd_jax import theory
from listopd_jax.theory.budget import budget_lambda


def simulate(p, b, lam, level, lr, most=10**6):
    """Euler steps until the log-odds pass `level`."""
    theta, target = theory.log_odds(b), theory.fixed_point_log_odds(p, b, lam)
    side = np.sign(level - theta)
    for step in range(1, most):
        q = theory.probability(theta)
        theta += lr * q * (1 - q) * (target - theta)
        if side * (theta - level) >= 0:
            return step
    return np.inf


CASES = [(0.684, 0.988, 0.0, 0.01, 2000), (0.99, 0.8, theory.clip_boundary_log_odds(0.99, 5), 0.05, 20000)]


@pytest.mark.parametrize(("p", "b", "level", "lr", "steps"), CASES)
def test_budget_lambda_is_where_the_simulated_flow_just_arrives(p, b, level, lr, steps):
    lam = budget_lambda(p, b, level, lr, steps)
    assert simulate(p, b, lam, level, lr) == pytest.approx(steps, rel=5e-3)


@pytest.mark.parametrize(
    ("p", "b", "level", "threshold"),
    [
        (0.684, 0.988, 0.0, theory.flip_lambda(0.684, 0.988)),
        (0.99, 0.8, theory.clip_boundary_log_odds(0.99, 5), theory.clip_safe_lambda(0.99, 0.8, 5)),
    ],
)
def test_cliff_moves_left_to_the_closed_form_and_never_past_it(p, b, level, threshold):
    lam = budget_lambda(p, b, level, 0.1, np.array([100.0, 1000.0, 1e4, 1e5]))
    assert np.all(np.diff(lam) <= 0) and np.all(lam >= threshold * (1 - 1e-12))
    assert lam[0] > 1.2 * lam[-1]
    assert budget_lambda(p, b, level, 1e9, 1e9) == pytest.approx(threshold, rel=1e-12)


def test_a_level_behind_the_base_is_undefined():
    with pytest.raises(theory.Undefined, match="teacher's side"):
        budget_lambda(0.9, 0.8, 0.0, 0.1, 100)
