"""The report's figures: numbers in, SVG text out, the same bytes for the same numbers.

Colours are written as CSS variables with the light colour as fallback, so that an SVG inlined in a page
follows its dark mode (`DARK` gives the counterparts) and still reads alone. Text stays text, in the page's
font.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

INK, MUTED, GRID, PAPER = "#1b232c", "#5a6672", "#e2e6ea", "#ffffff"
BLUE, GREEN, ORANGE, AMBER, PURPLE, SLATE, CALM = (
    "#0068ab", "#007a5e", "#c85200", "#dc9a00", "#b0569a", "#3d454f", "#bccad8"
)  # fmt: skip
_RAMP_SIZE = 32


def _ramp(start: float, end: float) -> list[str]:
    shades = matplotlib.colormaps["viridis"]
    return [to_hex(shades(start + (end - start) * i / (_RAMP_SIZE - 1))) for i in range(_RAMP_SIZE)]


_RAMP = _ramp(0.85, 0.0)  # on white paper a larger λ is darker, on dark paper brighter
DARK = {
    INK: "#e7eaed",
    MUTED: "#a3adb8",
    GRID: "#2d343c",
    PAPER: "#14181d",
    BLUE: "#5cb0ec",
    GREEN: "#3fc19c",
    ORANGE: "#f58a42",
    AMBER: "#f0b93a",
    PURPLE: "#d98cc5",
    SLATE: "#cdd3da",
    CALM: "#44525f",
} | dict(zip(_RAMP, _ramp(0.3, 1.0), strict=True))

FAILURE_COLOURS = {
    "ok": CALM,
    "no_json": SLATE,
    "truncated_k_minus_1": ORANGE,
    "wrong_length": AMBER,
    "duplicate_id": BLUE,
    "unknown_id": PURPLE,
    "bad_score": GREEN,
}

_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a `$` in a name is a `$`
    "font.size": 9.5,
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.4,
    "legend.borderaxespad": 0.2,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
_PERCENT = PercentFormatter(1.0, decimals=0, symbol=" %")


class Point(NamedTuple):
    """One evaluated policy: its λ, the value of a metric and its 95 % interval (None: unknown)."""

    lam: float
    value: float
    interval: Sequence[float] | None = None


@dataclass(frozen=True)
class Series:
    """One metric over λ; several points at a λ are seeds."""

    name: str
    points: Sequence[Point]
    colour: str
    marker: str = "o"


@dataclass(frozen=True)
class Level:
    """A value that does not depend on λ, drawn as a horizontal line with its interval as a band."""

    name: str
    value: float
    colour: str
    dash: str
    interval: Sequence[float] | None = None


@dataclass(frozen=True)
class Curve:
    """One run, or the mean of several, over training steps."""

    name: str
    colour: str
    steps: Sequence[float]
    values: Sequence[float]
    best: int | None = None  # index of a point to mark
    crosses: Sequence[float] = ()  # steps to mark
    stairs: bool = False  # the value holds until the next step


def lambda_colours(count: int) -> list[str]:
    """`count` colours in the order of λ, apart from each other in lightness as well as in hue."""
    if count == 1:
        return [BLUE]
    return [_RAMP[round(i * (_RAMP_SIZE - 1) / (count - 1))] for i in range(count)]


def versus_lambda(
    series: Sequence[Series],
    levels: Sequence[Level] = (),
    *,
    ylabel: str,
    description: str,
    in_percent: bool = False,
    broken: tuple[float, float] | None = None,
) -> str:
    """Metrics in 0..1 against λ: one dot per seed with its interval, lines through the means, `broken` shaded."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(340, 256)
        for one in series:
            _draw_series(axes, one)
        for level in levels:
            _draw_level(axes, level)
        if broken is not None:
            axes.axvspan(*broken, color=GRID, linewidth=0, zorder=0.5, label="contract breaks")
        # A little beyond 0 and 1: dots are often at both ends.
        axes.set(xlabel="λ (1 = plain on-policy distillation)", ylabel=ylabel, ylim=(-0.03, 1.03))
        lams = {point.lam for one in series for point in one.points}
        if len(lams) == 1:
            axes.set_xticks(list(lams))
        if in_percent:
            axes.yaxis.set_major_formatter(_PERCENT)
        figure.legend(loc="outside upper left", ncols=2)
        return _svg(figure, description)


