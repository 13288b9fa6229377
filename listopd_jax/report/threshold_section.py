"""The report's thresholds before training: what calibration.json says, in plain words."""

from collections.abc import Iterator, Mapping, Sequence

from markupsafe import Markup

from listopd_jax.records import Calibration, CurvePoint, FlipRow, ForecastFlips
from listopd_jax.report import plots
from listopd_jax.report.findings import place
from listopd_jax.report.inputs import Inputs
from listopd_jax.report.page import Cell, Plot, Section, Table
from listopd_jax.report.wording import (
    NBSP,
    at,
    capital,
    decimal,
    fact,
    interval,
    number,
    percent,
    words,
)

_MEANINGS = {
    "p_typ": "p_typ: how sure the teacher is of its own token, in a typical answer",
    "p_safe": "p_safe: the same in the answer where it is surest",
    "b_measured": "b, measured: how likely the base finds the teacher's token",
    "b_implied": "b, implied by the mean log-ratio of the two models",
    "lambda_typ_measured": "λ*_typ: the clip-safe λ of a typical answer, b measured",
    "lambda_typ_implied": "λ*_typ, b implied",
    "lambda_safe_measured": "λ*_safe: the clip-safe λ of the surest answer, b measured",
    "lambda_safe_implied": "λ*_safe, b implied",
}
_TOKEN_WISE = {
    "p_max": "p, largest of all tokens",
    "p_mean": "p, mean of all tokens",
    "p_geometric_mean": "p, geometric mean",
    "p_percentile_5": "p, 5th percentile",
    "p_min": "p, smallest kept",
}
_MARKS = {
    "lambda_typ_measured": ("λ*_typ, b measured", plots.PURPLE, "^"),
    "lambda_typ_implied": ("λ*_typ, b implied", plots.PURPLE, "v"),
    "lambda_safe_measured": ("λ*_safe, b measured", plots.SLATE, "^"),
    "lambda_safe_implied": ("λ*_safe, b implied", plots.SLATE, "v"),
}
_CLASS_HEAD = (
    "token class",
    "tokens",
    "kept",
    "mean p",
    "mean b",
    "λ*",
    "smallest λ_flip",
    "1 %",
    "5 %",
    "median",
)
_CLASS_FLIPS = ("flip_min", "flip_percentile_1", "flip_percentile_5", "flip_percentile_50")
_FLIPS = ("min", "percentile_1", "percentile_5", "percentile_25", "percentile_50")
_FLIP_HEAD = ("first answer", "1 %", "5 %", "25 %", "half of the answers", "never flip")


def threshold_section(inputs: Inputs) -> Section | None:
    """What teacher and base said about λ before any update; None without a calibration."""
    found = inputs.calibration
    if found is None:
        return None
    tables = [_numbers_table(found), _flips_table(found), *_forecasts_table(found), _classes_table(found)]
    shown = [_curve_plot(found)] if found.curve else []
    points = [*_reasons(found), *map(str, found.notes)]
    title = "Thresholds before training"
    return Section(
        "thresholds", title, _lead(found), points=points, plots=shown, layout="many", tables=tables
    )


def _lead(found: Calibration) -> str:
    clip = "no clip" if found.clip is None else f"clip c = {number(found.clip)}"
    return (
        f"Read off teacher and base along the teacher's greedy answers to {fact(found.prompts)} prompts, before "
        f"any update; {clip}. The clip-safe λ* (EC, arXiv:2605.08737, Eq. 4) is where the target crosses the clip "
        f"boundary, over the {fact(found.kept)} of {fact(found.positions)} tokens with "
        f"p ≥ {fact(found.tau)}. λ_flip is where the target prefers another token than the teacher's, over all "
        "tokens: greedy decoding from the target leaves the teacher's answer there. Intervals: bootstrap over prompts."
    )


def _reasons(found: Calibration) -> list[str]:
    """Why numbers are missing, each reason once."""
    names: dict[str, list[str]] = {}
    for name, reason in found.reasons.items():
        names.setdefault(str(reason), []).append(words(str(name)))
    return [f"{', '.join(which)}: {reason}." for reason, which in names.items()]


def probability(value: float | None) -> str:
    """A probability with the digits that matter next to 1."""
    if value is not None and 0.9999 < value < 1:
        return f"1{NBSP}−{NBSP}{1 - value:.2g}"
    return "–" if value is None else f"{value:.4f}"


def _numbers_table(found: Calibration) -> Table:
    rows = [tuple(map(Cell, row)) for row in main_numbers(found, _MEANINGS | _TOKEN_WISE)]
    return Table("Main numbers", ("", "value", "95 % interval"), rows)


def main_numbers(
    found: Calibration, meanings: Mapping[str, str] = _MEANINGS
) -> Iterator[tuple[str, str, str]]:
    """(what it is, value, 95 % interval) of the fields of a calibration that `meanings` explains."""
    for name, meaning in meanings.items():
        form = decimal if name.startswith("lambda") else probability
        yield meaning, form(getattr(found, name)), interval(found.intervals.get(name), form, " to ")


