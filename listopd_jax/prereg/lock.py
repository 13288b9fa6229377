"""The lock of a pre-registration: one JSON file that holds a prediction and shows every later change of it.

Canonical JSON has one form only, so that a hash over it survives reformatting and nothing else.
"""

import datetime
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from listopd_jax import config as config_module
from listopd_jax import files, theory
from listopd_jax.errors import UserError
from listopd_jax.prereg.verdict import can_fail, check_rule
from listopd_jax.theory import cliff

Json = dict[str, Any]

# grid and window in units of λ* − 1 from λ = 1; in a rule "first" and "last" are the ends of the grid
TEMPLATES: dict[str, Json] = {
    "fine_grid": {  # EC: grid 1.18 … 1.24 for λ* = 1.22, onset at parse ≥ .80
        "grid": [0.8, 0.9, 1.0, 1.1, 1.2],
        "window": [0.85, 1.15],
        "rule": [{"quantity": "onset", "threshold": 0.8, "reading": "grid", "within": "window"}],
    },
    "budget": {  # EC: window 1.00 … 1.10 at 196 steps, for the 42-step λ* = 1.22
        "grid": [0.0, 0.225, 0.45, 0.7, 1.0],
        "window": [0.0, 0.45],
        "rule": [{"quantity": "midpoint", "reading": "interpolated", "within": "window"}],
    },
    "small_clip": {  # EC: grid .95 … 1.20 and window 1.00 … 1.12 for λ*(c = 1.5) = 1.07
        "grid": [-0.71, 0.0, 0.71, 1.07, 1.43, 2.14, 2.86],
        "window": [0.0, 1.71],
        "rule": [
            {"quantity": "midpoint", "reading": "interpolated", "within": "window"},
            {"quantity": "parse", "at": "first", "at_least": 0.85},
            {"quantity": "parse", "at": "last", "at_most": 0.5},
        ],
    },
    "no_cliff": {  # ours: the rival of a prediction that there is a cliff
        "grid": [0.0, 1.0, 2.0, 3.0],
        "window": [0.0, 3.0],
        "rule": [{"quantity": "parse", "at": "all", "at_least": 0.8}],
    },
}


CURVE = "curve"
"""The kind of a lock that holds predictions.json (listopd_jax.prereg.curve)."""


