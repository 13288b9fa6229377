"""From where the estimator ends to what finite runs parse: the curve of trained students from a few anchor runs (ours).

`C(λ)` is the parse of greedy answers from the target, or from the limit of the estimator in use (ops/limit.py), read
without training. A run of N steps has not reached either. Where its lists break it is between base and target, as
the target of another λ does, so its parse is read as that of an *effective* λ:

    parse(λ) = E C(a + s·(λ − 1) + σ z),   z ~ N(0, 1)

The *reach* (a, s) is the effective λ of N steps at λ = 1, and its slope in λ; σ is the spread of seeds. All three come
from anchor runs, at few λ and of seeds that the sweep does not use: each lies where C has the run's parse. A run whose
parse is nearly 1 or nearly 0 says almost nothing of its place, so anchors outside of INFORMATIVE are left out. Of
several curves C, the one from which the anchors stray least in λ is used.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import interpolate, stats

from listopd_jax.theory.cliff import falling

INFORMATIVE = (0.03, 0.97)  # parse of an anchor that has a place on the curve
LEAST_SPREAD = 0.005  # σ in λ that is assumed at least: two seeds may agree by chance
_NODES, _NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(21)
_WEIGHTS = _NODE_WEIGHTS / _NODE_WEIGHTS.sum()


class Undetermined(ValueError):
    """The anchors do not show how far runs get."""


class Shape(NamedTuple):
    """The parse of greedy answers without training, C, on a grid of λ, ascending."""

    lambdas: Float[np.ndarray, " L"]
    parse: Float[np.ndarray, " L"]

    def at(self, lam: Float[np.ndarray, "*s"]) -> Float[np.ndarray, "*s"]:
        """C(λ), between the grid's points by a cubic that does not overshoot; constant beyond its ends."""
        inside = np.clip(lam, self.lambdas[0], self.lambdas[-1])
        return np.clip(interpolate.PchipInterpolator(*self)(inside), 0.0, 1.0)

    def where(self, parse: Float[np.ndarray, " A"]) -> Float[np.ndarray, " A"]:
        """The λ at which the falling part of C has this parse."""
        fine = np.linspace(self.lambdas[0], self.lambdas[-1], 2001)
        curve = self.at(fine)
        peak = int(curve.argmax())
        # Reversed, because np.interp wants its x ascending.
        return np.interp(parse, falling(curve)[peak:][::-1], fine[peak:][::-1])


class Reach(NamedTuple):
    """The fit to anchor runs: (a, s), their covariance with `freedom` degrees of freedom, and σ."""

    line: Float[np.ndarray, " 2"]
    covariance: Float[np.ndarray, "2 2"]
    spread: float
    freedom: int


class Predicted(NamedTuple):
    """A curve over λ with a band that the mean of n seeds should lie in."""

    parse: Float[np.ndarray, " L"]
    low: Float[np.ndarray, " L"]
    high: Float[np.ndarray, " L"]


def gaps(shape: Shape, largest: float) -> Float[np.ndarray, " G"]:
    """The middles of the grid's cells in which C changes by more than `largest`: where to look next."""
    changes = np.abs(np.diff(shape.parse)) > largest
    return ((shape.lambdas[1:] + shape.lambdas[:-1]) / 2)[changes]


def reach(shape: Shape, lambdas: Float[np.ndarray, " A"], parse: Float[np.ndarray, " A"]) -> Reach:
    """a, s and σ from anchors at `lambdas` that had `parse`, by least squares in the effective λ.

    Undetermined if fewer than three anchors are informative, or all of these have one λ, or one of them has a parse
    that the curve does not reach: it would lie at the curve's end, wherever that is.
    """
    low, high = INFORMATIVE
    told = (parse >= low) & (parse <= high)
    if told.sum() < 3 or len(np.unique(lambdas[told])) < 2:
        raise Undetermined(
            f"{told.sum()} of {len(parse)} anchor runs have a parse between {low:g} and {high:g}; three are needed, of "
            "two λ: move the anchors to where the curve falls"
        )
    if parse[told].min() < shape.parse[-1] or parse[told].max() > shape.parse.max():
        raise Undetermined("the curve does not come to the parse of every anchor run")
    design = _design(lambdas[told])
    place = shape.where(parse[told])
    line, *_ = np.linalg.lstsq(design, place)
    freedom = int(told.sum()) - 2
    spread = max(float(np.sqrt(((place - design @ line) ** 2).sum() / freedom)), LEAST_SPREAD)
    return Reach(line, spread**2 * np.linalg.inv(design.T @ design), spread, freedom)


def closest(
    shapes: Mapping[str, Shape], lambdas: Float[np.ndarray, " A"], parse: Float[np.ndarray, " A"]
) -> tuple[str, Reach]:
    """The curve from which the anchors stray least, and their `reach` on it; Undetermined if there is none."""
    found, why = {}, ""
    for name, shape in shapes.items():
        try:
            found[name] = reach(shape, lambdas, parse)
        except Undetermined as e:
            why = str(e)
    if not found:
        raise Undetermined(why)
    name = min(found, key=lambda name: found[name].spread)
    return name, found[name]


def predicted(
    shape: Shape,
    found: Reach,
    lambdas: Float[np.ndarray, " L"],
    *,
    seeds: int,
    lists: int,
    level: float = 0.9,
    draws: int = 2000,
) -> Predicted:
    """The mean parse of `seeds` runs at each λ, `lists` judged lists each, with a band of `level` by simulation.

    The band covers the uncertainty of a and s (Student's t), the seeds' spread and the lists' own noise.
    """
    design, rng = _design(lambdas), np.random.default_rng(0)
    # Gauss-Hermite quadrature of the mean over z ~ N(0, 1).
    mean = (shape.at((design @ found.line)[:, None] + found.spread * _NODES) * _WEIGHTS).sum(-1)
    lines = stats.multivariate_t.rvs(found.line, found.covariance, found.freedom, draws, random_state=rng)
    noise = found.spread * rng.standard_normal((draws, len(lambdas), seeds))
    curves = rng.binomial(lists, shape.at((lines @ design.T)[..., None] + noise)) / lists
    low, high = np.quantile(curves.mean(-1), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Predicted(mean, low, high)


def _design(lambdas: Float[np.ndarray, " L"]) -> Float[np.ndarray, "L 2"]:
    return np.stack([np.ones_like(lambdas), lambdas - 1], -1)
