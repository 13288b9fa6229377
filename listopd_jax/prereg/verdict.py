"""The verdict on a locked prediction, from the lock and results.json alone. A pass rule is data, never code.

A rule is a list of checks, all of which must pass:

    {"quantity": "onset", "threshold": 0.8, "reading": "grid", "within": "window"}
    {"quantity": "midpoint", "reading": "interpolated", "within": "window"}
    {"quantity": "parse", "at": "first" | "last" | "all", "at_least" | "at_most": 0.85}

Readings and levels are those of `theory.cliff`. An onset or midpoint is censored where a seed (for the readings of the
mean curve: that curve) still holds at the grid's last λ, or is below the level at the first already: the grid then
bounds the place and does not give it. A censored place never passes. It is refuted if it lies outside the window
whatever the truth, and inconclusive otherwise.
"""

import math
from typing import Any

import numpy as np

from listopd_jax.errors import UserError
from listopd_jax.records import RESULTS, Result, results
from listopd_jax.theory import cliff

Json = dict[str, Any]

_RATE = (int, float)


def check_rule(check: Any, where: Any) -> None:
    """UserError unless `check` is one of the forms above."""
    quantity = check.get("quantity") if isinstance(check, dict) else None
    if quantity == "parse":
        bounds = [check[name] for name in ("at_least", "at_most") if name in check]
        known = (
            check.get("at") in ("first", "last", "all") and len(bounds) == 1 and isinstance(bounds[0], _RATE)
        )
    else:
        readings = {"onset": ("grid", "interpolated", "isotonic"), "midpoint": ("interpolated", "isotonic")}
        known = check.get("reading") in readings.get(quantity, ()) if isinstance(check, dict) else False
        known = known and check.get("within") == "window"
        known = known and isinstance(check.get("threshold"), _RATE) == (quantity == "onset")
    if not known:
        raise UserError(f"{where}: the rule {check} cannot be read by a verdict")


def can_fail(lock: Json) -> bool:
    """Whether some result on the lock's grid contradicts it: a place that the grid gives, outside the window."""
    (low, high), grid = lock["window"], lock["grid"]
    on_grid = any(not low <= x <= high for x in grid[:-1])  # at the last λ an onset is censored
    between = grid[0] < low or grid[-1] > high
    return any(
        check["quantity"] == "parse" or (on_grid if check["reading"] == "grid" else between)
        for check in lock["rule"]
    )


def select(lock: Json, records: Any) -> list[Json]:
    """The records of results.json that the lock is about. UserError if one is missing, doubled or broken."""
    records, chosen = results(records, RESULTS), []
    for lam in lock["grid"]:
        for seed in lock["seeds"]:
            found = [r for r in records if _answers(r, lam, seed, lock["steps"])]
            name = f"λ = {lam:g}, seed {seed}, {lock['steps']} steps"
            if len(found) != 1:
                raise UserError(
                    f"results.json: {len(found)} records of {name}, one is needed; no verdict yet"
                )
            parse = found[0].parse
            if parse is None or not 0 <= parse <= 1:
                raise UserError(f"results.json: parse of {name} is {parse!r}, not a rate")
            chosen.append({"stage": "opd", "lambda": lam, "seed": seed, "parse": parse})
    return chosen


def _answers(record: Result, lam: float, seed: int, steps: int) -> bool:
    if record.stage != "opd" or record.lam is None:
        return False
    return math.isclose(record.lam, lam) and (record.seed, record.steps) == (seed, steps)


def judge(lock: Json, records: Any) -> Json:
    """The verdict as JSON values, from the lock and the records alone.

    "pass" if every check passes, "fail" if one is refuted, "inconclusive" if the grid leaves one open and none fails.
    """
    lambdas, _, parse = cliff.table(select(lock, records))
    thresholds = tuple(sorted({check["threshold"] for check in lock["rule"] if "threshold" in check}))
    located, reason = None, None
    try:
        located = cliff.locate(lambdas, parse, thresholds=thresholds, midpoint=lock["midpoint"])
    except cliff.NoCliff as e:
        reason = str(e)
    mean, checks = parse.mean(0), []
    for check in lock["rule"]:
        if check["quantity"] == "parse":
            checks += _parse_checks(check, lambdas, mean)
        else:
            checks.append(_place_check(check, lock, lambdas, parse, located, reason))
    return {
        "verdict": _verdict(checks),
        "checks": checks,
        "mean_parse": {f"{lam:g}": float(y) for lam, y in zip(lambdas, mean, strict=True)},
        "located": located,
        "no_cliff": reason,
        "lock_sha256": lock.get("sha256"),
    }


