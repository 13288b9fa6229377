"""From positions to thresholds, in NumPy alone: a notebook can recompute them with another clip or τ.

EC's clip-safe thresholds (EC Prop. 4.3) and our mode-flip ones. Greedy decoding from the target leaves the teacher's
answer at the first position whose λ_flip lies below λ, so the share of lists with a flip anywhere is exactly the share
of lists that the target answers differently.

EC = Li, Jiang, Wang, Zhang, Yuen, arXiv:2605.08737.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from listopd_jax.records import (
    Calibration,
    ClassRow,
    CurvePoint,
    FlipRow,
    ForecastFlips,
    StripToken,
)
from listopd_jax.rounding import ceil_div
from listopd_jax.stages.positions import Positions
from listopd_jax.task.codec import Codec
from listopd_jax.task.contract import TOKEN_CLASSES
from listopd_jax.theory.checks import Undefined
from listopd_jax.theory.thresholds import clip_safe_lambda_log_odds, probability

ENOUGH_PROMPTS = 200  # EC's minimum
LAMBDAS = tuple(round(1 + 0.05 * i, 2) for i in range(41))  # where the share of lists with a flip is read
_PERCENTILES = (1, 5, 25, 50)


def calibrate(
    positions: Positions,
    clip: float,
    tau: float = 0.9,
    bootstrap: int = 2000,
    seed: int = 0,
) -> Calibration:
    """The thresholds of `positions` at clip c; a number is None, with its reason, where it does not exist.

    Over the positions with p ≥ `tau` (EC Prop. 4.3), but `classes`, `flips` and `curve` over all, since the mode flips
    where the teacher is unsure. A maximum is never above the observed one in a resample: read the interval of p_safe as
    its lower end. No positions, c ≤ 0 or τ outside (0, 1): ValueError.
    """
    if not len(positions.p):
        raise ValueError("no positions to calibrate on")
    if not (clip > 0 and 0 < tau < 1):
        raise ValueError(f"clip = {clip:g}, tau = {tau:g}: must be positive and strictly between 0 and 1")
    kept = positions.where(positions.p >= tau)
    table, prompts = _prompt_means(kept), len(np.unique(positions.prompt))
    numbers, reasons = _thresholds(table, clip, tau)
    intervals, notes = _intervals(table, clip, bootstrap, seed)
    return Calibration(
        clip=_finite(clip),
        tau=tau,
        prompts=prompts,
        positions=len(positions.p),
        kept=len(kept.p),
        **numbers,
        **_spread(kept.p, kept.logit_p),
        reasons=reasons,
        intervals=intervals,
        classes=_class_rows(positions, clip, tau),
        flips=_flip_rows(positions),
        curve=_curve(positions),
        notes=_notes(prompts, len(table), tau) + notes,
    )


def forecast_row(lam: float, positions: Positions) -> ForecastFlips:
    """The flips of `positions` along the forecast at λ, list by list."""
    prompts, rows = np.unique(positions.prompt, return_inverse=True)
    agrees = np.full(len(prompts), True)
    # .at, because rows repeat: plain indexing would keep one position of each list.
    np.logical_and.at(agrees, rows, positions.token == positions.written)
    first = _first_flips(positions)["structural"]
    return ForecastFlips(
        lam=float(lam),
        agreement=float(agrees.mean()),
        flipped=float((first < lam).mean()),
        **_quantiles(first),
        never=float(np.isinf(first).mean()),
    )


def strip_of(positions: Positions, codec: Codec) -> tuple[StripToken, ...]:
    """The answer whose structural tokens flip first, token by token; the first one where none flips."""
    flips = np.where(positions.structural, positions.flip, np.inf)
    answer = positions.where(positions.prompt == positions.prompt[flips.argmin()])
    texts = [codec.text([token]) or "end" for token in answer.token.tolist()]
    classes = [TOKEN_CLASSES[i] for i in answer.token_class]
    columns = zip(
        texts, classes, answer.p.tolist(), answer.b.tolist(), map(_finite, answer.flip), strict=True
    )
    return tuple(StripToken(text=t, token_class=c, p=p, b=b, flip=f) for t, c, p, b, f in columns)


def _prompt_means(kept: Positions) -> Float[np.ndarray, "n 5"]:
    """Within-prompt means of p, 1−p, b, 1−b and log π_T/π_B; the complements are not 1 minus a rounded mean."""
    prompts, rows = np.unique(kept.prompt, return_inverse=True)
    columns = (kept.p, probability(-kept.logit_p), kept.b, probability(-kept.logit_b), kept.log_ratio)
    sums = [np.bincount(rows, column, len(prompts)) for column in columns]
    return np.stack(sums, 1) / np.bincount(rows, minlength=len(prompts))[:, None]


def _estimates(weights: Float[np.ndarray, "R n"], table: Float[np.ndarray, "n 5"]) -> dict[str, np.ndarray]:
    """p_typ, p_safe and both b under R weightings of the prompts, [R] each, with their log-odds ("logit_…")."""
    with np.errstate(invalid="ignore"):  # an infinite log-ratio (b = 0) that a resample leaves out: NaN
        p, tail, b, b_tail, log_ratio = (weights @ table / weights.sum(1, keepdims=True)).T
    # The largest p, found by its complement: 1 − p keeps the digits that p loses next to 1.
    safest = np.where(weights > 0, table[:, 1], np.inf).argmin(1)
    implied = p * np.exp(-log_ratio)
    pairs = {
        "p_typ": (p, tail),
        "p_safe": (table[safest, 0], table[safest, 1]),
        "b_measured": (b, b_tail),
        # 1 − p·exp(−r) = (1 − p) − p·(exp(−r) − 1), with r the mean log-ratio and no cancellation.
        "b_implied": (implied, tail - p * np.expm1(-log_ratio)),
    }
    with np.errstate(divide="ignore", invalid="ignore"):
        logits = {f"logit_{name}": np.log(x) - np.log(rest) for name, (x, rest) in pairs.items()}
    return {name: x for name, (x, _) in pairs.items()} | logits


_LAMBDA_OF = {
    f"lambda_{scale}_{reading}": (f"logit_p_{scale}", f"logit_b_{reading}")
    for scale in ("typ", "safe")
    for reading in ("measured", "implied")
}


def _thresholds(table, clip: float, tau: float) -> tuple[dict[str, float | None], dict[str, str]]:
    """p_typ, p_safe, both b and the four λ*, and why those that are None do not exist."""
    names = ("p_typ", "p_safe", "b_measured", "b_implied")
    if not len(table):
        absent = dict.fromkeys((*names, *_LAMBDA_OF))
        return absent, dict.fromkeys(absent, f"no position has p ≥ {tau:g}")
    found = {name: float(x[0]) for name, x in _estimates(np.ones((1, len(table))), table).items()}
    lambdas = {name: _clip_lambda(found[p], found[b], clip) for name, (p, b) in _LAMBDA_OF.items()}
    numbers = {name: found[name] for name in names} | {name: lam for name, (lam, _) in lambdas.items()}
    return numbers, {name: reason for name, (_, reason) in lambdas.items() if reason}


def _clip_lambda(logit_p: float, logit_b: float, clip: float) -> tuple[float | None, str | None]:
    """λ* of EC Eq. 4, or None and why it does not exist."""
    if not np.isfinite([logit_p, logit_b]).all():
        return None, "λ* is undefined: p or b does not lie strictly between 0 and 1"
    if np.isinf(clip):
        return None, "λ* is infinite: without a clip there is no boundary to cross"
    try:
        return clip_safe_lambda_log_odds(logit_p, logit_b, clip), None
    except Undefined as e:
        return None, str(e)


def _intervals(table, clip: float, bootstrap: int, seed: int) -> tuple[dict[str, Any], list[str]]:
    """95 % percentile intervals by resampling prompts (Efron 1979), and notes on what is undefined in resamples."""
    names = ("p_typ", "p_safe", "b_measured", "b_implied", "lambda_typ_measured", "lambda_typ_implied")
    n = len(table)
    if n == 0 or bootstrap == 0:
        return dict.fromkeys(names), []
    # A resample of prompts is a vector of counts, so all of them are one matrix product.
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=bootstrap).astype(np.float64)
    found = _estimates(counts, table)
    for name in names[4:]:
        found[name] = _clip_lambdas(*(found[x] for x in _LAMBDA_OF[name]), clip)
    defined = {name: found[name][np.isfinite(found[name])] for name in names}
    notes = [
        f"{name} does not exist in {bootstrap - len(x)} of {bootstrap} resamples; its interval is over the others."
        for name, x in defined.items()
        if 0 < len(x) < bootstrap
    ]
    return {k: np.percentile(x, [2.5, 97.5]).tolist() if x.size else None for k, x in defined.items()}, notes


def _clip_lambdas(logit_p: Float[np.ndarray, " R"], logit_b: Float[np.ndarray, " R"], clip: float):
    """λ* [R], NaN where it does not exist."""
    finite = np.isfinite(logit_p) & np.isfinite(logit_b)
    lam = np.full(finite.shape, np.nan)
    lam[finite] = clip_safe_lambda_log_odds(logit_p[finite], logit_b[finite], clip, undefined="nan")
    return lam


def _spread(p: Float[np.ndarray, " N"], logit_p: Float[np.ndarray, " N"]) -> dict[str, float | None]:
    """p token by token: the ways to sum it up other than EC's."""
    names = ("p_max", "p_mean", "p_geometric_mean", "p_percentile_5", "p_min")
    if not p.size:
        return dict.fromkeys(names)
    # −log(1 + e^(−logit)) is log p.
    geometric = np.exp(-np.logaddexp(0, -logit_p).mean())
    values = (p.max(), p.mean(), geometric, np.percentile(p, 5), p.min())
    return dict(zip(names, map(float, values), strict=True))


