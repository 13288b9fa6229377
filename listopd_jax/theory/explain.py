"""The thresholds of one position in plain words and as JSON values: what the command line and the report show."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from listopd_jax.theory.checks import Undefined
from listopd_jax.theory.thresholds import (
    clip_boundary,
    clip_safe_lambda,
    clip_safe_lambda_base_neutral,
    fixed_point,
    flip_lambda,
)


@dataclass(frozen=True)
class Explanation:
    """Thresholds of one position. None: undefined (`reasons` says why) or, for `lambda_flip`, that no λ flips it."""

    p: float
    b: float
    c: float
    lam: float  # where `fixed_point` is taken
    lambda_clip: float | None
    lambda_clip_base_neutral: float | None
    lambda_flip: float | None
    fixed_point: float
    q_c: float | None
    reasons: tuple[str, ...]

    @property
    def binding(self) -> str:
        """Which threshold comes first as λ grows: "clip", "flip" or "none"."""
        known = {"clip": self.lambda_clip, "flip": self.lambda_flip}
        known = {name: lam for name, lam in known.items() if lam is not None}
        return min(known, key=known.get, default="none")

    def to_json(self) -> dict:
        """The thresholds under the names of the command's --json; "reason" is there only if one is
        undefined.
        """
        names = ("lambda_clip", "lambda_clip_base_neutral", "lambda_flip", "fixed_point", "q_c")
        values = {name: getattr(self, name) for name in names}
        return values | ({"reason": "; ".join(self.reasons)} if self.reasons else {})


def explain(p: float, b: float, c: float, lam: float = 1.2) -> Explanation:
    """All thresholds for a teacher p, a base b and a clip c. ValueError for values outside their range."""
    reasons: list[str] = []
    clip = _finite_or_reason("lambda_clip", lambda: clip_safe_lambda(p, b, c), reasons)
    neutral = _finite_or_reason(
        "lambda_clip_base_neutral", lambda: clip_safe_lambda_base_neutral(p, c), reasons
    )
    flip = _finite_or_reason("lambda_flip", lambda: flip_lambda(p, b), reasons, infinite="")
    boundary = _finite_or_reason("q_c", lambda: clip_boundary(p, c), reasons)
    return Explanation(p, b, c, lam, clip, neutral, flip, fixed_point(p, b, lam), boundary, tuple(reasons))


def _finite_or_reason(
    name: str, compute: Callable[[], float], reasons: list[str], infinite: str = "infinite: no λ reaches it"
) -> float | None:
    """The value, or None with the reason appended to `reasons` (none for an infinite one if `infinite` is empty)."""
    try:
        value = compute()
    except Undefined as e:
        reasons.append(f"{name}: {str(e).partition(': ')[2]}")
        return None
    if math.isinf(value):
        reasons += [f"{name}: {infinite}"] if infinite else []
        return None
    return value


def sentences(e: Explanation) -> list[str]:
    """The explanation for a reader, one line each."""
    lines = [_clip(e), _neutral(e), _flip(e), _fixed_point(e), _boundary(e), _binding(e)]
    return [line for line in lines if line] + [f"undefined    {reason}" for reason in e.reasons]


def _line(name: str, value: float | None, digits: int, meaning: str) -> str:
    return "" if value is None else f"{name:<13}{value:.{digits}f}  {meaning}"


def _clip(e: Explanation) -> str:
    meaning = "above it training aims at a student so sure of the token that the clip "
    return _line(
        "λ_clip", e.lambda_clip, 4, f"{meaning}c = {e.c:g} cuts the weight of its rare misses (EC Eq. 4)."
    )


def _neutral(e: Explanation) -> str:
    meaning = "the same for a base that does not know the token; use it where b was not measured (EC Eq. 1)."
    return _line("λ_clip, b=½", e.lambda_clip_base_neutral, 4, meaning)


def _flip(e: Explanation) -> str:
    if e.lambda_flip is None and e.p > 0.5:
        return (
            f"{'λ_flip':<13}none    the teacher is at least as sure as the base: no λ turns the token over."
        )
    meaning = (
        "above it training aims at the rival token: the base is surer than the teacher, and extrapolation "
    )
    return _line(
        "λ_flip", e.lambda_flip, 4, f"{meaning}subtracts the base, so greedy decoding changes, clip or not."
    )


def _fixed_point(e: Explanation) -> str:
    meaning = (
        f"the token's probability that training aims at for λ = {e.lam:g} (teacher {e.p:g}, base {e.b:g})."
    )
    return _line("fixed point", e.fixed_point, 6, meaning)


def _boundary(e: Explanation) -> str:
    return _line("q_c", e.q_c, 6, "the probability above which the clip is at work: q_c = 1 − (1−p)/c.")


def _binding(e: Explanation) -> str:
    return (
        f"{'binding':<13}"
        + {
            "clip": "the clip threshold: it is the only one that a growing λ meets here (b < p).",
            "flip": "the mode flip: it is the only one that a growing λ meets here (p < b).",
            "none": "none: no threshold is defined and finite here.",
        }[e.binding]
    )
