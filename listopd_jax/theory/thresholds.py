"""Closed-form thresholds of the extrapolation weight λ: the clip boundary (EC) and the mode flip (ours).

Everything is written in log-odds, where the formulas are short and keep their digits next to p = 1. With P
= logit p, B = logit b and Q = logit q_c, the extrapolated fixed point is the line λP + (1−λ)B, and

    clip:  the line passes Q at     λ* = (Q − B)/(P − B) = 1 + log(1 + (c−1)/p)/(P − B)      EC Thm 4.1, Eq. 4
    flip:  the line passes zero at  λ_flip = B/(B − P)                                       ours

`p` is the teacher's probability of its modal token, `b` the base's probability of that same token, `c` the
clip of the importance ratio. All functions take scalars or arrays, broadcast them, compute in float64 and
return a float for scalars. A float64 cannot tell p from 1 within 1e-16; where that matters
(log-probabilities of a model) use log-odds and `clip_safe_lambda_log_odds`.

Errors: `ValueError` for a value that is not a probability, clip or λ; its subclass `Undefined` where the
values are fine but the threshold does not exist (b ≥ p, p ≤ ½, c ≤ 1). The thresholds take
`undefined="nan"` to get NaN there instead.

EC = Li, Jiang, Wang, Zhang, Yuen, arXiv:2605.08737.
"""

import numpy as np
from numpy.typing import ArrayLike

from listopd_jax.theory.checks import (
    Array,
    OnUndefined,
    as_clip,
    as_clip_at_least_1,
    as_finite,
    as_probability,
    check_defined,
    scalar,
)

# --- log-odds ---


def log_odds(p: ArrayLike) -> Array:
    """logit p = log p − log(1−p), to the last digit that a float64 p in (0, 1) carries."""
    p = as_probability("p", p)
    return scalar(np.log(p) - np.log1p(-p))


def probability(logit: ArrayLike) -> Array:
    """The inverse of `log_odds`, without overflow; `probability(-x)` is the complement, exact where it is tiny."""
    x = np.asarray(logit, float)
    # Of the negative size only, so exp never overflows.
    small = np.exp(-np.abs(x))
    return scalar(np.where(x < 0, small, 1.0) / (1.0 + small))


def log_odds_gap(p: ArrayLike, b: ArrayLike) -> Array:
    """logit p − logit b without cancellation: ±log1p((high−low)/(low(1−high)))."""
    p, b = as_probability("p", p), as_probability("b", b)
    high, low = np.maximum(p, b), np.minimum(p, b)
    with np.errstate(over="ignore", divide="ignore"):
        gap = np.log1p((high - low) / (low * (1 - high)))
    gap = np.where(np.isfinite(gap), gap, log_odds(high) - log_odds(low))  # a quotient past the float64 range
    return scalar(np.sign(p - b) * gap)


def fixed_point_log_odds(p: ArrayLike, b: ArrayLike, lam: ArrayLike) -> Array:
    """logit q* = λ logit p + (1−λ) logit b: the token in the target π_B(π_T/π_B)^λ of two tokens. Any p, b, λ."""
    return scalar(log_odds(b) + as_finite("lam", lam) * log_odds_gap(p, b))


def fixed_point(p: ArrayLike, b: ArrayLike, lam: ArrayLike) -> Array:
    """q*, the token's probability in the target; the tail 1 − q* is `probability(-fixed_point_log_odds(p, b, lam))`."""
    return probability(fixed_point_log_odds(p, b, lam))


# --- the clip boundary (EC) ---


def clip_boundary(p: ArrayLike, c: ArrayLike) -> Array:
    """q_c = 1 − (1−p)/c: a student above it is so sure that the clip cuts the tail's ratio π_T/π_S. Needs c ≥ 1."""
    return scalar(1 - (1 - as_probability("p", p)) / as_clip_at_least_1(c))


def clip_boundary_log_odds(p: ArrayLike, c: ArrayLike) -> Array:
    """logit q_c = logit p + log1p((c−1)/p)."""
    return scalar(log_odds(p) + np.log1p((as_clip_at_least_1(c) - 1) / np.asarray(p, float)))


def clip_safe_lambda(p: ArrayLike, b: ArrayLike, c: ArrayLike, *, undefined: OnUndefined = "raise") -> Array:
    """λ*(p, b, c), below which the fixed point stays under the clip boundary (EC Thm 4.1, Eq. 4).

    Falls with p, grows with b and c; 1 as c → 1, ∞ as b → p or c → ∞.

    >>> round(clip_safe_lambda(0.9993, 0.8105, 5), 4)
    1.2771
    """
    p, b, c = np.broadcast_arrays(as_probability("p", p), as_probability("b", b), as_clip(c))
    return _clip_threshold(p, b < p, log_odds_gap(p, b), c, undefined)


def clip_safe_lambda_log_odds(
    logit_p: ArrayLike, logit_b: ArrayLike, c: ArrayLike, *, undefined: OnUndefined = "raise"
) -> Array:
    """λ* from the log-odds of p and b, for probabilities closer to 1 than a float64 can say."""
    P, B, c = np.broadcast_arrays(as_finite("logit_p", logit_p), as_finite("logit_b", logit_b), as_clip(c))
    return _clip_threshold(probability(P), B < P, P - B, c, undefined)


def clip_safe_lambda_base_neutral(p: ArrayLike, c: ArrayLike) -> Array:
    """λ*(p, ½, c), for a base that does not know: log((1−p)/(c−1+p)) / log((1−p)/p) (EC Eq. 1)."""
    return clip_safe_lambda(p, 0.5, c)


def _clip_threshold(p, base_is_less_sure, gap, c, undefined: OnUndefined) -> Array:
    conditions = {
        "p > ½ (otherwise the token is not the teacher's mode)": p > 0.5,
        "b < p (otherwise extrapolation takes mass from the token, away from the clip)": base_is_less_sure,
        "c > 1 (otherwise every ratio above 1 is cut and the boundary lies at or below p)": c > 1,
    }
    valid = check_defined("λ*", conditions, undefined)
    with np.errstate(divide="ignore", invalid="ignore"):
        return scalar(np.where(valid, 1 + np.log1p((c - 1) / p) / gap, np.nan))


# --- the mode flip (ours) ---


def flip_lambda(p: ArrayLike, b: ArrayLike) -> Array:
    """λ_flip = logit b/(logit b − logit p) for ½ < p < b, ∞ for p ≥ b (ours, docs/theory.md §1).

    Beyond it the target of two tokens prefers the rival, so that greedy decoding changes its mind.
    """
    p, b = np.broadcast_arrays(as_probability("p", p), as_probability("b", b))
    check_defined("λ_flip", {"p > ½ (otherwise the token is not the teacher's mode)": p > 0.5})
    lam = np.full(p.shape, np.inf)
    np.divide(log_odds(b), log_odds_gap(b, p), out=lam, where=b > p)
    return scalar(lam)
