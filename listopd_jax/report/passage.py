"""Distillation on held-out answers over its steps: useful and parse at every evaluation, and first passages.

A run passes first at the first evaluated step at which its parse is below CONTRACT_HOLDS after an evaluation at which
it was not. More steps move the cliff to smaller λ (EC Cor. 4.2): the passages say when each λ got there.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from listopd_jax.records import Result
from listopd_jax.report import plots
from listopd_jax.report.findings import CONTRACT_HOLDS, place
from listopd_jax.report.inputs import Inputs, Place
from listopd_jax.report.page import Cell, Plot, Section, Table
from listopd_jax.report.wording import decimal, fact, percent

Runs = Mapping[tuple[Place, int | None], Sequence[Result]]


def passage_section(inputs: Inputs) -> Section | None:
    """Held-out curves over steps; None where no run was evaluated on its way."""
    runs = evaluated_runs(inputs.results)
    if not any(len(records) > 1 for records in runs.values()):
        return None
    lead = (
        f"Every run evaluated on its way, means over seeds. A dot: the most useful step, whose checkpoint is kept. A "
        f"cross: where opd.on_collapse saw a collapse. First passage: the first evaluation with parse below "
        f"{percent(CONTRACT_HOLDS)} after one that reached it."
    )
    shown = [_plot(inputs, runs, metric, name) for metric, name in (("useful", "Useful"), ("parse", "Parse"))]
    shown.append(_passage_plot(inputs, runs))
    legend = [(place(*at), plots.css_colour(inputs.colours[at])) for at in _places(runs)]
    rows = [_row(at, _of(runs, at)) for at in _places(runs)]
    head = ("run", "most useful step", "useful there", "useful at the end", "first passage at step")
    table = Table("Best steps and first passages", head, rows)
    title = "Held-out answers over the steps"
    return Section("steps", title, lead, legend=legend, plots=shown, layout="many", tables=[table])


def evaluated_runs(results: Sequence[Result]) -> Runs:
    """The records of each distilled run, by λ and guard and by seed, ascending in steps."""
    runs = defaultdict(list)
    for record in results:
        if record.stage == "opd" and record.lam is not None and record.steps is not None:
            runs[(record.lam, record.guard), record.seed].append(record)
    return {
        key: sorted(runs[key], key=lambda r: r.steps) for key in sorted(runs, key=lambda k: (k[0], k[1] or 0))
    }


def first_passage(records: Sequence[Result]) -> int | None:
    """The first step at which parse is below CONTRACT_HOLDS after it was not; None if that never came."""
    held = False
    for record in records:
        if record.parse is not None and record.parse < CONTRACT_HOLDS and held:
            return record.steps
        # A run that has never held cannot break: a student that starts low is not a passage.
        held |= record.parse is not None and record.parse >= CONTRACT_HOLDS
    return None


def _of(runs: Runs, at: Place) -> list[Sequence[Result]]:
    return [records for (other, _), records in runs.items() if other == at]


def _places(runs: Runs) -> list[Place]:
    return sorted({at for at, _ in runs})


def _means(some: Sequence[Sequence[Result]], metric: str) -> tuple[list[int], list[float]]:
    """Steps, and the mean of `metric` over the runs that were evaluated there."""
    values = defaultdict(list)
    for record in (r for records in some for r in records):
        if (value := record.metric(metric)) is not None:
            values[record.steps].append(value)
    return sorted(values), [statistics.fmean(values[step]) for step in sorted(values)]


def _plot(inputs: Inputs, runs: Runs, metric: str, name: str) -> Plot:
    curves = []
    for at in _places(runs):
        steps, values = _means(_of(runs, at), metric)
        best = max(range(len(steps)), key=values.__getitem__, default=None) if metric == "useful" else None
        crosses = _collapses(_of(runs, at))
        curves.append(plots.Curve(place(*at), inputs.colours[at], steps, values, best=best, crosses=crosses))
    drawn = [curve for curve in curves if curve.steps]
    ends = "; ".join(f"{c.name}: from {c.values[0]:.3g} to {c.values[-1]:.3g}" for c in drawn)
    description = f"{name} of held-out answers over training steps. {ends}."
    svg = plots.training_curves(drawn, ylabel=name.lower(), limits=(-0.03, 1.03), description=description)
    return Plot(f"{name} on held-out answers", Markup(svg))


def _collapses(some: Sequence[Sequence[Result]]) -> list[int]:
    """The steps at which the runs of one λ were seen to collapse, as their last records say."""
    found = [records[-1].extra.get("collapsed_at", []) for records in some]
    return sorted(
        {step for steps in found if isinstance(steps, list) for step in steps if isinstance(step, int)}
    )


def _passage_plot(inputs: Inputs, runs: Runs) -> Plot:
    """Share of the runs at each λ that have passed, over steps."""
    curves = []
    for at in _places(runs):
        some = _of(runs, at)
        steps = sorted({r.steps for records in some for r in records})
        passed = [first_passage(records) for records in some]
        shares = [sum(p is not None and p <= step for p in passed) / len(passed) for step in steps]
        curves.append(plots.Curve(place(*at), inputs.colours[at], steps, shares, stairs=True))
    ends = "; ".join(f"{c.name}: {percent(c.values[-1])}" for c in curves)
    description = f"Share of runs whose contract has broken, over training steps. At the end, {ends}."
    svg = plots.training_curves(curves, ylabel="share of runs", limits=(-0.03, 1.03), description=description)
    return Plot("First passages, share of runs", Markup(svg))


def _row(at: Place, some: Sequence[Sequence[Result]]) -> tuple[Cell, ...]:
    steps, values = _means(some, "useful")
    best = max(range(len(steps)), key=values.__getitem__, default=None)
    passed = [step for records in some if (step := first_passage(records)) is not None]
    broke = f"{fact(round(statistics.median(passed)))}" if passed else "–"
    small = f"{len(passed)} of {len(some)} runs" if len(some) > 1 else ""
    where = (fact(steps[best]), decimal(values[best]), decimal(values[-1])) if steps else ("–",) * 3
    return (Cell(place(*at)), *map(Cell, where), Cell(broke, small))
