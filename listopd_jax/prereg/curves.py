"""The verdicts on several locked curves as one JSON list, with baselines: docs/results/forecast.json.

The baselines see the curve that they are judged by, or another pair's runs, so a predictor has to beat them honestly:
`best_constant`, the mean of the observed curve; `logistic_of_PAIR`, a logistic in λ fitted to the runs of that pair.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import optimize, special

from listopd_jax import files
from listopd_jax.errors import UserError
from listopd_jax.prereg.curve import judge_curve, rmse
from listopd_jax.prereg.lock import CURVE, Json, check_config, read_lock
from listopd_jax.records import RESULTS

Judged = Mapping[str, Json]  # pair -> verdict of its lock


def judged_pairs(locks: list[pathlib.Path], runs: pathlib.Path) -> Judged:
    """Pair -> verdict; the lock of a pair is PAIR.json, its records are in runs/PAIR/results.json.

    UserError for two locks of one pair, a lock of another kind, or a run whose config.json is not the locked one.
    """
    found = {}
    for path in locks:
        lock = read_lock(path)
        if lock.get("kind") != CURVE:
            raise UserError(f"{path}: is the lock of a threshold, not of a curve; judge it with `verdict`")
        if path.stem in found:
            raise UserError(f"{path}: a second lock called {path.stem}; give one for each pair")
        saved = runs / path.stem / "config.json"
        if saved.exists():
            check_config(lock, files.read_json(saved).get("config", {}), str(saved))
        found[path.stem] = judge_curve(lock, files.read_json(runs / path.stem / RESULTS))
    return found


def figures(judged: Judged, locks: list[pathlib.Path]) -> list[dict[str, Any]]:
    """An entry for every pair and predictor, baselines last."""
    found = []
    for path in locks:
        verdict = judged[path.stem]
        shared = {
            "pair": path.stem,
            "floor": verdict["floor"],
            "goal": verdict["goal"],
            "lock": path.as_posix(),
        }
        points = len(verdict["lambdas"])
        found += [shared | {"points": points} | predictor for predictor in verdict["predictors"]]
        baselines = {"best_constant": _best_constant(verdict), **_logistics(path.stem, judged)}
        found += [
            shared | {"points": points, "predictor": name, "rmse": missed, "chosen": False, "baseline": True}
            for name, missed in baselines.items()
        ]
    return found


def _best_constant(verdict: Json) -> float:
    mean = np.array(verdict["mean_parse"])
    return rmse(np.full_like(mean, mean.mean()), mean)


def _logistics(pair: str, judged: Judged) -> dict[str, float]:
    """The RMSE on `pair` of logistics fitted to the other pairs."""
    mean, lambdas = np.array(judged[pair]["mean_parse"]), np.array(judged[pair]["lambdas"])
    return {
        f"logistic_of_{name}": rmse(_logistic(other)(lambdas), mean)
        for name, other in judged.items()
        if name != pair
    }


def _logistic(verdict: Json):
    """The least-squares logistic through the observed means of a pair."""
    lambdas, mean = np.array(verdict["lambdas"]), np.array(verdict["mean_parse"])

    def errors(place: Float[np.ndarray, " 2"]) -> Float[np.ndarray, " L"]:
        # The width as a logarithm: a negative one would turn the curve around.
        return special.expit((place[0] - lambdas) / np.exp(place[1])) - mean

    middle, width = optimize.least_squares(errors, [float(np.median(lambdas)), -2.0]).x
    return lambda lam: special.expit((middle - lam) / np.exp(width))
