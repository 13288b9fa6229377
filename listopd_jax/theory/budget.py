"""How long the mean-field flow takes to reach a threshold: why an observed cliff moves left as the budget N grows.

One Bernoulli position with one free log-odds θ, exact gradients of KL(π_S‖target), no clip, step size η:

    dθ/dn = η q(1−q) (θ* − θ),   q = probability(θ),   θ(0) = B = logit b,   θ* = λP + (1−λ)B

The flow never oscillates, so it reaches a level L beyond B at all iff θ* lies beyond L: iff λ exceeds the
closed-form threshold. The time it takes is an integral, and solving it for λ gives the λ at which N steps
just suffice (ours; EC Cor. 4.2 gives the order only). L = `clip_boundary_log_odds(p, c)` for the clip, L =
0 for the mode flip.
"""

import numpy as np
from numpy.typing import ArrayLike

from listopd_jax.theory.checks import Array, as_finite, at_least, check_defined, scalar
from listopd_jax.theory.thresholds import log_odds, log_odds_gap

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)


def budget_lambda(p: ArrayLike, b: ArrayLike, level: ArrayLike, lr: ArrayLike, steps: ArrayLike) -> Array:
    """The λ that reaches log-odds `level` in exactly `steps` steps; falls to the threshold as the budget grows."""
    distance, gap = _distance_and_gap(p, b, level)
    effort = at_least("lr", lr, np.finfo(float).tiny) * at_least("steps", steps, np.finfo(float).tiny)
    start = np.asarray(log_odds(b))
    shape = np.broadcast_shapes(distance.shape, effort.shape)
    low, high = np.full(shape, -40.0), np.full(shape, 40.0)  # of log(beyond), bisected to the last digit
    for _ in range(80):
        middle = (low + high) / 2
        too_slow = _integral(start, distance, np.exp(middle)) > effort
        low, high = np.where(too_slow, middle, low), np.where(too_slow, high, middle)
    # λ = (θ* − B)/(P − B), and θ* − B is (L − B)(1 + beyond).
    return scalar(distance / gap * (1 + np.exp((low + high) / 2)))


def _distance_and_gap(p, b, level) -> tuple[np.ndarray, np.ndarray]:
    """L − B and P − B, of one sign where some λ > 0 reaches the level."""
    gap = np.asarray(log_odds_gap(p, b))
    distance = as_finite("level", level) - log_odds(b)
    check_defined(
        "the level's λ", {"b ≠ p": gap != 0, "a level on the teacher's side of the base": distance * gap > 0}
    )
    return distance, gap


def _integral(start, distance, beyond) -> np.ndarray:
    """η·steps = ∫ dθ/(q(1−q)(θ*−θ)) from B to L, with θ* − θ = (θ* − B)e^{−s}, which makes the integrand smooth."""
    span = np.log1p(1 / beyond)[..., None]  # s at L
    s = span * (1 + _NODES) / 2
    theta = np.asarray(start)[..., None] - (distance * (1 + beyond))[..., None] * np.expm1(-s)
    # 2 + 2 cosh θ is 1/(q(1−q)).
    return ((2 + 2 * np.cosh(theta)) * _WEIGHTS).sum(-1) * span[..., 0] / 2
