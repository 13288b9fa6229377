"""predictions.json: the parse curve of trained students, predicted before the sweep that shows it (docs/theory.md).

Five predictors, each costlier than the one before:

    nominal     greedy decoding from the target: the forecast
    limit       greedy decoding from where the estimator in use ends (ops/limit.py), where that is not the target
    anchors     one of these at the λ that N steps reach, with the spread of seeds; both come from the runs at
                `predict.anchors`, whose seeds the sweep does not use (theory/predict.py)
    fixed_text  greedy answers of students that are trained for N steps on a few texts, without rollouts
                (stages/fixed_text.py); if `predict.fixed_text_lists` asks for it
    both        the mean of anchors and fixed_text

The rule: the first that there is of `both`, `anchors`, `fixed_text`, `limit`, `nominal` is chosen.
"""

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from listopd_jax.config import guard_text, predicts
from listopd_jax.ops.guard import Guard
from listopd_jax.ops.opd_loss import Frozen
from listopd_jax.parallel.hosts import from_main, is_main
from listopd_jax.records import (
    PREDICTIONS,
    RESULTS,
    Prediction,
    read_predictions,
    read_results,
    write_records,
)
from listopd_jax.stages.fixed_text import band, fixed_text_parse
from listopd_jax.stages.forecast import target_answers
from listopd_jax.stages.job import Job
from listopd_jax.stages.opd import Distillation, opd_steps
from listopd_jax.stages.results import evaluated
from listopd_jax.theory.predict import Shape, Undetermined, closest, gaps, predicted
from listopd_jax.train.loop import Run

ANCHOR = "anchor"
WHY = {"nominal": "greedy decoding from the target", "limit": "greedy decoding from where the estimator ends"}
NOT_OF_TARGET = {"kl_to_base": 0, "entropy_bonus": 0, "contract_reward": 0}
NOT_ON_FIXED_TEXT = {
    "contract_reward": 0, "ema": 0, "on_policy": 1, "updates_per_batch": 1, "constrained_rollouts": "",
}  # fmt: skip
CHOICE = ("both", "anchors", "fixed_text", "limit", "nominal")
COARSE, ROUNDS = 9, 2  # points of the grid at first, and how often it is refined


def anchor_runs(job: Job) -> list[Run]:
    """The runs that show how far N steps get; none of them is of the sweep."""
    options, guard = job.config.predict, guard_text(job.config.opd.guard)
    return [
        Run(f"anchor_lambda{float(lam)}_seed{seed}", ANCHOR, float(lam), seed, opd_steps(job), guard)
        for seed in options.seeds
        for lam in options.anchors
    ]


def predict(job: Job, shared: Distillation) -> None:
    """Write predictions.json for the λ of the sweep, once the anchors are evaluated; one made alike is kept.

    Other λ, seeds or anchors are another prediction, but there is none once the sweep has begun.
    """
    anchors, path = anchor_runs(job), job.workdir / PREDICTIONS
    if not predicts(job.config) or not job.config.opd.lambdas:
        return
    made_from = _made_from(job, anchors)
    # All records of a prediction say the same, so the first will do.
    before = from_main(lambda: [p.extra.get("made_from") for p in read_predictions(path)][:1])
    if before == [made_from]:
        return
    # A prediction written after the first result would not be one.
    if from_main(lambda: _has_begun(job)):
        if is_main():
            print("no new prediction: runs of the sweep are evaluated already", file=sys.stderr)
        return
    records = [
        dataclasses.replace(p, extra={"made_from": made_from}) for p in _predictions(job, shared, anchors)
    ]
    write_records(path, records)
    if is_main():
        print(f"predicted parse: {_in_words(next(p for p in records if p.chosen))}", file=sys.stderr)


def _predictions(job: Job, shared: Distillation, anchors: Sequence[Run]) -> list[Prediction]:
    """Each predictor's prediction of the sweep, one of them chosen."""
    lambdas, began = sorted(map(float, job.config.opd.lambdas)), time.monotonic()
    shapes = {name: shape(job, shared.frozen, guard) for name, guard in _decoded_with(job).items()}
    seconds = round(time.monotonic() - began, 1)
    found = [_of_shape(job, name, curve, lambdas) | {"seconds": seconds} for name, curve in shapes.items()]
    if anchors:
        found.append(_of_anchors(job, shapes, anchors, lambdas) | {"seconds": seconds})
    if job.config.predict.fixed_text_lists:
        found.append(_of_fixed_text(job, shared, lambdas))
        # The last two are anchors and fixed_text, in this order.
        found += [mean_of(*found[-2:])] if anchors and found[-2].get("parse") else []
    chosen = next(name for name in CHOICE if any(p["predictor"] == name and p.get("parse") for p in found))
    about = {"steps": opd_steps(job), "seeds": list(job.config.opd.seeds), "lambdas": lambdas}
    return [Prediction(**p, **about, chosen=p["predictor"] == chosen) for p in found]


def _of_fixed_text(job: Job, shared: Distillation, lambdas: Sequence[float]) -> dict[str, Any]:
    began, seeds = time.monotonic(), len(job.config.predict.seeds)
    parse = fixed_text_parse(job, shared, lambdas)
    found = {"predictor": "fixed_text", "parse": parse.mean(0).tolist()}
    for name, edge in zip(("low", "high"), band(parse, len(job.config.opd.seeds)) or (), strict=False):
        found[name] = edge.tolist()
    lists = job.config.predict.fixed_text_lists
    why = f"{opd_steps(job)} steps on the texts of {lists} lists, without rollouts, {seeds} seeds"
    why += _without(job.config.opd, NOT_ON_FIXED_TEXT)
    return found | {"why": why, "seconds": round(time.monotonic() - began, 1)}