def flip_text(value: float | None) -> str:
    """A λ_flip as text: none means that no λ flips the mode."""
    return "never" if value is None else decimal(value)


def _flips_table(found: Calibration) -> Table:
    rows = [(Cell(f"{words(row.positions)} tokens"), *_flip_cells(row)) for row in found.flips]
    head = ("the λ at which answers first flip", *_FLIP_HEAD)
    return Table("Mode flips, answer by answer", head, rows)


def _forecasts_table(found: Calibration) -> list[Table]:
    """The same along the forecasts' own answers, on prefixes that the teacher never writes; [] without a forecast."""
    if not found.forecasts:
        return []
    rows = [
        (
            Cell(place(row.lam, row.guard)),
            Cell(percent(row.agreement)),
            Cell(percent(row.flipped)),
            *_flip_cells(row),
        )
        for row in found.forecasts
    ]
    head = ("along the forecast at", "the teacher’s answer", "flip below λ", *_FLIP_HEAD)
    return [Table("Flips of structural tokens along the forecasts’ own answers", head, rows)]


def _flip_cells(row: FlipRow | ForecastFlips) -> list[Cell]:
    return [*(Cell(flip_text(getattr(row, name))) for name in _FLIPS), Cell(percent(row.never))]


def _classes_table(found: Calibration) -> Table:
    rows = []
    for row in found.classes:
        counts = (Cell(fact(count)) for count in (row.positions, row.kept))
        means = (Cell(probability(mean)) for mean in (row.p, row.b))
        flips = (Cell(flip_text(getattr(row, name))) for name in _CLASS_FLIPS)
        rows.append((Cell(words(row.token_class)), *counts, *means, Cell(decimal(row.lam)), *flips))
    return Table("By class of token: p, b and λ* over kept tokens, λ_flip over all", _CLASS_HEAD, rows)


def _curve_plot(found: Calibration) -> Plot:
    """Share of answers with a flip against λ; the clip-safe λ within the grid as upright lines."""
    curve, last = found.curve, max(point.lam for point in found.curve)
    series = [
        plots.Series(f"flip, {name}", [plots.Point(x.lam, getattr(x, key)) for x in curve], colour, ".")
        for key, name, colour in (
            ("all", "any token", plots.BLUE),
            ("structural", "structural", plots.ORANGE),
        )
    ]
    known = {name: lam for name in _MARKS if (lam := getattr(found, name)) is not None}
    series += [
        _mark(known[key], *look) for key, look in _MARKS.items() if key in known and known[key] <= last
    ]
    svg = plots.versus_lambda(
        series, ylabel="answers with a flip", in_percent=True, description=_spoken(curve, known)
    )
    outside = [f"{_MARKS[key][0]} = {decimal(lam)}" for key, lam in known.items() if lam > last]
    title = capital(_first_flip(curve)) + (f" (off the figure: {', '.join(outside)})" if outside else "")
    return Plot(title, Markup(svg))


def predicted(calibration: Calibration | None, last: float) -> list[plots.Series]:
    """EC Eq. 4's λ*_typ and the λ at which half of the answers have flipped, those up to `last`, as upright lines."""
    if calibration is None:
        return []
    typical = ("lambda_typ_measured", "lambda_typ_implied")
    looks = [(getattr(calibration, key), *_MARKS[key]) for key in typical]
    for row in calibration.flips:
        if row.positions == "structural":
            looks.append((row.percentile_50, "λ_flip of half the answers", plots.ORANGE, "D"))
    return [_mark(*look) for look in looks if look[0] is not None and look[0] <= last]


def _mark(lam: float, name: str, colour: str, marker: str) -> plots.Series:
    """An upright line at `lam`."""
    return plots.Series(name, [plots.Point(lam, 0.0, (0.0, 1.0))], colour, marker)


def _first_flip(curve: Sequence[CurvePoint]) -> str:
    """The structural curve in a phrase."""
    points = sorted((point.lam, point.structural) for point in curve)
    for lam, share in points:
        if share > 0:
            end = f"{percent(points[-1][1])} below {at(points[-1][0])}"
            return f"structural tokens flip in {percent(share)} of answers below {at(lam)}, in {end}"
    return f"no answer flips a structural token up to {at(points[-1][0])}"


def _spoken(curve: Sequence[CurvePoint], known: Mapping[str, float]) -> str:
    """The numbers of the figure, for those who cannot see it."""
    points = [f"{at(x.lam)}: any {percent(x.all)}, structural {percent(x.structural)}" for x in curve[::4]]
    marks = [f"{_MARKS[key][0]} at {decimal(lam)}" for key, lam in known.items()]
    return f"Share of answers with a mode flip against λ. {'; '.join([*points, *marks])}."
