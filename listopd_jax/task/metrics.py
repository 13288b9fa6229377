"""Ranking metrics of scored lists and their macro-averages with bootstrap intervals.

Conventions, because libraries differ:
  - NDCG gain is the label ('linear': scikit-learn, trec_eval, ranx `ndcg`) or 2^label − 1 ('exponential':
    ranx `ndcg_burges`, learning-to-rank papers); discount 1/log2(rank + 1); cutoffs beyond K are cut to K.
  - Equal predicted scores share the mean gain of their places (scikit-learn; McSherry & Najork 2008): the
    expectation over random tie-breaking. A stable sort would let the order of the input decide.
  - A list whose labels are all 0 has no ideal ranking: its NDCG and `useful` are undefined, parsed or not.
  - Kendall's tau is tau-b (scipy's default); undefined if labels or predictions are all equal.
  - MAE is not clipped to the label scale: a wild number shows.
  - Undefined values are left out of means; `counted` gives the number of lists behind each mean.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from listopd_jax.errors import UserError
from listopd_jax.task.contract import Parsed
from listopd_jax.task.protocol import Task

GAINS = ("linear", "exponential")
CUTOFFS = (1, 3, 5, 10)
METRICS = ("parse", *(f"ndcg@{k}" for k in CUTOFFS), "tau", "mae", "useful")


def ndcg(
    predicted: Float[np.ndarray, " K"], true: Float[np.ndarray, " K"], cutoff: int, gain: str = "linear"
) -> float:
    """Normalised discounted cumulative gain at `cutoff` (Järvelin & Kekäläinen 2002); NaN if `true` is all 0.

    Args:
      predicted: scores by which the items are ranked, high first.
      true: labels ≥ 0.
      gain: 'linear' or 'exponential'; UserError otherwise.
    """
    gains = _gains(true, gain)
    tied = predicted[:, None] == predicted[None, :]
    shared = tied @ gains / tied.sum(axis=1)
    places = np.arange(len(true))
    discounts = (places < cutoff) / np.log2(places + 2.0)
    ideal = np.sort(gains)[::-1] @ discounts
    if ideal <= 0:
        return float("nan")
    return min(
        1.0, float(shared[np.argsort(-predicted)] @ discounts / ideal)
    )  # a mean of equal gains may round up


def kendall_tau(predicted: Float[np.ndarray, " K"], true: Float[np.ndarray, " K"]) -> float:
    """Kendall's tau-b in −1..1 (Kendall 1945), over all K² pairs; NaN if either side is constant."""
    p, t = _pair_signs(predicted), _pair_signs(true)
    norm = np.sqrt(np.sum(p * p) * np.sum(t * t))
    return float(np.sum(p * t) / norm) if norm > 0 else float("nan")


def list_metrics(parsed: Parsed, true_scores: Sequence[float], gain: str = "linear") -> dict[str, float]:
    """Every metric of METRICS for one list; NaN where undefined.

    A list that failed to parse has parse = useful = 0 and no other metric.
    """
    true = np.asarray(true_scores, np.float64)
    values = dict.fromkeys(METRICS, float("nan"))
    values["parse"] = float(parsed.ok)
    if not parsed.ok:
        values["useful"] = 0.0 if _gains(true, gain).any() else float("nan")
        return values
    predicted = np.asarray(parsed.value, np.float64)
    values |= {f"ndcg@{k}": ndcg(predicted, true, k, gain) for k in CUTOFFS}
    values["useful"] = values["ndcg@1"]
    values["tau"] = kendall_tau(predicted, true)
    # Divided before it is summed: huge scores must not overflow.
    values["mae"] = float(np.sum(np.abs(predicted - true) / len(true)))
    return values


def summarize(
    task: Task, answers: Sequence[tuple[Parsed, Any]], bootstrap: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Macro-averages over answers, in JSON types; None where no answer defines the metric.

    Args:
      answers: verdict and record of each.
      bootstrap: resamples for the intervals; 0 for none (all None). Takes bootstrap × len(answers) × 16 bytes.
      seed: of the resampling.

    Returns:
      n answers, the settings and metrics of `task`, failures {class: count}, counted {metric: answers in its mean},
      intervals {metric: [low, high] or None}.
    """
    names, found = metric_names(task), Counter(parsed.failure for parsed, _ in answers)
    rows = [{"parse": float(parsed.ok)} | task.score(parsed, record) for parsed, record in answers]
    table = np.array([[row.get(name, np.nan) for name in names] for row in rows]).reshape(
        len(rows), len(names)
    )
    ones = np.ones((1, len(rows)))
    means = [value if np.isfinite(value) else None for value in _weighted_means(ones, table)[0].tolist()]
    counted = np.isfinite(table).sum(axis=0).tolist()
    return {
        "n": len(rows),
        **task.settings,
        **dict(zip(names, means, strict=True)),
        "failures": {
            name: found[name] for name in (*task.failures, *sorted(found.keys() - set(task.failures)))
        },
        "counted": dict(zip(names, counted, strict=True)),
        "intervals": dict(zip(names, bootstrap_intervals(table, bootstrap, seed), strict=True)),
    }


def metric_names(task: Task) -> tuple[str, ...]:
    """The metrics of a task, parse among them: first, unless the task has another place for it."""
    return tuple(task.metrics) if "parse" in task.metrics else ("parse", *task.metrics)


def bootstrap_intervals(
    table: Float[np.ndarray, "N M"], resamples: int, seed: int
) -> list[list[float] | None]:
    """95 % percentile intervals of the M column means, NaN left out, by resampling the N rows (Efron 1979).

    A resample with no value in a column says nothing about it and is left out; None for a column without any.
    Equal values (a parse rate of 0 or 1) give an interval of width 0, which understates the uncertainty: with
    n lists and no failure, 3/n is the usual 95 % bound on the failure rate.
    """
    n, m = table.shape
    if n == 0 or resamples == 0:
        return [None] * m
    # Drawing n rows with replacement, as counts per row: all resamples are then one matrix product.
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    columns = [column[np.isfinite(column)] for column in _weighted_means(counts, table).T]
    return [np.percentile(column, [2.5, 97.5]).tolist() if column.size else None for column in columns]


def _weighted_means(
    weights: Float[np.ndarray, "B N"], table: Float[np.ndarray, "N M"]
) -> Float[np.ndarray, "B M"]:
    """Column means of the finite entries under B weightings of the rows; NaN where the weights are all 0."""
    finite = np.isfinite(table)
    with np.errstate(invalid="ignore", over="ignore"):
        # Not `weights @ table`: a weight of 0 times NaN is NaN.
        return (weights @ np.where(finite, table, 0.0)) / (weights @ finite)


def _gains(true: Float[np.ndarray, " K"], gain: str) -> Float[np.ndarray, " K"]:
    if gain not in GAINS:
        raise UserError(f"gain={gain!r}: choose {' or '.join(map(repr, GAINS))}")
    return true if gain == "linear" else np.exp2(true) - 1


def _pair_signs(x: Float[np.ndarray, " K"]) -> Float[np.ndarray, "K K"]:
    """sign(x_i − x_j), by comparison, so that huge scores cannot overflow."""
    return (x[:, None] > x[None, :]) * 1.0 - (x[:, None] < x[None, :])
