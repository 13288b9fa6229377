"""How the report writes numbers and strange text."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unicodedata import category

from listopd_jax.records import is_number

NBSP = "\u00a0"
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format, surrogate, line and paragraph separators


def number(value: float) -> str:
    """A λ as a reader writes it: 1, 1.05."""
    return f"{value:g}"


def at(lam: float) -> str:
    """ "λ = 1.05", unbroken at line ends."""
    return f"λ{NBSP}={NBSP}{number(lam)}"


def percent(rate: float | None, digits: int = 0) -> str:
    """A rate as a percentage; near its ends with one more digit, so that nearly all is seldom shown as all."""
    if rate is None:
        return "–"
    if 0 < rate < 0.005 or 0.995 <= rate < 1:
        digits += 1
    return f"{100 * rate:.{digits}f}{NBSP}%"


def decimal(value: float | None) -> str:
    """A metric to three decimals, a huge one to three digits; "–" for none."""
    if value is None:
        return "–"
    return (f"{value:.3f}" if abs(value) < 1e6 else f"{value:.2e}").replace("-", "−")


def interval(ends: Sequence[float] | None, form: Callable[[float], str] = decimal, to: str = "–") -> str:
    """Both ends, "" for none."""
    return "" if ends is None else f"{form(ends[0])}{to}{form(ends[1])}"


def fact(value: Any) -> str:
    """Any JSON value as readable text."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, list):
        return " ".join(map(fact, value))
    if isinstance(value, int):
        return f"{value:,}" if is_number(value) else "out of range"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def words(name: str) -> str:
    """A field's name as words."""
    return name.replace("_", " ")


def capital(sentence: str) -> str:
    """`sentence` with its first letter a capital."""
    return sentence[:1].upper() + sentence[1:]


def visible(text: str) -> str:
    """`text` with nothing hidden: control, format and surrogate characters are spelt out; line ends stay."""
    return "".join(f"⟨U+{ord(c):04X}⟩" if c != "\n" and category(c) in _HIDDEN else c for c in text)


def label(text: str) -> str:
    """`text` as a label of a figure: visible, on one line, and not long."""
    text = visible(text).replace("\n", " ")
    return text if len(text) <= 24 else f"{text[:23]}…"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def cut(text: str, limit: int) -> str:
    """The start and the end of a text longer than `limit` characters, and how much is missing between."""
    if len(text) <= limit:
        return text
    start, end = text[: limit * 4 // 5], text[-(limit // 5) :]
    return f"{start}\n… {len(text) - len(start) - len(end):,} characters left out …\n{end}"
