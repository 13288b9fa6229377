"""Calibration as a stage: the thresholds of λ of the real teacher and base, before any update (EC §4; docs/theory.md).

`calibrate_stage` writes workdir/calibration.json, once. `calibrate_forecasts` adds λ_flip along the forecasts' own
answers, on prefixes that the teacher's path never visits. positions.py reads the models, thresholds.py has the numbers.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from listopd_jax import files
from listopd_jax.metrics_log import progress
from listopd_jax.ops.opd_loss import Frozen
from listopd_jax.parallel.hosts import from_main
from listopd_jax.records import (
    CALIBRATION,
    Calibration,
    ForecastFlips,
)
from listopd_jax.rounding import round_up
from listopd_jax.stages.evaluate import Answer
from listopd_jax.stages.job import Job, base_of
from listopd_jax.stages.positions import ANSWER_STEP, Positions, along, concatenate_positions, measure, padded
from listopd_jax.stages.teachers import teacher_roles
from listopd_jax.stages.thresholds import calibrate, forecast_row, strip_of


def calibrate_stage(job: Job, frozen: Frozen) -> Calibration:
    """Calibrate on the validation lists and write workdir/calibration.json; only read it if it is there.

    Each list is read with its own teacher.
    """
    path, config = job.workdir / CALIBRATION, job.config
    # Process 0 looks for all: hosts that disagree on this would wait for each other for good.
    saved = from_main(lambda: files.read_json(path) if path.exists() else None)
    if saved is not None:
        return Calibration.from_json(saved, str(path))
    params = dict(zip(teacher_roles(job.models), frozen.teachers, strict=True))
    measured = {
        role: measure(
            job.graphs | {"teacher": job.graphs[role]}, params[role], frozen.base, batches, job.codec, job.decoding,
            config.opd.head_chunk,
        )
        for role, batches in job.by_teacher()
    }  # fmt: skip
    positions = Positions(*map(np.concatenate, zip(*measured.values(), strict=True)))
    found = calibrate(positions, config.opd.clip, bootstrap=config.evaluation.bootstrap, seed=config.seed)
    notes = found.notes + _objective_notes(config.opd) + _teacher_notes(measured, config.opd.clip)
    strip = strip_of(positions, job.codec)
    found = dataclasses.replace(found, notes=notes, strip=strip)
    files.write_json(path, found.to_json())
    return found


def calibrate_forecasts(
    job: Job, frozen: Frozen, lambdas: Sequence[float], answers: Sequence[Sequence[Answer]], guard: str = ""
) -> None:
    """Add to workdir/calibration.json what teacher and base say along the forecasts' own answers, λ by λ.

    `answers` are those of one λ to every validation prompt, for each of `lambdas`; one pass of both models scores all.
    `guard` is the one in force.
    """
    params = dict(zip(teacher_roles(job.models), frozen.teachers, strict=True))
    ids = [{answer.index: answer.tokens for answer in column} for column in answers]
    parts = []
    for role, batches in job.by_teacher(job.config.forecast.batch_size):
        models = (job.graphs[role], base_of(job.graphs)), (params[role], frozen.base)
        for batch in progress(list(batches), "calibrate forecasts"):
            written = [[column[index] for column in ids] for index in batch["index"].tolist()]
            lengths = np.array([[len(tokens) for tokens in row] for row in written])
            tokens = padded(written, round_up(int(lengths.max()), ANSWER_STEP), job.codec.pad)
            parts.append(along(*models, batch, tokens, lengths, job.codec, job.config.opd.head_chunk))
    rows = [
        dataclasses.replace(forecast_row(lam, concatenate_positions(column)), guard=guard)
        for lam, column in zip(lambdas, zip(*parts, strict=True), strict=True)
    ]
    _add_forecasts(job.workdir / CALIBRATION, rows)


def _add_forecasts(path: pathlib.Path, rows: Sequence[ForecastFlips]) -> None:
    """Write `rows` into a calibration, in place of those of the same λ and guard."""
    saved = from_main(lambda: files.read_json(path))
    found, new = Calibration.from_json(saved, str(path)), {(row.lam, row.guard) for row in rows}
    kept = [row for row in found.forecasts if (row.lam, row.guard) not in new]
    both = tuple(sorted([*kept, *rows], key=lambda row: (row.lam, row.guard)))
    files.write_json(path, dataclasses.replace(found, forecasts=both).to_json())


def _teacher_notes(measured: Mapping[str, Positions], clip: float) -> list[str]:
    """With several teachers, the thresholds of each on its own lists."""
    if len(measured) == 1:
        return []
    notes = []
    for role, positions in measured.items():
        found = calibrate(positions, clip, bootstrap=0)
        lam = "undefined" if found.lambda_typ_measured is None else f"{found.lambda_typ_measured:.3f}"
        notes.append(
            f"The {role} alone, on its {found.prompts} prompts: λ* (typical p, measured b) is {lam}."
        )
    return notes


def _objective_notes(opd: Any) -> list[str]:
    """Where the run's objective is not the one that the formulas are about."""
    notes = []
    if opd.ratio != "teacher_student":
        notes.append(f"Eq. 4 is about opd.ratio=teacher_student; this run has {opd.ratio}.")
    if opd.advantage == "no_base":
        notes.append(
            "opd.advantage=no_base does not extrapolate from the base: neither λ* nor λ_flip applies to this run."
        )
    if opd.estimator == "full_vocab":
        notes.append(
            "opd.estimator=full_vocab has no importance ratio to clip: only λ_flip applies to this run."
        )
    return notes
