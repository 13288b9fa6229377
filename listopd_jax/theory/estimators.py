"""The mean behaviour of each estimator of ops/objective.py: drift, limit and flip threshold of one Bernoulli position.

With q the student's probability of the token and A the advantage (EC Eq. 2) of token (1) and rival (0), the
expected update of the student's log-odds θ is

    dθ ∝ w₁ A₁ − w₀ A₀,   w₁ = ρ₁ q(1−q),   w₀ = ρ₀ q(1−q)

`none`, `trainer_rollout` (on-policy, where it is 1) and `full_vocab` have ρ = 1: the drift is q(1−q)(θ* −
θ), the gradient of KL(π_S‖target), and the limit is the target π_B(π_T/π_B)^λ. The other ratios weight the
two tokens unequally, and then the constant log Z that both advantages share no longer cancels: the limit is
*not* the target. `normalize` takes log Z out, and with it every ratio ends at the target again. All ours.
"""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from listopd_jax.theory.checks import Array, as_clip, as_finite, as_probability, scalar
from listopd_jax.theory.thresholds import log_odds

Ratio = Literal["none", "trainer_rollout", "teacher_student", "aspo"]
Advantage = Literal["base_relative", "no_base"]

_SPAN, _CELLS = 60.0, 4096  # log-odds searched for a limit on each side of the base


def drift(theta: ArrayLike, p: ArrayLike, b: ArrayLike, lam: ArrayLike, c: ArrayLike = np.inf,
          ratio: Ratio = "teacher_student", advantage: Advantage = "base_relative",
          normalize: bool = False) -> Array:  # fmt: skip
    """Expected dθ of one sampled token at student log-odds `theta`; positive makes the token likelier."""
    student, teacher, base = (_log_pair(x) for x in (theta, log_odds(p), log_odds(b)))
    lam, c = as_finite("lam", lam), as_clip(c)
    relative = advantage == "base_relative"
    target = [lam * t + (1 - lam) * b_ if relative else lam * t for t, b_ in zip(teacher, base, strict=True)]
    log_z = np.logaddexp(*target) if normalize else 0.0
    pulls = []
    for s, t, goal in zip(student, teacher, target, strict=True):
        adv = goal - log_z - s
        # Clipped as a logarithm, before exp can overflow.
        pulls.append(np.exp(np.minimum(_log_ratio(s, t, adv, ratio), np.log(c))) * adv)
    # exp of the sum is q(1−q).
    return scalar(np.exp(student[0] + student[1]) * (pulls[0] - pulls[1]))


def limit_log_odds(p: float, b: float, lam: float, c: float = np.inf, ratio: Ratio = "teacher_student",
                   advantage: Advantage = "base_relative", normalize: bool = False) -> float:  # fmt: skip
    """Where the mean flow that starts at the base ends: the first zero of the drift on its way; ±∞ if there is none.

    Without noise: a start next to an unstable zero may leave it the other way in a sampled run.
    """
    start = float(log_odds(as_probability("b", b)))
    direction = np.sign(drift(start, p, b, lam, c, ratio, advantage, normalize))
    if direction == 0:
        return start
    path = start + direction * np.linspace(0, _SPAN, _CELLS + 1)
    turned = np.sign(drift(path, p, b, lam, c, ratio, advantage, normalize)) != direction
    if not turned.any():
        return float(direction * np.inf)
    cell = int(turned.argmax())
    low, high = path[cell - 1], path[cell]
    for _ in range(60):
        middle = (low + high) / 2
        ahead = np.sign(drift(middle, p, b, lam, c, ratio, advantage, normalize)) == direction
        low, high = (middle, high) if ahead else (low, middle)
    return float((low + high) / 2)


def flip_lambda_of(p: float, b: float, ratio: Ratio = "none", c: float = np.inf) -> float:
    """The λ at which the drift of `base_relative` changes sign at q = ½: where this estimator's limit flips the mode.

    For ½ < p < b. `none` gives `flip_lambda`; `teacher_student` a larger λ, `aspo` a smaller one. Bisection
    in λ.
    """
    low, high = 1.0, 2.0
    # θ = 0 is q = ½. Doubled until the drift turns there: a bracket for the bisection.
    while drift(0.0, p, b, high, c, ratio) > 0:
        if high > 1e6:
            return np.inf
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if drift(0.0, p, b, middle, c, ratio) > 0 else (low, middle)
    return (low + high) / 2


def _log_pair(log_odds_: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of token and rival."""
    x = np.asarray(log_odds_, float)
    return -np.logaddexp(0, -x), -np.logaddexp(0, x)


def _log_ratio(student, teacher, adv, ratio: Ratio) -> np.ndarray:
    if ratio in ("none", "trainer_rollout"):
        return np.zeros_like(student)
    log_ratio = teacher - student
    return np.where(adv > 0, -log_ratio, log_ratio) if ratio == "aspo" else log_ratio
