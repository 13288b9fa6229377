"""Where the cliff is: onset and midpoint of parse against λ, with Student's t intervals over seeds.

Three readings of one grid, side by side, because each has its own weakness:

- `grid`, EC's rule: each seed's onset is the largest λ of the grid whose parse reaches the threshold, and
  onsets are averaged over the seeds that have one. Coarse, and it leaves out the seeds that never reach the
  threshold, which flatters. EC does not state it; with a percentile bootstrap over seeds it gives EC's printed
  intervals (EC, tables of its results).
- `interpolated` (ours): the largest λ at which the mean curve, drawn with straight lines, still reaches the
  level.
- `isotonic` (ours): the same after the closest non-increasing fit from the peak on, so that one lucky point
  past the cliff cannot move it.

A curve with nothing to locate (too low everywhere, or no fall) is refused with a reason: `NoCliff`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import special

THRESHOLDS = (0.80, 0.85, 0.90)
MIDPOINT = 0.70  # at this parse level EC's c = 1.5 midpoint, 1.0695, comes out to the printed digits
MIN_DROP = 0.10  # a smaller fall from the peak is not a cliff

Curves = Float[np.ndarray, "R L"]


class NoCliff(ValueError):
    """There is no cliff to locate on this grid; the message is the reason."""


def table(
    records: Iterable[Mapping[str, Any]], metric: str = "parse"
) -> tuple[np.ndarray, list[int], np.ndarray]:
    """λ [L] ascending, seeds [S] and metric [S, L] from the records of results.json whose stage is "opd".

    ValueError for a (λ, seed) that is missing or appears twice: filter the records to one budget and one
    clip first.
    """
    cells: dict[tuple[float, int], float] = {}
    for record in records:
        if record.get("stage") != "opd":
            continue
        cell = (float(record["lambda"]), int(record["seed"]))
        if cell in cells:
            raise ValueError(
                f"λ = {cell[0]:g}, seed {cell[1]} appears twice: filter by budget and clip first"
            )
        cells[cell] = float(record[metric])
    lambdas, seeds = (sorted({cell[i] for cell in cells}) for i in (0, 1))
    missing = [(lam, seed) for lam in lambdas for seed in seeds if (lam, seed) not in cells]
    if missing:
        raise ValueError(f"seed {missing[0][1]} has no result at λ = {missing[0][0]:g}")
    values = np.array([[cells[lam, seed] for lam in lambdas] for seed in seeds]).reshape(
        len(seeds), len(lambdas)
    )
    return np.array(lambdas), seeds, values


def grid_onsets(
    lambdas: Float[np.ndarray, " L"], curves: Curves, threshold: float
) -> Float[np.ndarray, " R"]:
    """Per curve the largest λ of the grid with a value ≥ `threshold`; NaN where there is none."""
    reached = np.asarray(curves) >= threshold
    return np.where(reached.any(1), np.where(reached, lambdas, -np.inf).max(1), np.nan)


def crossings(
    lambdas: Float[np.ndarray, " L"], curves: Curves, levels: float | np.ndarray
) -> Float[np.ndarray, " R"]:
    """Per curve the largest λ at which it, drawn with straight lines, is ≥ its level; NaN where it never is.

    The last λ of the grid for a curve that still holds there: read it as "at least".
    """
    curves, levels = np.asarray(curves), np.broadcast_to(levels, len(curves))
    last = len(lambdas) - 1
    held = np.where(curves >= levels[:, None], np.arange(last + 1), -1).max(1)
    left, right = np.maximum(held, 0), np.minimum(np.maximum(held, 0) + 1, last)
    rows = np.arange(len(curves))
    above, below = curves[rows, left], curves[rows, right]
    # `where`: at the grid's end there is no next point, and above − below is 0.
    share = np.divide(above - levels, above - below, out=np.zeros(len(curves)), where=above > below)
    at = lambdas[left] + np.where(held < last, share, 0) * (lambdas[right] - lambdas[left])
    return np.where(held >= 0, at, np.nan)


def isotonic(curve: Float[np.ndarray, " L"]) -> Float[np.ndarray, " L"]:
    """The closest non-increasing curve in least squares (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []  # mean, length
    for value in np.asarray(curve, float):
        blocks.append((value, 1))
        # Where the curve rises, two blocks become one with their mean, which may exceed the block before.
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return np.concatenate([np.full(n, mean) for mean, n in blocks])


def half_drop_levels(curves: Curves) -> Float[np.ndarray, " R"]:
    """Per curve the value halfway between its peak and its lowest point from there on."""
    curves = np.asarray(curves)
    after_peak = np.arange(curves.shape[1]) >= curves.argmax(1)[:, None]
    return (curves.max(1) + np.where(after_peak, curves, np.inf).min(1)) / 2


def falling(curve: Float[np.ndarray, " L"]) -> Float[np.ndarray, " L"]:
    """The curve as it is up to its peak, its isotonic fit from there on: a cliff is what follows the peak."""
    peak = int(np.argmax(curve))
    return np.concatenate([curve[:peak], isotonic(curve[peak:])])


def t_half_width(values: Float[np.ndarray, " S"], confidence: float) -> float | None:
    """Half the width of Student's interval for the mean of independent values; None for fewer than two."""
    n = len(values)
    if n < 2 or np.isnan(values).any():
        return None
    return float(special.stdtrit(n - 1, (1 + confidence) / 2) * np.std(values, ddof=1) / math.sqrt(n))


def percentile_interval(
    onsets: Float[np.ndarray, " S"], confidence: float, resamples: int, seed: int
) -> list[float] | None:
    """EC's interval: percentiles of the mean of the defined onsets over resampled seeds; None for one seed.

    Over five seeds it covers less than it says (about 83 % for 95 %): here for comparison with EC only.
    """
    if len(onsets) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(0, len(onsets), (resamples, len(onsets)))
    means = _mean_of_defined(onsets[drawn])
    means, tail = means[~np.isnan(means)], 50 * (1 - confidence)
    return [float(x) for x in np.percentile(means, [tail, 100 - tail])] if len(means) else None


def reason_for_no_cliff(lambdas, parse, lowest: float, min_drop: float = MIN_DROP) -> str | None:
    """Why this grid has no cliff to locate, in one sentence; None if it has one."""
    mean = np.asarray(parse).mean(0)
    if len(lambdas) < 2:
        return f"the grid has {len(lambdas)} λ: a fall needs at least 2"
    peak = int(mean.argmax())
    if mean[peak] < lowest:
        return f"no headroom: mean parse peaks at {mean[peak]:.3f}, below {lowest:.2f}"
    drop = mean[peak] - mean[peak:].min()
    if drop < min_drop:
        return (
            f"no drop: parse falls by {drop:.3f} from the peak ({mean[peak]:.3f}, λ = {lambdas[peak]:g}) "
            f"to the grid's end (λ = {lambdas[-1]:g}); a cliff needs {min_drop:.2f}"
        )
    return None


def locate(
    lambdas,
    parse,
    *,
    thresholds: tuple[float, ...] = THRESHOLDS,
    of_peak: tuple[float, ...] = (0.9,),
    midpoint: float = MIDPOINT,
    min_drop: float = MIN_DROP,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 1,
) -> dict[str, Any]:
    """Onsets and midpoints of the cliff as JSON values; `lambdas` [L] ascending, `parse` [S, L] by seed.

    Keys: "peak"; "onset" (per threshold, and per share of the peak as "0.90 of peak"), "midpoint" (where
    parse passes `midpoint`) and "half_drop" (where it passes halfway between peak and floor). Each holds
    the readings "interpolated" and "isotonic", an onset also "grid", as {"at", "interval", "undefined",
    "at_edge"}: the last two are the shares of seeds whose own curve never reaches the level, and still holds
    it at the grid's end. Where `at_edge` is above 0 the place is a lower bound. "grid" has EC's
    "percentile_interval" too.

    `interval` is Student's t over the seeds' onsets for "grid"; for the readings of the mean curve the standard
    error is the jackknife's, leaving out one seed at a time. None for one seed, or where a mean curve that
    leaves one seed out does not reach the level.

    Raises NoCliff with the reason, ValueError for a broken table. EC's fine grid gives its printed
    percentile intervals; its ≥ .85 lower end, 1.196, is a tie that the bootstrap's own seed decides (all
    3125 resamples give 1.192).
    """
    lambdas, parse = _checked(lambdas, parse)
    reason = reason_for_no_cliff(lambdas, parse, min(thresholds, default=midpoint), min_drop)
    if reason:
        raise NoCliff(reason)
    seeds = _Seeds(lambdas, parse, confidence)
    onsets = {
        level_name(t): {"grid": seeds.grid(t, resamples, seed)} | seeds.lines(lambda _, t=t: t)
        for t in thresholds
    }
    onsets |= {
        f"{level_name(x)} of peak": seeds.lines(lambda curves, x=x: x * curves.max(1)) for x in of_peak
    }
    mean = parse.mean(0)
    return {
        "peak": {"lambda": float(lambdas[mean.argmax()]), "parse": float(mean.max())},
        "onset": onsets,
        "midpoint": {"level": midpoint} | seeds.lines(lambda _: midpoint),
        "half_drop": seeds.lines(half_drop_levels),
        "seeds": len(parse),
    }


def level_name(level: float) -> str:
    """A level as the key of its onset: "0.80", with more digits where needed, "0.801"."""
    return max(f"{level:.2f}", str(float(level)), key=len)


class _Seeds:
    """The curves that every rule reads: `means` [1 + S, L] of all seeds, then of all but one, and the seeds' own."""

    def __init__(self, lambdas: np.ndarray, parse: np.ndarray, confidence: float):
        self.lambdas, self.parse, self.confidence = lambdas, parse, confidence
        others = [np.delete(parse, i, 0).mean(0) for i in range(len(parse)) if len(parse) > 1]
        means = np.stack([parse.mean(0), *others])
        self.curves = {"interpolated": (means, parse)}
        self.curves["isotonic"] = tuple(np.apply_along_axis(falling, 1, x) for x in (means, parse))

    def grid(self, threshold: float, resamples: int, seed: int) -> dict[str, Any]:
        """EC's rule."""
        onsets = grid_onsets(self.lambdas, self.parse, threshold)
        defined = onsets[~np.isnan(onsets)]
        reading = self.reading(float(_mean_of_defined(onsets[None])[0]), defined, onsets)
        ec = percentile_interval(onsets, self.confidence, resamples, seed)
        return reading | {"percentile_interval": ec}

    def lines(self, level: Callable[[Curves], ArrayLike]) -> dict[str, Any]:
        """Where the mean curves, raw and isotonic, pass the level that `level` gives them."""
        found = {}
        for name, (means, own) in self.curves.items():
            at = crossings(self.lambdas, means, level(means))
            pseudo = len(own) * at[0] - (len(own) - 1) * at[1:]  # the jackknife's, one for each seed
            found[name] = self.reading(float(at[0]), pseudo, crossings(self.lambdas, own, level(own)))
        return found

    def reading(
        self, at: float, values: Float[np.ndarray, " N"], onsets: Float[np.ndarray, " S"]
    ) -> dict[str, Any]:
        """One rule's estimate `at`, the interval from values whose mean estimates it, and how many seeds have none."""
        half = None if math.isnan(at) else t_half_width(values, self.confidence)
        return {
            "at": None if math.isnan(at) else at,
            "interval": None if half is None else [at - half, at + half],
            "undefined": float(np.isnan(onsets).mean()),
            "at_edge": float((onsets >= self.lambdas[-1]).mean()),
        }


def _checked(lambdas, parse) -> tuple[np.ndarray, np.ndarray]:
    lambdas, parse = np.asarray(lambdas, float), np.atleast_2d(np.asarray(parse, float))
    if parse.shape[1:] != lambdas.shape or not parse.size:
        raise ValueError(
            f"parse has shape {parse.shape}: needs a row per seed, a column per λ ({lambdas.size})"
        )
    if np.any(np.diff(lambdas) <= 0):
        raise ValueError("λ must ascend, each once")
    if not np.all((parse >= 0) & (parse <= 1)):
        raise ValueError("parse must lie in [0, 1]")
    return lambdas, parse


def _mean_of_defined(values: Float[np.ndarray, "R S"]) -> Float[np.ndarray, " R"]:
    """Mean over the seeds that have an onset, NaN where none has."""
    defined = ~np.isnan(values)
    count = defined.sum(1)
    return np.divide(
        np.where(defined, values, 0).sum(1), count, out=np.full(len(values), np.nan), where=count > 0
    )
