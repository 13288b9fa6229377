"""The report's strip: one answer of the teacher token by token, with p, b and λ_flip, drawn and as a table."""

from listopd_jax.records import StripToken
from listopd_jax.report import plots
from listopd_jax.report.inputs import Inputs
from listopd_jax.report.page import Cell, Section, Strip, StripCell, Table
from listopd_jax.report.threshold_section import flip_text, probability
from listopd_jax.report.wording import fact, visible, words

BANDS = ((1.1, "up to 1.1"), (1.5, "up to 1.5"), (2.0, "up to 2"), (float("inf"), "larger, or never"))
"""Upper ends of λ_flip and their names, the first to flip first."""


def strip_section(inputs: Inputs) -> Section | None:
    """Where along one answer the target flips; None without a calibration that kept it."""
    tokens = inputs.calibration.strip if inputs.calibration else ()
    if not tokens:
        return None
    lead = (
        "The teacher’s greedy answer in which a structural token flips first. Under each token, bars: its "
        "probability for teacher (p) and base (b); its colour: the λ from which the target prefers another token."
    )
    rows = [_row(i, token) for i, token in enumerate(tokens, 1)]
    head = ("position", "token", "class", "p", "b", "λ_flip")
    table = Table("Every token", head, rows, collapsed=True)
    return Section("strip", "Along one answer", lead, strip=_strip(tokens), tables=[table])


def _strip(tokens: tuple[StripToken, ...]) -> Strip:
    colours = {"p, teacher": plots.css_colour(plots.BLUE), "b, base": plots.css_colour(plots.MUTED)}
    return Strip(
        [StripCell(_shown(t.text), band(t.flip), t.p, t.b, _spoken(i, t)) for i, t in enumerate(tokens, 1)],
        [name for _, name in BANDS],
        colours,
    )


def band(flip: float | None) -> int:
    """Index into BANDS of a λ_flip."""
    return len(BANDS) - 1 if flip is None else next(i for i, (end, _) in enumerate(BANDS) if flip <= end)


def _spoken(position: int, token: StripToken) -> str:
    return (
        f"{position}: {_shown(token.text)} ({words(token.token_class)}), p {probability(token.p)}, "
        f"b {probability(token.b)}, λ_flip {flip_text(token.flip)}"
    )


def _shown(text: str) -> str:
    """A token with its spaces and line ends as signs."""
    return visible(text.replace(" ", "␣").replace("\n", "↵"))


def _row(position: int, token: StripToken) -> tuple[Cell, ...]:
    numbers = (probability(token.p), probability(token.b), flip_text(token.flip))
    return tuple(map(Cell, (fact(position), _shown(token.text), words(token.token_class), *numbers)))