def sha256(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`: sorted keys, no spaces, no NaN."""
    return files.json_sha256(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def config_sha256(config: Json, kind: str | None = None) -> str:
    """SHA-256 of the config that a lock of `kind` is of.

    A curve is locked where `predict.only` stopped the run, which resumes without it: both are one config to it.
    """
    if kind == CURVE and isinstance(config.get("predict"), dict):
        config = config | {"predict": config["predict"] | {"only": True}}
    return sha256(config)


def predicted_lambda(threshold: str, p: float, b: float, c: float) -> float:
    """λ* by the closed form named `threshold`: "clip", "clip_base_neutral" or "flip". UserError if
    undefined.
    """
    forms: dict[str, Callable[[], float]] = {
        "clip": lambda: theory.clip_safe_lambda(p, b, c),
        "clip_base_neutral": lambda: theory.clip_safe_lambda_base_neutral(p, c),
        "flip": lambda: theory.flip_lambda(p, b),
    }
    try:
        lam = forms[threshold]()
    except ValueError as e:
        raise UserError(f"--predict={threshold}: {e}") from e
    if math.isinf(lam):
        raise UserError(f"--predict={threshold}: there is no such threshold for p={p:g}, b={b:g}, c={c:g}")
    return lam


def make_lock(
    template: str,
    lam_star: float,
    seeds: Sequence[int],
    steps: int,
    config: Json,
    *,
    grid: Sequence[float] | None = None,
    window: Sequence[float] | None = None,
    prediction: Json | None = None,
    midpoint: float = cliff.MIDPOINT,
) -> Json:
    """The lock of a template for a predicted threshold `lam_star` > 1; `prediction` says where that comes from.

    UserError if the config would not run the locked grid, seeds and budget, or if no result could fail the lock.
    """
    plan = TEMPLATES[template]
    if not lam_star > 1:
        raise UserError(f"the predicted threshold is {lam_star:g}: a cliff beyond λ = 1 is needed")
    places = {name: [round(1 + u * (lam_star - 1), 4) for u in plan[name]] for name in ("grid", "window")}
    lock = {
        "format": 1,
        "template": template,
        "prediction": (prediction or {}) | {"lambda": lam_star},
        "grid": sorted(grid or places["grid"]),
        "window": list(window or places["window"]),
        "seeds": sorted(seeds),
        "steps": steps,
        "midpoint": midpoint,
        "rule": plan["rule"],
        "config_sha256": config_sha256(config),
        "code_revision": config_module.code_revision(),
        "locked_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    check_lock(lock, "the lock")
    _check_plan(lock, config)
    if not can_fail(lock):
        raise UserError(
            f"grid={lock['grid']} cannot fail the window {lock['window']}: give it a λ outside, and one beyond that"
        )
    return lock | {"sha256": sha256(lock)}


def write_lock(path: str | os.PathLike, lock: Json) -> None:
    """Write a new file; UserError if one is there already: a lock is written once."""
    try:
        # "x" and not a look beforehand: of two processes only one can create the file.
        with open(path, "x", encoding="utf-8") as f:
            f.write(json.dumps(lock, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
            f.flush()
            os.fsync(f.fileno())
    except FileExistsError as e:
        raise UserError(
            f"{path}: a lock already exists here and is never overwritten; choose another --out"
        ) from e
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror or e})") from e


def read_lock(path: str | os.PathLike) -> Json:
    """The lock, unchanged since it was written; UserError otherwise."""
    lock = files.read_json(path)
    if not isinstance(lock, dict) or "sha256" not in lock:
        raise UserError(f"{path}: no lock; make one with `python -m listopd_jax.prereg lock`")
    content = {name: value for name, value in lock.items() if name != "sha256"}
    if sha256(content) != lock["sha256"]:
        raise UserError(
            f"{path}: changed since it was locked (its SHA-256 does not match); no verdict from it"
        )
    check_lock(content, path)
    return lock


def check_config(lock: Json, config: Json, where: str) -> None:
    """UserError unless `config` is the one that was locked."""
    if config_sha256(config, lock.get("kind")) != lock["config_sha256"]:
        raise UserError(
            f"{where}: the config is not the one that was locked (its SHA-256 differs); no verdict"
        )


def check_lock(lock: Json, where: Any) -> None:
    """UserError unless the lock has every field, of its type, and a rule that the verdict can read."""
    kinds = {"grid": list, "seeds": list, "steps": int, "config_sha256": str, "code_revision": str}
    if lock.get("kind") == CURVE:
        kinds |= {"predictions": list}
    else:
        kinds |= {"window": list, "rule": list, "midpoint": float}
    for name, kind in kinds.items():
        if not isinstance(lock.get(name), kind):
            raise UserError(f"{where}: field {name} is missing or not a {kind.__name__}")
    window = lock.get("window", [0, 0])
    numbers = [*lock["grid"], *window, *lock["seeds"]]
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers) or not lock["seeds"]:
        raise UserError(f"{where}: grid, window and seeds must be finite numbers, and there must be a seed")
    if lock.get("kind") == CURVE and len(lock["seeds"]) < 2:
        raise UserError(
            f"{where}: seeds={lock['seeds']}: at least two are needed to tell how much seeds differ; set opd.seeds"
        )
    if len(window) != 2 or window[0] > window[1]:
        raise UserError(f"{where}: window={window}: give two numbers, LOW,HIGH")
    if len(set(lock["grid"])) != len(lock["grid"]) or len(lock["grid"]) < 2:
        raise UserError(f"{where}: grid={lock['grid']}: give at least two different λ")
    if lock["grid"][0] < 0:
        raise UserError(
            f"{where}: grid={lock['grid']}: λ must be ≥ 0; give --grid for a threshold this large"
        )
    for check in lock.get("rule", []):
        check_rule(check, where)


def _check_plan(lock: Json, config: Json) -> None:
    """UserError unless a run of `config` gives what the verdict will need."""
    opd = config.get("opd", {})
    for name, wanted in (("lambdas", lock["grid"]), ("seeds", lock["seeds"])):
        planned = opd.get(name, [])
        if not all(any(math.isclose(x, y) for y in planned) for x in wanted):
            values = ",".join(f"{x:g}" for x in wanted)
            raise UserError(
                f"opd.{name}={planned} would not run the locked {values}: set --config.opd.{name}=({values},)"
            )
    if not opd.get("steps"):
        return
    every = opd.get("eval_every", 0)
    multiples = range(every, opd["steps"], every) if every else ()
    budgets = sorted({*opd.get("eval_steps", ()), *multiples, opd["steps"]})
    if lock["steps"] not in budgets:
        raise UserError(
            f"{lock['steps']} steps is none of the budgets that opd.eval_steps, opd.eval_every and opd.steps give: "
            f"{budgets}"
        )
