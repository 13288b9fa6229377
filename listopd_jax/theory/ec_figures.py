"""Parse rates that EC prints for its 1.7B student and 4B teacher: facts, with source arXiv:2605.08737 (its result
tables). Nothing here is measured by us.
"""

from typing import NamedTuple

CLIP_SWEEP = {1.5: 0.948, 2.0: 0.557, 5.0: 0.859, float("inf"): 0.849}  # parse by c at λ = 1.15, 42 steps


class Row(NamedTuple):
    """Parse against λ at one budget and one clip."""

    steps: int
    clip: float
    seeds: int  # behind each value; a single seed is 42
    lambdas: tuple[float, ...]
    parse: tuple[float, ...]


ROWS = {
    "sweep": Row(
        steps=42,
        clip=5,
        seeds=1,
        lambdas=(0.50, 1.00, 1.05, 1.10, 1.15, 1.20, 1.25, 1.40, 1.50),
        parse=(0.816, 0.887, 0.939, 0.943, 0.948, 0.868, 0.651, 0.160, 0.085),
    ),
    "five_seeds": Row(42, 5, 5, (1.18, 1.20, 1.22, 1.24), (0.898, 0.810, 0.789, 0.658)),
    "long": Row(196, 5, 1, (1.00, 1.05, 1.10), (0.934, 0.703, 0.500)),
    "long_three_seeds": Row(196, 5, 3, (1.05,), (0.742,)),
    "small_clip": Row(
        steps=196,
        clip=1.5,
        seeds=1,
        lambdas=(0.95, 1.00, 1.05, 1.075, 1.10, 1.15, 1.20),
        parse=(0.943, 0.892, 0.939, 0.632, 0.670, 0.297, 0.255),
    ),
}