def _class_rows(positions: Positions, clip: float, tau: float) -> tuple[ClassRow, ...]:
    """One row per token class that occurs, in the order of TOKEN_CLASSES."""
    return tuple(
        _class_row(TOKEN_CLASSES[i], positions.where(positions.token_class == i), clip, tau)
        for i in np.unique(positions.token_class)
    )


def _class_row(name: str, positions: Positions, clip: float, tau: float) -> ClassRow:
    kept = positions.where(positions.p >= tau)
    one_prompt = kept._replace(prompt=np.zeros_like(kept.prompt))  # so that every position counts the same
    numbers, reasons = _thresholds(_prompt_means(one_prompt), clip, tau)
    return ClassRow(
        token_class=name,
        positions=len(positions.p),
        kept=len(kept.p),
        p=numbers["p_typ"],
        b=numbers["b_measured"],
        lam=numbers["lambda_typ_measured"],
        reason=reasons.get("lambda_typ_measured"),
        **{f"flip_{name}": x for name, x in _quantiles(positions.flip).items()},
    )


def _first_flips(positions: Positions) -> dict[str, Float[np.ndarray, " n"]]:
    """The smallest λ_flip of each list, over its structural positions and over all."""
    prompts, rows = np.unique(positions.prompt, return_inverse=True)
    first = {}
    for name, mask in (("structural", positions.structural), ("all", np.full(rows.shape, True))):
        first[name] = np.full(len(prompts), np.inf)
        np.minimum.at(first[name], rows[mask], positions.flip[mask])
    return first


