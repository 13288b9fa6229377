"""The report's training curves: small multiples over steps, one line per λ or stage."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from listopd_jax.metrics_log import binned
from listopd_jax.records import is_number
from listopd_jax.report import plots
from listopd_jax.report.findings import STAGES, place
from listopd_jax.report.inputs import Inputs, logged_place
from listopd_jax.report.page import Cell, Plot, Section, Table
from listopd_jax.report.wording import fact

MAX_POINTS = 60  # longer curves are averaged in this many bins


class Panel(NamedTuple):
    """One small multiple."""

    metric: str
    title: str
    ylabel: str
    limits: tuple[float, float] | None = None


class Group(NamedTuple):
    """The rows of metrics.jsonl behind one line: the runs of one stage or λ."""

    name: str
    colour: str
    rows: Sequence[Mapping[str, Any]]


OPD_PANELS = (
    Panel("parse", "Strict parse of the samples", "share of answers", (-0.03, 1.03)),
    Panel("loss", "OPD loss", "loss"),
    Panel("reverse_kl", "Reverse KL to the teacher", "nats per token"),
    Panel("advantage_structural", "Advantage, structural tokens", "nats per token"),
    Panel("advantage_content", "Advantage, content tokens", "nats per token"),
    Panel("completion_length", "Completion length", "tokens"),
    Panel("entropy", "Entropy of the student", "nats per token"),
    Panel("grad_norm", "Gradient norm", "L2 norm"),
    Panel("clip_fraction", "Clipped importance ratios", "share of tokens"),
)
SFT_PANELS = (
    Panel("loss", "SFT loss", "nats per token"),
    Panel("accuracy", "Token accuracy", "share of answer tokens", (-0.03, 1.03)),
    Panel("entropy", "Entropy", "nats per token"),
    Panel("grad_norm", "Gradient norm", "L2 norm"),
)
SFT_COLOURS = {"sft_teacher": plots.ORANGE, "sft_student": plots.MUTED}


def sft_section(inputs: Inputs) -> Section | None:
    """Training curves of the two supervised stages; None before there are any."""
    rows = {stage: [r for r in inputs.metrics if r.get("stage") == stage] for stage in SFT_COLOURS}
    groups = [Group(STAGES[stage], SFT_COLOURS[stage], some) for stage, some in rows.items() if some]
    return _section("sft", "Supervised fine-tuning", groups, SFT_PANELS)


def opd_section(inputs: Inputs) -> Section | None:
    """Training curves of distillation, one line per λ and guard; None before there are any."""
    rows = defaultdict(list)
    for row in inputs.metrics:
        if (run := logged_place(row)) is not None:
            rows[run].append(row)
    groups = [Group(place(*run), inputs.colours[run], rows[run]) for run in sorted(rows)]
    return _section("opd", "Distillation, step by step", groups, OPD_PANELS)


def _section(anchor: str, title: str, groups: Sequence[Group], panels: Sequence[Panel]) -> Section | None:
    if not groups:
        return None
    shown = [plot for panel in panels if (plot := _plot(panel, groups)) is not None]
    legend = [(group.name, plots.css_colour(group.colour)) for group in groups]
    tables = [_speed_table(groups)]
    return Section(
        anchor, title, _lead(groups), legend=legend, plots=shown, layout="many", tables=tables
    )  # fmt: skip


def _lead(groups: Sequence[Group]) -> str:
    """What was done to the numbers before they were drawn, and where they were not finite."""
    rows = [row for group in groups for row in group.rows]
    text = ""
    if any(_runs(group) > 1 for group in groups):
        text += "Lines are means over seeds. "
    if max(row["step"] for row in rows) > MAX_POINTS:
        text += f"Long runs are averaged in at most {MAX_POINTS} bins of steps. "
    lost = sorted({name for row in rows for name in _not_finite(row)})
    if lost:
        count = sum(bool(_not_finite(row)) for row in rows)
        text += f"Not finite at {count} of {len(rows)} steps, and left out there: {', '.join(lost)}."
    return text.strip()


def _runs(group: Group) -> int:
    return len({row["run"] for row in group.rows})


def _not_finite(row: Mapping[str, Any]) -> list[str]:
    """Metrics that MetricsLog wrote as null; the identity of a run may be null too."""
    return [name for name, value in row.items() if value is None and name not in ("lambda", "seed")]


def _plot(panel: Panel, groups: Sequence[Group]) -> Plot | None:
    """The panel, None if no group has its metric."""
    drawn = [plots.Curve(g.name, g.colour, *_mean_curve(g.rows, panel.metric)) for g in groups]
    curves = [curve for curve in drawn if curve.steps]
    if not curves:
        return None
    ends = "; ".join(f"{c.name}: from {c.values[0]:.3g} to {c.values[-1]:.3g}" for c in curves)
    description = f"{panel.title} over training steps. {ends}."
    svg = plots.training_curves(curves, ylabel=panel.ylabel, limits=panel.limits, description=description)
    return Plot(panel.title, Markup(svg))


def _mean_curve(rows: Iterable[Mapping[str, Any]], metric: str) -> tuple[list[float], list[float]]:
    """Steps and means of `metric` over the runs, in at most MAX_POINTS bins of neighbouring steps."""
    values = defaultdict(list)
    for row in rows:
        if is_number(row.get(metric)):
            values[row["step"]].append(row[metric])
    points = [(step, statistics.fmean(values[step])) for step in sorted(values)]
    bins = binned(points, MAX_POINTS)
    return [step for step, _ in bins], [mean for _, mean in bins]


def _speed_table(groups: Sequence[Group]) -> Table:
    rows = []
    for group in groups:
        speeds = [r["tokens_per_second"] for r in group.rows if is_number(r.get("tokens_per_second"))]
        speed = fact(round(statistics.median(speeds))) if speeds else "–"
        last = max(row["step"] for row in group.rows)
        rows.append((Cell(group.name), Cell(fact(_runs(group))), Cell(fact(last)), Cell(speed)))
    head = ("run", "runs", "steps", "tokens/s")
    return Table("Runs, steps and median speed", head, rows, collapsed=len(rows) > 8)
