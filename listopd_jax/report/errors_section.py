"""Which teacher errors transfer: of each failure class the teacher's share of answers, and the student's at each λ."""

from collections.abc import Sequence

from markupsafe import Markup

from listopd_jax.report import plots
from listopd_jax.report.findings import FAILURES, OK, Policy
from listopd_jax.report.inputs import Inputs
from listopd_jax.report.page import Cell, Plot, Section, Table
from listopd_jax.report.wording import decimal, label, number, percent

MOST_CLASSES = 6  # drawn; the table has all
_COLOURS = (plots.ORANGE, plots.BLUE, plots.GREEN, plots.PURPLE, plots.INK, plots.MUTED)
_MARKERS = "osD^vX"


def errors_section(inputs: Inputs) -> Section | None:
    """A table, and a plot if answers fail; None unless there are policies that come from a teacher with such errors.

    An error may leave the contract alone, as a wrong digit does: that is in the row of what answers are worth.
    """
    planted, found = inputs.planted("teacher"), inputs.found
    if not planted or found.teacher is None or not found.opd:
        return None
    distilled = sorted((*found.opd, *found.guarded), key=lambda p: (p.sweep, p.guard, p.lam))
    policies = [policy for policy in (found.teacher, found.student, *distilled) if policy is not None]
    classes = _classes(policies)
    said = ", ".join(f"{name} in {number(share)}" for name, share in planted)
    lead = (
        f"The teacher’s training answers have errors by design: {said}. Below, the share of its greedy answers in each "
        "failure class, that of the student before distillation, and that of the student distilled at each λ. Errors "
        "that keep the contract show in ‘useful’ alone."
    )
    return Section(
        "errors", "Which teacher errors transfer", lead, plots=[_plot(distilled, classes)] if classes else (),
        tables=[_table(policies, classes)], layout="beside",
    )  # fmt: skip


def _classes(policies: Sequence[Policy]) -> list[str]:
    """The failure classes that occur, most frequent over all policies first."""
    shares = [policy.failure_shares() for policy in policies]
    total = {name: sum(s.get(name, 0.0) for s in shares) for s in shares for name in s if name != OK}
    return sorted((name for name in total if total[name]), key=lambda name: (-total[name], name))


def _name(failure: str) -> str:
    return FAILURES.get(failure, label(failure))


def _kind(policy: Policy) -> tuple[str, ...]:
    """The difference between policies of one λ: a guard, the point of a sweep."""
    return tuple(filter(None, ("guarded" if policy.guard else "", policy.sweep)))


def _table(policies: Sequence[Policy], classes: Sequence[str]) -> Table:
    """One row per failure class and one for what answers are worth, one column per policy."""
    shares = [policy.failure_shares() for policy in policies]
    names = [
        policy.name if policy.lam is None else ", ".join([f"λ = {number(policy.lam)}", *_kind(policy)])
        for policy in policies
    ]
    rows = [(Cell(_name(c)), *(Cell(percent(of.get(c, 0.0))) for of in shares)) for c in classes]
    worth = [policy.mean("useful") for policy in policies]
    rows.append((Cell("useful"), *(Cell(decimal(x)) for x in worth)))
    return Table("Share of answers, and useful", ("failure class", *names), rows)


def _plot(distilled: Sequence[Policy], classes: Sequence[str]) -> Plot:
    """One line per failure class and kind of policies: a class has one colour, its kinds have different markers."""
    series = [
        plots.Series(
            ", ".join([_name(failure), *map(label, kind)]),
            [plots.Point(p.lam, p.failure_shares().get(failure, 0.0)) for p in distilled if _kind(p) == kind],
            _COLOURS[i],
            _MARKERS[(i + j) % len(_MARKERS)],
        )
        for j, kind in enumerate(dict.fromkeys(map(_kind, distilled)))
        for i, failure in enumerate(classes[:MOST_CLASSES])
    ]
    spoken = "; ".join(
        f"{one.name}: {', '.join(f'{percent(p.value)} at λ = {number(p.lam)}' for p in one.points)}"
        for one in series
    )
    svg = plots.versus_lambda(
        series,
        ylabel="share of answers",
        in_percent=True,
        description=f"Failure classes against λ. {spoken}.",
    )
    return Plot("Errors of the student against λ", Markup(svg))