def _verdict(checks: list[Json]) -> str:
    if any(not check["pass"] and not check.get("inconclusive") for check in checks):
        return "fail"
    return "pass" if all(check["pass"] for check in checks) else "inconclusive"


def _parse_checks(check: Json, lambdas: np.ndarray, mean: np.ndarray) -> list[Json]:
    """Mean parse at one end of the grid, or at every λ, against a bound."""
    chosen = {"first": slice(0, 1), "last": slice(-1, None), "all": slice(None)}[check["at"]]
    low, high = check.get("at_least", 0.0), check.get("at_most", 1.0)
    bound = f"≥ {low:g}" if "at_least" in check else f"≤ {high:g}"
    return [
        {"check": f"parse at λ = {lam:g} {bound}", "value": float(y), "pass": bool(low <= y <= high)}
        for lam, y in zip(lambdas[chosen], mean[chosen], strict=True)
    ]


def _place_check(
    check: Json, lock: Json, lambdas: np.ndarray, parse: np.ndarray, located: Json | None, reason: str | None
) -> Json:
    """Onset or midpoint within the window; a cliff that is not there is a miss."""
    low, high = lock["window"]
    level = check.get("threshold", lock["midpoint"])
    name = f"{check['quantity']} (parse {cliff.level_name(level)}, {check['reading']}) in [{low:g}, {high:g}]"
    result = {"check": name, "value": None, "pass": False}
    if located is not None:
        place = located["onset"][cliff.level_name(level)] if "threshold" in check else located["midpoint"]
        reading = place[check["reading"]]
        result |= {"value": reading["at"], "interval": reading["interval"]}
    onsets = _onsets(check["reading"], lambdas, parse, level)
    censored = _censored(onsets, lambdas)
    if censored:
        least, most = _bounds(onsets, lambdas)
        return result | {"reason": censored, "inconclusive": least <= high and most > low}
    if located is None:
        return result | {"reason": reason}
    return result | {"pass": bool(low <= result["value"] <= high)}


def _onsets(reading: str, lambdas: np.ndarray, parse: np.ndarray, level: float) -> np.ndarray:
    """The onsets behind a reading: that of each seed, or the one of the mean curve."""
    if reading == "grid":
        return cliff.grid_onsets(lambdas, parse, level)
    mean = parse.mean(0)
    return cliff.crossings(lambdas, (cliff.falling(mean) if reading == "isotonic" else mean)[None], level)


def _censored(onsets: np.ndarray, lambdas: np.ndarray) -> str:
    """How many onsets the grid only bounds, in words; empty if it gives them all."""
    below, above = int(np.isnan(onsets).sum()), int((onsets >= lambdas[-1]).sum())
    words = (
        [f"{above} of {len(onsets)} onsets at or beyond the grid's end, λ = {lambdas[-1]:g}"] if above else []
    )
    words += [f"{below} of {len(onsets)} before its start, λ = {lambdas[0]:g}"] if below else []
    return "; ".join(words) + (": only a bound" if words else "")


def _bounds(onsets: np.ndarray, lambdas: np.ndarray) -> tuple[float, float]:
    """The least mean of the true onsets, and one that they stay below; λ is never negative."""
    below, above = np.isnan(onsets), onsets >= lambdas[-1]
    # Below the level at the grid's first λ: the onset is anywhere from 0 to there.
    least, most = np.where(below, 0.0, onsets), np.where(below, lambdas[0], onsets)
    return float(least.mean()), math.inf if above.any() else float(most.mean())
