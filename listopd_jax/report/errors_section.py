"""Which teacher errors transfer: of each failure class the teacher's share of answers, and the student's at each λ."""

from collections.abc import Sequence
from typing import Any

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
    planted, found = planted_noise(inputs, "teacher"), inputs.found
    if not planted or found.teacher is None or not found.opd:
        return None
    policies = [policy for policy in (found.teacher, found.student, *found.opd) if policy is not None]
    classes = _classes(policies)
    said = ", ".join(f"{name} in {share}" for name, share in planted)
    lead = (
        f"The teacher’s training answers have errors by design: {said}. Below, the share of its greedy answers in each "
        "failure class, that of the student before distillation, and that of the student distilled at each λ. Errors "
        "that keep the contract show in ‘useful’ alone."
    )
    return Section(
        "errors", "Which teacher errors transfer", lead, plots=[_plot(found.opd, classes)] if classes else (),
        tables=[_table(policies, classes)], layout="beside",
    )  # fmt: skip


def planted_noise(inputs: Inputs, role: str) -> list[tuple[str, str]]:
    """(corruption, share) of the SFT of `role`, as the config writes them."""
    config: Any = inputs.config.get("config")
    for name in ("sft", role, "noise"):
        config = config.get(name) if isinstance(config, dict) else None
    entries = config.split(",") if isinstance(config, str) else []
    return [
        (name.strip(), share) for name, found, share in (entry.partition(":") for entry in entries) if found
    ]


def _classes(policies: Sequence[Policy]) -> list[str]:
    """The failure classes that occur, most frequent over all policies first."""
    shares = [policy.failure_shares() for policy in policies]
    total = {name: sum(s.get(name, 0.0) for s in shares) for s in shares for name in s if name != OK}
    return sorted((name for name in total if total[name]), key=lambda name: (-total[name], name))


def _name(failure: str) -> str:
    return FAILURES.get(failure, label(failure))


def _table(policies: Sequence[Policy], classes: Sequence[str]) -> Table:
    """One row a failure class and one for what answers are worth, one column a policy."""
    shares = [policy.failure_shares() for policy in policies]
    names = [policy.name if policy.lam is None else f"λ = {number(policy.lam)}" for policy in policies]
    rows = [(Cell(_name(c)), *(Cell(percent(of.get(c, 0.0))) for of in shares)) for c in classes]
    worth = [policy.mean("useful") for policy in policies]
    rows.append((Cell("useful"), *(Cell(decimal(x)) for x in worth)))
    return Table("Share of answers, and useful", ("failure class", *names), rows)


def _plot(opd: Sequence[Policy], classes: Sequence[str]) -> Plot:
    series = [
        plots.Series(
            _name(failure),
            [plots.Point(p.lam, p.failure_shares().get(failure, 0.0)) for p in opd],
            colour,
            marker,
        )
        for failure, colour, marker in zip(classes[:MOST_CLASSES], _COLOURS, _MARKERS, strict=False)
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
