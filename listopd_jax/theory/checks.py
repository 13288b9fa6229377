"""Checks of the theory's inputs: which values are allowed, and for which of them a quantity exists."""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray | float
OnUndefined = Literal["raise", "nan"]


class Undefined(ValueError):
    """The values are valid, but the quantity does not exist for them; the message names the violated condition."""


def scalar(x: ArrayLike) -> Array:
    x = np.asarray(x, float)
    return x if x.ndim else float(x)


def check_values(name: str, x: ArrayLike, rule: str, valid) -> np.ndarray:
    """x as float64; ValueError naming the first entry that breaks `rule`."""
    x = np.asarray(x, float)
    broken = ~np.atleast_1d(valid(x))
    if broken.any():
        raise ValueError(f"{name} = {np.atleast_1d(x)[broken][0]:g}: must {rule}")
    return x


def as_probability(name: str, x: ArrayLike) -> np.ndarray:
    return check_values(name, x, "lie strictly between 0 and 1", lambda x: (x > 0) & (x < 1))


def as_finite(name: str, x: ArrayLike) -> np.ndarray:
    return check_values(name, x, "be a finite number", np.isfinite)


def at_least(name: str, x: ArrayLike, low: float) -> np.ndarray:
    return check_values(name, x, f"be at least {low:g}", lambda x: x >= low)


def as_clip(c: ArrayLike) -> np.ndarray:
    return check_values("c", c, "be positive (inf for no clip)", lambda c: c > 0)


def as_clip_at_least_1(c: ArrayLike) -> np.ndarray:
    c = as_clip(c)
    check_defined("q_c", {"c ≥ 1 (otherwise it leaves (0, 1))": c >= 1})
    return c


def check_defined(
    what: str, conditions: dict[str, ArrayLike], undefined: OnUndefined = "raise"
) -> np.ndarray:
    """Where all conditions hold; raises Undefined, naming those that do not, unless `undefined` is "nan"."""
    violated = [name for name, holds in conditions.items() if not np.all(holds)]
    if violated and undefined == "raise":
        raise Undefined(f"{what} is undefined: needs {' and '.join(violated)}")
    return np.logical_and.reduce(np.broadcast_arrays(*conditions.values()))