def _flip_rows(positions: Positions) -> tuple[FlipRow, ...]:
    return tuple(
        FlipRow(positions=name, **_quantiles(first), never=float(np.isinf(first).mean()))
        for name, first in _first_flips(positions).items()
    )


def _curve(positions: Positions) -> tuple[CurvePoint, ...]:
    first = _first_flips(positions)
    return tuple(
        CurvePoint(lam=lam, **{name: float((flip < lam).mean()) for name, flip in first.items()})
        for lam in LAMBDAS
    )


def _quantiles(flip: Float[np.ndarray, " N"]) -> dict[str, float | None]:
    """Minimum and percentiles of λ_flip by the inverse distribution function: ∞ cannot be interpolated."""
    ranked = np.sort(flip)
    ranks = {q: max(0, ceil_div(q * len(ranked), 100) - 1) for q in _PERCENTILES}
    rest = {f"percentile_{q}": _finite(ranked[rank]) for q, rank in ranks.items()}
    return {"min": _finite(ranked[0])} | rest


def _finite(x: float) -> float | None:
    return float(x) if np.isfinite(x) else None


def _notes(prompts: int, with_kept: int, tau: float) -> list[str]:
    notes = []
    if prompts < ENOUGH_PROMPTS:
        notes.append(
            f"Only {prompts} prompts: EC asks for {ENOUGH_PROMPTS} or more, the intervals may mislead."
        )
    if 0 < with_kept < prompts:
        notes.append(
            f"{prompts - with_kept} prompts have no position with p ≥ {tau:g} and count in no mean of p or b."
        )
    return notes
