"""The parts that a page of the report is made of; report.html.jinja gives them their looks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup


class Cell(NamedTuple):
    """A table cell: the value and, smaller beneath it, its interval or spread."""

    text: str
    small: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under a head (none: names and their values), the first column words.

    `best` is the row to emphasise.
    """

    caption: str
    head: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    best: int | None = None
    collapsed: bool = False


@dataclass(frozen=True)
class Plot:
    """A figure under a title that says what to see."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class Example:
    """One decoded answer, its texts cut to a length that can be read."""

    policy: str
    failure: str
    ok: bool
    key: str
    output: str
    prompt: str
    scores: Table | None


class Listing(NamedTuple):
    """Preformatted text that folds away."""

    title: str
    text: str
    is_open: bool = False


class StripCell(NamedTuple):
    """A token of a strip: its λ_flip's band, two shares of 1 drawn as bars, and all of it in words."""

    text: str
    band: int
    p: float
    b: float
    said: str


class Strip(NamedTuple):
    """Tokens in a row, the names of their bands in order, and name -> CSS colour of their two bars."""

    cells: Sequence[StripCell]
    bands: Sequence[str]
    bars: dict[str, str]


@dataclass(frozen=True)
class Section:
    """One section of the page, its parts in the order in which they appear."""

    anchor: str
    title: str
    lead: str = ""
    points: Sequence[str] = ()
    legend: Sequence[tuple[str, str]] = ()  # (name, CSS colour)
    plots: Sequence[Plot] = ()
    strip: Strip | None = None
    layout: str = "pair"  # "pair" of plots, "many" small multiples, or plot "beside" table
    tables: Sequence[Table] = ()
    examples: Sequence[Example] = ()
    listings: Sequence[Listing] = ()
