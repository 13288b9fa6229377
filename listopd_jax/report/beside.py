"""Other runs next to this one, such as guarded next to plain: parse and useful at each λ in one figure each."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from listopd_jax.report import plots
from listopd_jax.report.ablations import guarded
from listopd_jax.report.findings import Policy
from listopd_jax.report.inputs import METRICS, Inputs
from listopd_jax.report.page import Cell, Plot, Section, Table
from listopd_jax.report.recommendation import guard_margin
from listopd_jax.report.wording import capital, decimal, interval, label, number, percent

LOOKS = ((plots.BLUE, "o"), (plots.ORANGE, "s"), (plots.GREEN, "D"), (plots.PURPLE, "^"), (plots.SLATE, "v"))


def beside_section(inputs: Inputs) -> Section | None:
    """This run and those that the report was asked to show next to it; None if it was asked for none."""
    if not inputs.beside:
        return None
    runs = {
        _name(name, kind, half): half
        for name, run in {inputs.point or "this run": inputs, **inputs.beside}.items()
        for kind, half in run.halves().items()
    }
    lead = "Means over seeds; the same held-out answers where data and task are the same."
    lead += f" The other sections are of {inputs.point}." if inputs.point else ""
    differs = differences(inputs, inputs.beside)
    points = [f"{name} differs in {', '.join(fields)}." for name, fields in differs.items() if fields]
    only_guard = all(f.startswith("opd.guard.") for fields in differs.values() for f in fields) and differs
    other = "The points of the sweep" if inputs.point else "Next to other runs"
    title = "Guarded vs. plain" if only_guard else other
    shown = [_plot(runs, metric) for metric in ("parse", "useful")]
    return Section("beside", title, lead, points=points, plots=shown, tables=[_table(runs)])


def differences(inputs: Inputs, others: Mapping[str, Inputs]) -> dict[str, list[str]]:
    """The dotted fields of the config in which each of `others` differs from `inputs`, except for the grid's own."""
    own = _flat(inputs.config.get("config", {}))
    # What the figures show anyway; `parallel` and `track` change nothing that is trained.
    grid = ("opd.lambdas", "opd.seeds", "opd.sweep", "forecast.", "parallel.", "track.")
    found = {}
    for name, other in others.items():
        its = _flat(other.config.get("config", {}))
        changed = sorted(field for field in own.keys() | its.keys() if own.get(field) != its.get(field))
        found[name] = [field for field in changed if not field.startswith(grid)]
    return found


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix.removesuffix("."): tree}
    return {k: v for name, value in tree.items() for k, v in _flat(value, f"{prefix}{name}.").items()}


def _name(name: str, kind: str, inputs: Inputs) -> str:
    if kind == "plain":
        return f"{name}, plain"
    other = next((r.guard for r in inputs.results if r.stage == "opd" and r.guard), "")
    margin = guard_margin(inputs)
    return f"{name}, {f'guard {margin:g}' if margin else f'guard {other}' if other else 'plain'}"


def _plot(runs: Mapping[str, Inputs], metric: str) -> Plot:
    series = []
    for i, (name, inputs) in enumerate(runs.items()):
        colour, marker = LOOKS[i % len(LOOKS)]
        points = [
            plots.Point(policy.lam, value, policy.interval(metric))
            for policy in inputs.found.opd
            if (value := policy.mean(metric)) is not None
        ]
        series.append(plots.Series(label(name), points, colour, marker))
    said = [
        f"{one.name}: " + ", ".join(f"{number(p.lam)} {p.value:.3f}" for p in one.points) for one in series
    ]
    svg = plots.versus_lambda(
        [one for one in series if one.points],
        ylabel="answers that parse" if metric == "parse" else "useful",
        in_percent=metric == "parse",
        description=f"{capital(METRICS[metric])} against λ, run by run. {'; '.join(said)}.",
    )
    return Plot(f"{capital(METRICS[metric])}, run by run", Markup(svg))


def _table(runs: Mapping[str, Inputs]) -> Table:
    rows = [_row(name, inputs, policy) for name, inputs in runs.items() for policy in inputs.found.opd]
    return Table("", ("run", "λ", "seeds", "parse", "useful", "NDCG@1", "tokens guarded"), rows)


def _row(name: str, inputs: Inputs, policy: Policy) -> tuple[Cell, ...]:
    metrics = [
        Cell(decimal(policy.mean(m)), interval(policy.interval(m))) for m in ("parse", "useful", "ndcg@1")
    ]
    steps = max((record.steps or 0) for record in policy.records)
    held = Cell(percent(guarded(inputs, policy.lam, steps), 1))
    return (Cell(name), Cell(number(policy.lam)), Cell(str(len(policy.records))), *metrics, held)
