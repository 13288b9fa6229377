"""Float64 twins of what ops/guard.py and stages/calibrate.py compute in float32 from log-probabilities."""

import numpy as np
from jaxtyping import Float, Int


def log_odds(log_probs: Float[np.ndarray, "*s V"], token: Int[np.ndarray, "*s"]) -> Float[np.ndarray, "*s"]:
    """Log-odds of `token`, exact even where its probability rounds to 1: the other V−1 tokens are summed."""
    index = np.asarray(token)[..., None]
    own = np.take_along_axis(log_probs, index, -1)[..., 0]
    others = np.where(np.arange(log_probs.shape[-1]) == index, -np.inf, log_probs)
    return own - np.logaddexp.reduce(others, -1)


def flip_lambda(
    log_teacher: Float[np.ndarray, "*s V"], log_base: Float[np.ndarray, "*s V"]
) -> Float[np.ndarray, "*s"]:
    """λ_flip of the teacher's modal token: min over rivals v with Δ_B > Δ_T of Δ_B/(Δ_B − Δ_T), ∞ if none.

    Δ(v) is a model's log-probability margin of that token over v (docs/theory.md §1). The inputs need not be
    normalised; −inf forbids a token. A rival that only the base forbids, or that ties the teacher's mode, flips at 1.
    """
    log_teacher, log_base = np.asarray(log_teacher, float), np.asarray(log_base, float)
    mode = log_teacher.argmax(-1)[..., None]
    with np.errstate(invalid="ignore"):  # −inf minus −inf: a token that both forbid is no rival
        margin_t, margin_b = (np.take_along_axis(x, mode, -1) - x for x in (log_teacher, log_base))
        gap = margin_b - margin_t
    is_rival = (np.arange(log_teacher.shape[-1]) != mode) & (margin_b > margin_t)
    lam = np.where(is_rival, 1.0, np.inf)  # the limit of the quotient as Δ_B → ∞
    np.divide(margin_b, gap, out=lam, where=is_rival & np.isfinite(margin_b))
    return lam.min(-1)
