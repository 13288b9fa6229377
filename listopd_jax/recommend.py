"""Which λ to use: one rule, for forecasts before training and for trained policies after it (docs/forecast.md).

The contract comes first, then usefulness, and a larger λ has to earn its risk: of the λ that hold the contract, the
smallest that is about as useful as the most useful one. Before training, λ = 1 is always allowed: plain distillation.
A larger λ holds if it and all below it are forecast to parse nearly as often and few answers flip a structural
token below it, neither along the teacher's answers nor along the forecast's own.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from listopd_jax.records import Calibration, Recommendation, Result

CONTRACT_HOLDS = (
    0.8  # parse rate from which the contract counts as kept: EC's onset is the largest λ with parse ≥ .80
)
PARSE_LOST = 0.02  # how much less than at λ = 1 a forecast may parse and still hold
FLIPPED = 0.05  # share of answers with a structural flip that still holds
GAIN = 0.02  # share of the expected MAE by which a λ past the cliff must be better for a guard to pay
GUARD = "--config.opd.guard.margin=1.25 --config.opd.guard.fallback=base"  # what held in docs/results.md
MASK = (
    "--config.opd.guard.mask=True"  # what held and gained most there, with a teacher that breaks lists, too
)


class Option(NamedTuple):
    """A λ that holds the contract, how useful it is, and where the 95 % interval of that begins (None: unknown)."""

    lam: float
    useful: float | None
    low: float | None = None


class Setting(NamedTuple):
    """The setting of the forecasts: whether under a guard, and whether the task is lists of reviews."""

    guarded: bool = False
    reviews: bool = False


def choose(options: Sequence[Option]) -> Option | None:
    """The one of smallest λ about as useful as the most useful one; None where no useful is known.

    About: its useful lies within the other's 95 % interval.
    """
    known = sorted((option for option in options if option.useful is not None), key=lambda option: option.lam)
    best = max(known, key=lambda option: option.useful, default=None)
    if best is None:
        return None
    least = best.useful if best.low is None else best.low
    return next(option for option in known if option.useful >= least)


def guard_flags(reviews: bool) -> str:
    """The guard to go past a cliff with; a mask needs the grammar of reviews."""
    return MASK if reviews else GUARD


def recommend(
    forecasts: Sequence[Result], calibration: Calibration | None, setting: Setting
) -> Recommendation | None:
    """The λ to train at, the largest that holds, and why in three lines; None without a forecast at λ = 1.

    Where no record has a right answer, nothing is known about usefulness, and it is the largest λ that holds.
    """
    grid = sorted((r for r in forecasts if r.lam is not None and r.lam >= 1), key=lambda r: r.lam)
    if not grid or grid[0].lam != 1 or grid[0].parse is None:
        return None
    limit = math.inf if setting.guarded else flip_limit(calibration)
    rows = () if setting.guarded or calibration is None else calibration.forecasts
    flipped = {row.lam: row.flipped for row in rows if not row.guard}
    held = _held(grid, limit, flipped)
    options = [_option(record) for record in held]
    best = choose(options)
    chosen = held[-1] if best is None else held[options.index(best)]
    broken = grid[len(held)] if len(held) < len(grid) else None
    why = _why(chosen, held, "" if broken is None else _break(broken, held[0], limit))
    lines = [_use(chosen, grid[0]), why, _next(chosen, held, grid, setting)]
    return Recommendation(
        lam=chosen.lam, parse=chosen.parse, useful=chosen.useful, holds_to=held[-1].lam, lines=lines
    )


def flip_limit(calibration: Calibration | None) -> float:
    """The λ below which 5 % of the teacher's answers flip a structural token; ∞ where there is none."""
    rows = [] if calibration is None else [row for row in calibration.flips if row.positions == "structural"]
    found = rows[0].percentile_5 if rows else None
    return math.inf if found is None else found


def _held(grid: Sequence[Result], limit: float, flipped: Mapping[float, float]) -> list[Result]:
    """λ = 1, and what follows it up to the first that breaks the contract; λ = 1 alone if the teacher breaks it.

    `flipped`: of each λ the share of lists with a structural flip below it along the forecast's own answers.
    """
    first, *larger = grid
    if first.parse < CONTRACT_HOLDS:
        return [first]
    return [
        first,
        *itertools.takewhile(
            lambda r: _parses(r, first) and r.lam < limit and flipped.get(r.lam, 0.0) <= FLIPPED, larger
        ),
    ]


def _parses(record: Result, first: Result) -> bool:
    """Whether a forecast parses nearly as often as that at λ = 1; .98 − .02 is above .96 in floating point."""
    return record.parse >= first.parse - PARSE_LOST - 1e-9


def _option(record: Result) -> Option:
    low, _ = record.intervals.get("useful") or (None, None)
    return Option(record.lam, record.useful, low)


def _use(chosen: Result, first: Result) -> str:
    here, there = (
        f"parses {r.parse:.3f}" + ("" if r.useful is None else f", useful {r.useful:.3f}")
        for r in (chosen, first)
    )
    at_one = f" (at λ = 1 {there})" if chosen.lam != 1 else ""
    return f"recommended: λ = {chosen.lam:g}, where the forecast {here}{at_one}"


def _why(chosen: Result, held: Sequence[Result], broken: str) -> str:
    if held[0].parse < CONTRACT_HOLDS:
        return (
            f"why: the teacher's own answers parse below {CONTRACT_HOLDS:g}, so nothing speaks for a larger λ"
        )
    edge = f"the forecast holds the contract up to λ = {held[-1].lam:g}{broken or ', the largest'}"
    if all(record.useful is None for record in held):
        return f"why: {edge}; without right answers nothing is known about usefulness"
    if chosen.lam == held[-1].lam == 1:
        return f"why: {edge}"
    return f"why: {edge}; of these λ it is the smallest about as useful as the most useful"


def _break(broken: Result, first: Result, limit: float) -> str:
    """Why the stretch of λ that hold ends at `broken`."""
    if not _parses(broken, first):
        return f"; at {broken.lam:g} it parses {broken.parse:.3f}"
    if broken.lam >= limit:
        return f"; 5 % of the teacher's answers flip a structural token below {limit:.3g}"
    return f"; at {broken.lam:g} more than 5 % of its own answers flip a structural token"


def _next(chosen: Result, held: Sequence[Result], grid: Sequence[Result], setting: Setting) -> str:
    """What to do beyond the λ that hold."""
    past = grid[len(held) :]
    if held[0].parse < CONTRACT_HOLDS:
        repair = f"repair its lists by a mask: {MASK}; or " if setting.reviews and not setting.guarded else ""
        return f"next: {repair}train the teacher until its own answers hold the contract, then forecast again"
    if not past:
        return "next: forecast larger λ to see where the contract breaks"
    if setting.guarded:
        return "next: this guard holds no further; choose a larger margin, or fallback base"
    flags = guard_flags(setting.reviews)
    best = min((r for r in past if r.expected_mae is not None), key=lambda r: r.expected_mae, default=None)
    if best is None or chosen.expected_mae is None:
        return f"next: to go further, keep the contract by a guard: {flags}"
    maes = f"expected MAE {best.expected_mae:.3f} at λ = {best.lam:g}, {chosen.expected_mae:.3f} here"
    if best.expected_mae > (1 - GAIN) * chosen.expected_mae:
        return f"next: stay here; past the cliff scores gain little ({maes})"
    return f"next: past the cliff scores gain ({maes}); keep the contract there by a guard: {flags}"