def failure_bars(
    rows: Sequence[tuple[str, Mapping[str, float]]], names: Mapping[str, str], *, description: str
) -> str:
    """One bar per policy, from top to bottom, split by the share of its answers in each failure class.

    Args:
      rows: (name of the policy, share of its answers by class) each.
      names: class -> its name in the legend; bars are stacked in this order.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(340, 92 + 21 * len(rows))
        starts = [0.0] * len(rows)
        for failure, name in names.items():
            shares = [share.get(failure, 0.0) for _, share in rows]
            colour = FAILURE_COLOURS.get(failure, MUTED)
            axes.barh(
                range(len(rows)),
                shares,
                0.74,
                starts,
                color=colour,
                edgecolor=PAPER,
                linewidth=0.6,
                label=name,
            )
            starts = [start + share for start, share in zip(starts, shares, strict=True)]
        axes.set(xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6), xlabel="share of answers")
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.xaxis.set_major_formatter(_PERCENT)
        axes.grid(False, axis="y")
        axes.spines["left"].set_visible(False)
        figure.legend(loc="outside upper left", ncols=3, handlelength=0.9)
        return _svg(figure, description)


def training_curves(
    curves: Sequence[Curve], *, ylabel: str, description: str, limits: tuple[float, float] | None = None
) -> str:
    """One metric over training steps, one line per curve; the legend is the page's."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(280, 176)
        width = 1.4 if len(curves) <= 8 else 1.0
        for curve in curves:
            marker = "o" if len(curve.steps) == 1 else None
            axes.plot(
                curve.steps, curve.values, color=curve.colour, linewidth=width, marker=marker, markersize=4,
                drawstyle="steps-post" if curve.stairs else "default",
            )  # fmt: skip
            _mark_steps(axes, curve)
        axes.set(xlabel="step", ylabel=ylabel)
        if limits is not None:
            axes.set_ylim(*limits)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        return _svg(figure, description)


def _mark_steps(axes: Axes, curve: Curve) -> None:
    """A dot at the best point, a cross at each marked step."""
    if curve.best is not None:
        at = curve.steps[curve.best], curve.values[curve.best]
        axes.plot(*at, "o", color=curve.colour, markersize=6, markeredgecolor=PAPER, markeredgewidth=0.8)
    for step in curve.crosses:
        nearest = min(range(len(curve.steps)), key=lambda i: abs(curve.steps[i] - step))
        axes.plot(step, curve.values[nearest], "x", color=curve.colour, markersize=7, markeredgewidth=1.6)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of `width` × `height` points, as narrow as a phone so that its text reads there."""
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained", facecolor="none")
    return figure, figure.add_subplot(facecolor="none")


def _draw_level(axes: Axes, level: Level) -> None:
    axes.axhline(
        level.value, color=level.colour, linestyle=level.dash, linewidth=1.3, zorder=1.6, label=level.name
    )
    if level.interval is not None:
        axes.axhspan(*level.interval, color=level.colour, alpha=0.1, linewidth=0, zorder=1)


def _draw_series(axes: Axes, series: Series) -> None:
    points = sorted(series.points)
    lams = sorted({point.lam for point in points})
    seeds = {lam: [p for p in points if p.lam == lam] for lam in lams}
    means = [sum(p.value for p in seeds[lam]) / len(seeds[lam]) for lam in lams]
    # Seeds of one λ side by side, or their intervals would cover each other.
    apart = 0.006 * (lams[-1] - lams[0]) if lams else 0.0
    alone = len(points) == len(lams)
    for lam, group in seeds.items():
        for i, point in enumerate(group):
            _draw_point(axes, point, lam + apart * (i - (len(group) - 1) / 2), series, alone)
    axes.plot(
        lams, means, color=series.colour, marker=series.marker if len(lams) == 1 else None, label=series.name
    )


def _draw_point(axes: Axes, point: Point, x: float, series: Series, alone: bool) -> None:
    if point.interval is not None:
        axes.vlines(x, *point.interval, color=series.colour, linewidth=1.2 if alone else 0.6, alpha=0.6)
    size = 5.5 if alone else 3
    axes.plot(
        x,
        point.value,
        series.marker,
        color=series.colour,
        markersize=size,
        markeredgecolor=PAPER,
        markeredgewidth=0.6,
    )


def _svg(figure: Figure, description: str) -> str:
    """The figure as an <svg> element for HTML: described, unsized, no links, no repeated ids."""
    buffer = io.StringIO()
    # Else the file would have a date in it, and differ each time.
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Ids are hashes: the salt makes them the same each time, and keeps those of two figures on a page apart.
    with matplotlib.rc_context({"svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", metadata=empty)
    return _inline(buffer.getvalue(), description)


def _inline(document: str, description: str) -> str:
    body = document[document.index("<svg") :]
    root, content = body.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', root)[0]
    content = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", content, flags=re.DOTALL)
    # Only ids that something refers to; the rest would repeat from figure to figure.
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', content))
    content = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", content)
    content = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", content)
    content = re.sub("|".join(DARK), lambda m: css_colour(m[0]), content)
    content = re.sub(r"\n\s*", "\n", content)
    opening = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg" {view_box}'
    return f'{opening} role="img" aria-label="{_attribute(description)}" stroke-linejoin="round">{content}'


def css_colour(light: str) -> str:
    """The CSS value of a colour of this module: a variable that dark mode redefines."""
    return f"var(--c{light[1:]}, {light})"


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
