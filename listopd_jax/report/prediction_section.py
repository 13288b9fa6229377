"""The trained curve as predictions.json had it, against the curve that was measured."""

import math
import statistics
from collections.abc import Sequence

from listopd_jax.records import Prediction
from listopd_jax.report import plots
from listopd_jax.report.inputs import Inputs
from listopd_jax.report.page import Cell, Section, Table
from listopd_jax.report.wording import decimal, fact, number


def prediction_section(inputs: Inputs) -> Section | None:
    """A table of predictors and one of the chosen curve; None where nothing was predicted."""
    if not any(p.parse for p in inputs.predictions):
        return None
    lead = (
        "The parse of trained students, predicted before they were trained. The chosen predictor was fixed beforehand; "
        "its band should hold the mean over seeds at 9 of 10 λ. The floor is what a predictor that knows the true "
        "means would miss those of these seeds by."
    )
    head = ("predictor", "anchor runs", "RMSE to the trained means", "how")
    rows = [_row(inputs, p) for p in inputs.predictions]
    tables = [Table("Predictors", head, rows)]
    tables += [_curve(inputs, p) for p in inputs.predictions if p.chosen and p.parse]
    return Section("predicted", "Predicted before training", lead, tables=tables)


def prediction_series(inputs: Inputs) -> list[plots.Series]:
    """The chosen curve with its band, to be drawn against λ."""
    return [
        plots.Series(f"predicted ({p.predictor})", _points(p), plots.ORANGE, "^")
        for p in inputs.predictions
        if p.chosen and p.parse
    ]


def _points(p: Prediction) -> list[plots.Point]:
    bands = zip(p.low, p.high, strict=True) if p.low else [None] * len(p.parse)
    return [plots.Point(lam, y, band) for lam, y, band in zip(p.lambdas, p.parse, bands, strict=True)]


def _row(inputs: Inputs, p: Prediction) -> tuple[Cell, ...]:
    """A predictor's cost, error and method; one that found no curve says why."""
    return (
        Cell(p.predictor + (", chosen" if p.chosen else "")),
        Cell(fact(p.anchors), "" if p.seconds is None else f"and {p.seconds:.0f} s"),
        _missed(inputs, p) if p.parse else Cell("–"),
        Cell(p.why),
    )


def _missed(inputs: Inputs, p: Prediction) -> Cell:
    """The RMSE over the λ that are trained, and below it the floor of their seeds."""
    trained = _trained(inputs)
    pairs = [(y, trained[lam]) for lam, y in zip(p.lambdas, p.parse, strict=True) if lam in trained]
    if not pairs:
        return Cell("not trained yet")
    rmse = math.sqrt(statistics.fmean((y - statistics.fmean(seeds)) ** 2 for y, seeds in pairs))
    return Cell(decimal(rmse), _floor([seeds for _, seeds in pairs]))


def _floor(parse: Sequence[Sequence[float]]) -> str:
    """√mean_λ(sd²/n) of the seeds at each λ, in words; "" where one seed alone has no spread."""
    if any(len(seeds) < 2 for seeds in parse):
        return ""
    floor = math.sqrt(statistics.fmean(statistics.variance(seeds) / len(seeds) for seeds in parse))
    return f"floor {decimal(floor)}"


def _curve(inputs: Inputs, p: Prediction) -> Table:
    trained, rows = _trained(inputs), []
    for point in _points(p):
        band = f"{decimal(point.interval[0])} to {decimal(point.interval[1])}" if point.interval else "–"
        seen = decimal(statistics.fmean(trained[point.lam])) if point.lam in trained else "–"
        rows.append((Cell(number(point.lam)), Cell(decimal(point.value)), Cell(band), Cell(seen)))
    return Table(f"Parse by {p.predictor}", ("λ", "predicted", "90 % band", "trained, mean"), rows)


def _trained(inputs: Inputs) -> dict[float, list[float]]:
    """The parse of each seed at each λ; of a run with `opd.plain_lambdas` those under the guard, as predicted."""
    policies = inputs.found.guarded or inputs.found.opd
    return {policy.lam: [record.parse for record in policy.records] for policy in policies}
