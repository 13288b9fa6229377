"""The output contract: what counts as a valid answer, why an answer fails, and which token does what in it.

The answer is the text from the first `[` to the last `]`. It holds iff that is a JSON list of exactly K
objects, each names one distinct input id under `review_id`, and each has a finite number under `score` (the
strict parse of EC, arXiv:2605.08737). An answer with several faults gets the first class of this list, which
is the order of `FAILURES`:

  no_json              no `[…]`, or its text is not JSON
  truncated_k_minus_1  exactly K−1 items which name K−1 distinct input ids, whatever their scores (EC's FMC)
  wrong_length         any other number of items than K
  duplicate_id         K items, an input id is named twice or more
  unknown_id           K items, one names no input id: absent, not a string, invented, or no object at all
  bad_score            the K ids, but a score is absent, not a number, or not finite

Decisions where JSON readers differ:
  - A repeated key in one object is `no_json`: readers disagree on which value counts (RFC 7493 forbids it).
  - NaN and Infinity are not JSON, but the fault is a number's: anywhere in the list they make it `bad_score`.
  - A string is a number iff its whole text is a JSON number: "7", "7.5e0", but not " 7 ", "+7", "07",
    "1_000", "0x10" or "٣". Booleans are not numbers.
  - Numbers are float64: 1e400 and integers of 400 digits are infinite (`bad_score`), 1e-400 is 0.
  - Ids are compared as exact strings after JSON escapes: "\\u00721" is r1; "R1", " r1" and 1 are not.
  - Other fields and scores outside 0..10 are allowed; so is prose around `[…]` if it has no brackets.
  - Nesting deeper than the interpreter's recursion limit (about 1,000) is `no_json`.
"""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from listopd_jax.task.strict_json import unique_keys

OK = "ok"
FAILURES = (OK, "no_json", "truncated_k_minus_1", "wrong_length", "duplicate_id", "unknown_id", "bad_score")

TOKEN_CLASSES = ("bracket", "brace", "comma", "colon", "quote", "field", "id", "digit", "eos", "other")
STRUCTURAL = frozenset(TOKEN_CLASSES) - {"digit", "other"}

_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")

_BRACKET, _BRACE, _COMMA, _COLON, _QUOTE, _FIELD, _ID, _DIGIT, _EOS, _OTHER = range(len(TOKEN_CLASSES))
_PUNCTUATION = {"[": _BRACKET, "]": _BRACKET, "{": _BRACE, "}": _BRACE, ",": _COMMA, ":": _COLON}
# A token that spans several classes takes the first of these: `},{"` is a comma, `}]` a bracket.
_PRIORITY = (_BRACKET, _COMMA, _BRACE, _COLON, _QUOTE, _FIELD, _ID, _DIGIT, _OTHER)
# A string (closed, or cut off by the end of the text, even inside an escape), one mark, or a run of the rest.
_LEXEME = re.compile(r'"(?:\\.|[^"\\])*(?:(?P<close>")|\\\Z)?|[][{},:]|[^][{},:"]+', re.DOTALL)

_Record = tuple[str | None, float | None]


@dataclass(frozen=True)
class Parsed:
    """Verdict on one answer: its failure class, 'ok' for none, and the value of an answer that is 'ok'."""

    failure: str
    value: Any = None

    @property
    def ok(self) -> bool:
        """Whether the answer holds the contract."""
        return self.failure == OK


def strict_parse(text: str, ids: Sequence[str], field: str = "review_id") -> Parsed:
    """Judge the answer `text` to a list with the distinct ids `ids`, as the module's docstring says.

    `field` names the ids. The value of a valid answer is a tuple of its scores in the order of `ids`. Total: every
    string gets a verdict.
    """
    return _verdict(_records(text, field), ids)


def repair_permutation(text: str, ids: Sequence[str], field: str = "review_id") -> Parsed:
    """`strict_parse` after EC's permutation repair: a baseline next to the strict figures.

    If exactly one id is missing and exactly one is named twice, the later of the two gets the missing id.
    Any other answer is judged as it is.
    """
    records = _records(text, field)
    names = [name for name, _ in records or ()]
    missing = set(ids) - set(names)
    if len(names) == len(ids) and len(missing) == 1 and set(names) < set(ids):
        # K names of K − 1 ids: exactly one appears twice.
        later = next(i for i, name in enumerate(names) if name in names[:i])
        records[later] = (missing.pop(), records[later][1])
    return _verdict(records, ids)


