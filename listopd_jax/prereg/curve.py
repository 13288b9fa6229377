"""The lock of a predicted curve: predictions.json as it was before the sweep, and how near the sweep came to it.

    RMSE ≤ max(.05, 1.25 · floor),   floor = √mean_λ(sd²/n)

The floor is the error of a predictor that knows the true means, against means of n seeds. Of the predictors in the lock
one is `chosen`, by a rule fixed in its code beforehand; the verdict is about that one.
"""

import datetime
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from listopd_jax import config as config_module
from listopd_jax import files
from listopd_jax.errors import UserError
from listopd_jax.prereg.lock import CURVE, Json, check_lock, config_sha256, sha256
from listopd_jax.prereg.verdict import select
from listopd_jax.records import PREDICTIONS, RESULTS, Prediction, read_predictions, read_results
from listopd_jax.theory.cliff import table

PREDICTORS = (
    "ops/limit.py", "theory/predict.py", "stages/predict.py", "stages/fixed_text.py", "train/fixed_text.py",
)  # fmt: skip
LEAST_GOAL, FLOORS = 0.05, 1.25


def make_curve_lock(workdir: pathlib.Path, config: Json) -> Json:
    """The lock of predictions.json in `workdir`; UserError if there is none, or the sweep has begun."""
    path = workdir / PREDICTIONS
    records = read_predictions(path)
    if not [r for r in records if r.chosen]:
        raise UserError(
            f"{path}: no prediction to lock; set predict.anchors or predict.fixed_text_lists and run up to the sweep"
        )
    chosen = next(r for r in records if r.chosen)
    done = [r for r in read_results(workdir / RESULTS) if r.stage == "opd" and r.seed in chosen.seeds]
    if done:
        raise UserError(
            f"{workdir / RESULTS}: holds {len(done)} runs of the sweep; a prediction comes before them"
        )
    lock = {
        "format": 1,
        "kind": CURVE,
        "grid": chosen.lambdas,
        "seeds": chosen.seeds,
        "steps": chosen.steps,
        "predictions": [r.to_json() for r in records],
        "predictor_sha256": predictor_sha256(),
        "config_sha256": config_sha256(config, CURVE),
        "code_revision": config_module.code_revision(),
        "locked_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    check_lock(lock, path)
    return lock | {"sha256": sha256(lock)}


def predictor_sha256() -> str:
    """SHA-256 of the code that predicts."""
    package = pathlib.Path(__file__).resolve().parents[1]
    return files.json_sha256([(package / name).read_text("utf-8") for name in PREDICTORS])


def judge_curve(lock: Json, records: Any) -> Json:
    """The verdict on every predictor of the lock; "verdict" is that on the chosen one."""
    lambdas, _, parse = table(select(lock, records))
    mean, floor = parse.mean(0), noise_floor(parse)
    goal = max(LEAST_GOAL, FLOORS * floor)
    found = [_judged(Prediction.from_json(p, "the lock"), mean, goal) for p in lock["predictions"]]
    chosen = next(f for f in found if f["chosen"])
    return {
        "verdict": "pass" if chosen["pass"] else "fail",
        "predictors": found,
        "floor": floor,
        "goal": goal,
        "lambdas": list(lambdas),
        "mean_parse": mean.tolist(),
        "sd": parse.std(0, ddof=1).tolist() if len(parse) > 1 else None,
        "lock_sha256": lock["sha256"],
    }


def noise_floor(parse: Float[np.ndarray, "S L"]) -> float:
    """√mean_λ(sd²/n) of n seeds."""
    # var/n is the variance of a mean of n seeds, which no predictor of the true means can beat.
    return math.sqrt(float((parse.var(0, ddof=1) / len(parse)).mean()))


def rmse(predicted: Sequence[float], mean: Float[np.ndarray, " L"]) -> float:
    """The root mean square over λ of prediction minus mean."""
    return math.sqrt(float(((np.array(predicted) - mean) ** 2).mean()))


def _judged(record: Prediction, mean: Float[np.ndarray, " L"], goal: float) -> Json:
    head = {
        "predictor": record.predictor,
        "chosen": record.chosen,
        "anchors": record.anchors,
        "why": record.why,
    }
    if record.parse is None:
        return head | {"rmse": None, "inside": None, "pass": False}
    missed, inside = rmse(record.parse, mean), None
    if record.low is not None:
        inside = int(((mean >= np.array(record.low)) & (mean <= np.array(record.high))).sum())
    return head | {"rmse": missed, "inside": inside, "pass": missed <= goal}