def mean_of(anchors: Mapping[str, Any], fixed_text: Mapping[str, Any]) -> dict[str, Any]:
    """The prediction half way between two; their bands are those of independent errors."""
    columns = ("parse", "low", "high")
    parse, *edges = (np.array([p.get(name, p["parse"]) for p in (anchors, fixed_text)]) for name in columns)
    mean = parse.mean(0)
    # Half the hypotenuse: the width of a mean of two independent errors.
    low, high = (
        mean + sign * np.hypot(*(edge - parse)) / 2 for sign, edge in zip((-1, 1), edges, strict=True)
    )
    return {
        "predictor": "both",
        "parse": mean.tolist(),
        "low": np.clip(low, 0, 1).tolist(),
        "high": np.clip(high, 0, 1).tolist(),
        "anchors": anchors["anchors"],
        "seconds": fixed_text["seconds"],
        "why": "the mean of anchors and fixed_text",
    }


def _has_begun(job: Job) -> bool:
    """Whether a run of the sweep is evaluated."""
    return any(r.stage == "opd" for r in read_results(job.workdir / RESULTS))


def _made_from(job: Job, anchors: Sequence[Run]) -> dict[str, Any]:
    opd, lists = job.config.opd, job.config.predict.fixed_text_lists
    found = {"anchors": [run.name for run in anchors], "lambdas": list(opd.lambdas), "seeds": list(opd.seeds)}
    return found | ({"fixed_text_lists": lists} if lists else {})


def _decoded_with(job: Job) -> dict[str, Guard | None]:
    """Predictor -> the guard that changes the target of its greedy answers: the job's, and the estimator's limit."""
    opd, guard = job.config.opd, job.guard_of(guard_text(job.config.opd.guard))
    if opd.estimator != "sampled" or opd.ratio != "teacher_student" or opd.normalize:
        return {"nominal": guard}  # the limit is the target
    limit = dataclasses.replace(guard or Guard(), limit=True, clip=jnp.float32(opd.clip))
    return {"nominal": guard, "limit": limit}


def shape(job: Job, frozen: Frozen, guard: Guard | None) -> Shape:
    """The parse of greedy answers on a grid about the λ of sweep and anchors, finer where it changes."""
    asked = [*job.config.opd.lambdas, *job.config.predict.anchors]
    most = max(asked) + 0.5 * abs(max(asked) - 1)  # runs may reach a larger λ's parse
    lambdas = np.linspace(min(0.9, *asked), most, COARSE)
    found = Shape(lambdas, _decoded(job, frozen, lambdas, guard))
    for _ in range(ROUNDS):
        # Decoding costs the same everywhere, so points go where parse changes most.
        if (more := gaps(found, job.config.predict.largest_gap)).size:
            finer = np.concatenate([found.lambdas, more])
            parse, order = (
                np.concatenate([found.parse, _decoded(job, frozen, more, guard)]),
                np.argsort(finer),
            )
            found = Shape(finer[order], parse[order])
    return found


def _decoded(
    job: Job, frozen: Frozen, lambdas: Float[np.ndarray, " L"], guard: Guard | None
) -> Float[np.ndarray, " L"]:
    """The share of validation lists that parse at each λ."""
    answers = target_answers(job, frozen, lambdas.tolist(), guard, "predict")
    return np.array([np.mean([a.parsed.ok for a in column]) for column in answers])


def _of_shape(job: Job, name: str, found: Shape, lambdas: Sequence[float]) -> dict[str, Any]:
    grid = {"lambdas": found.lambdas.tolist(), "parse": found.parse.tolist()}
    why = WHY[name] + _without(job.config.opd, NOT_OF_TARGET)
    return {"predictor": name, "parse": found.at(np.array(lambdas)).tolist(), "fit": grid, "why": why}


def _without(opd: Any, left_out: Mapping[str, Any]) -> str:
    """The options of `left_out`, given with their values of no effect, that a run has and its predictor has not."""
    names = [name for name, off in left_out.items() if getattr(opd, name) != off]
    return f", without {', '.join(names)}" if names else ""


def _of_anchors(
    job: Job, shapes: Mapping[str, Shape], anchors: Sequence[Run], lambdas: Sequence[float]
) -> dict[str, Any]:
    """The prediction of the anchors; without a curve, and with the reason, where they say too little."""
    parse = np.array([evaluated(job.workdir, run).parse for run in anchors])
    head, lam = {"predictor": "anchors", "anchors": len(anchors)}, np.array([run.lam for run in anchors])
    try:
        name, found = closest(shapes, lam, parse)
    except Undetermined as e:
        return head | {"why": str(e)}
    lists, seeds = len(job.validation.prompts), len(job.config.opd.seeds)
    curve = predicted(shapes[name], found, np.array(lambdas), seeds=seeds, lists=lists)
    at_1, slope = found.line.tolist()
    why = f"{name} at λ = {at_1:.2f} + {slope:.2f}(λ − 1), which {opd_steps(job)} steps reach, ± {found.spread:.3f}"
    fit = {"shape": name, "at_1": at_1, "slope": slope, "spread": found.spread, "freedom": found.freedom}
    return head | {k: v.tolist() for k, v in curve._asdict().items()} | {"fit": fit, "why": why}


def _in_words(record: Prediction) -> str:
    places = zip(record.lambdas, record.parse, strict=True)
    return (
        ", ".join(f"{parse:.2f} at {lam:g}" for lam, parse in places) + f" ({record.predictor}: {record.why})"
    )