def list_values(field: str = "review_id") -> dict[str, int]:
    """Key → the class of its value, in a list of scores that names its ids under `field`."""
    return {field: _ID, "score": _DIGIT}


_REVIEWS = list_values()


def token_classes(
    pieces: Sequence[str], opening: str = "[", values: Mapping[str, int] = _REVIEWS
) -> list[int]:
    """The role in the contract of each token of one completion, as indices into TOKEN_CLASSES.

    Args:
      pieces: decoded text of each token in order; exactly "" stands for the end-of-sequence token.
      opening: the brackets with which an answer may begin.
      values: key → the class of its value, where that is not 'other'.

    A token is judged by the text up to its end, so later tokens change nothing. Keys are 'field', the value
    of an id is 'id', that of `score` 'digit'; other values, blanks, text outside the answer are 'other'.
    """
    characters = _character_classes("".join(pieces), opening, values)
    ends = itertools.accumulate(map(len, pieces))
    spans = [characters[end - len(piece) : end] for piece, end in zip(pieces, ends, strict=True)]
    return [min(span, key=_PRIORITY.index) if span else _EOS for span in spans]


def plain_classes(pieces: Sequence[str]) -> list[int]:
    """`token_classes` of an answer of unknown form: all but the end is 'other'."""
    return [_OTHER if piece else _EOS for piece in pieces]


def _records(text: str, field: str) -> list[_Record] | None:
    """(id, score) of each item of the outermost list, None for an unusable one; None if there is no list."""
    start, end = text.find("["), text.rfind("]") + 1
    non_finite: list[str] = []
    try:
        items = json.loads(
            text[start:end] if start >= 0 else "",
            parse_int=float,  # int() refuses numbers of more than 4,300 digits
            # append returns None, so the value is not a number, and the list remembers that there was one.
            parse_constant=non_finite.append,
            object_pairs_hook=unique_keys,
        )
    except (ValueError, RecursionError):
        return None
    objects = [item if isinstance(item, dict) else {} for item in items]
    return [(_name(o.get(field)), None if non_finite else _number(o.get("score"))) for o in objects]


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: Any) -> float | None:
    """The finite number that a JSON value is or spells, else None."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    return value if isinstance(value, float) and math.isfinite(value) else None


def _verdict(records: list[_Record] | None, ids: Sequence[str]) -> Parsed:
    if records is None:
        return Parsed("no_json")
    real = [name for name, _ in records if name in ids]
    if len(records) == len(set(real)) == len(ids) - 1:
        return Parsed("truncated_k_minus_1")
    if len(records) != len(ids):
        return Parsed("wrong_length")
    if len(set(real)) < len(real):
        return Parsed("duplicate_id")
    if len(real) < len(records):
        return Parsed("unknown_id")
    # From here on the names are the K ids, each once.
    score = dict(records)
    if None in score.values():
        return Parsed("bad_score")
    return Parsed(OK, tuple(score[name] for name in ids))


def _character_classes(text: str, opening: str, values: Mapping[str, int]) -> list[int]:
    """The class of each character, by one pass over the lexemes from the first of `opening` on."""
    classes = [_OTHER] * len(text)
    open_brackets: list[str] = []
    key, at_key = "", False
    first = min((i for i in map(text.find, opening) if i >= 0), default=0)
    for lexeme in _LEXEME.finditer(text, first):
        word, start, end = lexeme[0], lexeme.start(), lexeme.end()
        if not open_brackets and word not in opening:
            continue
        if word in _PUNCTUATION:
            classes[start] = _PUNCTUATION[word]
            key, at_key = _after_punctuation(word, open_brackets, key)
        elif word[0] == '"':
            inside = end - 1 if lexeme["close"] else end
            if at_key:
                key = text[start + 1 : inside]
            classes[start:end] = [_FIELD if at_key else values.get(key, _OTHER)] * len(word)
            classes[start] = classes[inside if lexeme["close"] else start] = _QUOTE
        elif not at_key:
            classes[start:end] = [_OTHER if c.isspace() else values.get(key, _OTHER) for c in word]
    return classes


def _after_punctuation(mark: str, open_brackets: list[str], key: str) -> tuple[str, bool]:
    """Open or close brackets as `mark` says; return the current key, and whether a new key comes next."""
    if mark in "[{":
        open_brackets.append(mark)
    elif mark in "]}":
        open_brackets.pop()
    if mark in ":[":
        return key, False
    return "", mark in "{," and open_brackets[-1] == "{"
