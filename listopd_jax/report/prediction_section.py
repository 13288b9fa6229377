"""What predictions.json said of the trained curve, beside what came of it."""

import math

from listopd_jax.records import Prediction
from listopd_jax.report import plots
from listopd_jax.report.inputs import Inputs
from listopd_jax.report.page import Cell, Section, Table
from listopd_jax.report.wording import decimal, fact, number


def prediction_section(inputs: Inputs) -> Section | None:
    """A table of predictors and one of the chosen curve; None where nothing was predicted."""
    shown = [p for p in inputs.predictions if p.parse]
    if not shown:
        return None
    lead = (
        "The parse of trained students, predicted before they were trained. The chosen predictor was fixed beforehand; "
        "its band should hold the mean over seeds at 9 of 10 λ."
    )
    head = ("predictor", "anchor runs", "RMSE to the trained means", "how")
    rows = [_row(inputs, p) for p in shown]
    tables = [Table("Predictors", head, rows), *(_curve(inputs, p) for p in shown if p.chosen)]
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
    trained = _trained(inputs)
    squares = [(y - trained[lam]) ** 2 for lam, y in zip(p.lambdas, p.parse, strict=True) if lam in trained]
    missed = decimal(math.sqrt(sum(squares) / len(squares))) if squares else "not trained yet"
    return (
        Cell(p.predictor + (", chosen" if p.chosen else "")),
        Cell(fact(p.anchors)),
        Cell(missed),
        Cell(p.why),
    )


def _curve(inputs: Inputs, p: Prediction) -> Table:
    trained, rows = _trained(inputs), []
    for point in _points(p):
        band = f"{decimal(point.interval[0])} to {decimal(point.interval[1])}" if point.interval else "–"
        seen = decimal(trained[point.lam]) if point.lam in trained else "–"
        rows.append((Cell(number(point.lam)), Cell(decimal(point.value)), Cell(band), Cell(seen)))
    return Table(f"Parse by {p.predictor}", ("λ", "predicted", "90 % band", "trained, mean"), rows)


def _trained(inputs: Inputs) -> dict[float, float]:
    return {policy.lam: policy.mean("parse") for policy in inputs.found.opd}
