"""The contract as an automaton over tokens: which tokens may come next, and which of them only choose a score.

It accepts one JSON list of K objects, each a `review_id` and then a `score`: every id of the input once, in any order,
scores whole and from 0 to 10, JSON's white space between the parts, and then the end. All of that holds the contract
(task/contract.py), which allows more: other fields, prose around the list, other numbers.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from listopd_jax.errors import UserError
from listopd_jax.task.prompt import review_ids

DEAD, START = 0, 1  # states: after a token that does not fit, for good; nothing written yet
MOST_REVIEWS = 10  # the used ids are part of the state, so there are 2^K times as many states as places
SCORES = tuple(map(str, range(11)))
_SPACE = " \t\n\r"

# The parts of an answer in order. ID, SCORE and NEXT (`,` or `]`) are one of several texts each.
_PARTS = ("[", "{", '"review_id"', ":", "ID", ",", '"score"', ":", "SCORE", "}", "NEXT", "END", "DONE")
_OBJECT, _ID, _SCORE, _NEXT, _END, _DONE = map(_PARTS.index, ("{", "ID", "SCORE", "NEXT", "END", "DONE"))

_Place = tuple[frozenset[str], int, str]  # the ids that are used, the current part, what is written of it


class Automaton(NamedTuple):
    """Tables over S states and C columns, the kinds of tokens; column 0 is of tokens that never fit."""

    step: Int[np.ndarray, "S C"]  # the next state
    column: Int[np.ndarray, " V"]  # of each token
    content: Bool[np.ndarray, "S C"]  # whether the token only chooses a score there


def contract_automaton(pieces: Sequence[str], ends: Collection[int], k: int) -> Automaton:
    """The automaton of lists of `k` reviews, over tokens that read `pieces`; the ids `ends` close an answer.

    UserError for more than MOST_REVIEWS reviews.
    """
    if k > MOST_REVIEWS:
        raise UserError(
            f"task.k={k}: the contract's automaton is of lists of at most {MOST_REVIEWS} reviews; lower it, or set "
            "opd.guard.scope='all', mask=False and structure=-1, and constrain to 'schema' instead of 'contract'"
        )
    alphabet = {*_SPACE, *"".join(_PARTS), *"".join(review_ids(k)), *"".join(SCORES), "]"}
    walk = functools.partial(_walk, _reader(review_ids(k)))
    somewhere = _some_places(review_ids(k))
    texts = sorted({x for i, x in enumerate(pieces) if x and i not in ends and alphabet.issuperset(x)})
    # Dropped before `_explore`, which tries every text in every state.
    texts = [x for x in texts if any(walk(place, x) for place in somewhere)]
    # Column 0: "\0" is in no answer, so it leads to DEAD everywhere. The last column: "" is the end.
    places, step = _explore(walk, ["\0", *texts, ""])
    column = {text: i for i, text in enumerate(texts, 1)}
    columns = [len(texts) + 1 if i in ends else column.get(x, 0) for i, x in enumerate(pieces)]
    digits = np.array([text.strip(_SPACE).isdigit() for text in ["", *texts, ""]])
    scoring = np.array([place is not None and place[1] == _SCORE for place in places])
    return Automaton(step, np.array(columns, np.int32), scoring[:, None] & digits & (step != DEAD))


def _some_places(ids: Sequence[str]) -> list[_Place]:
    """Every place inside each part, with no id, all or all but the last used: what fits nowhere there fits nowhere."""
    used = [frozenset(), frozenset(ids[:-1]), frozenset(ids)]
    starts = [(names, part, "") for names in used for part in range(_DONE)]
    inside = [
        (*start[:2], text[:n])
        for start in starts
        for text in _choices(*start[:2], ids)
        for n in range(len(text))
    ]
    return list(dict.fromkeys(inside)) + [(used[0], _SCORE, text) for text in SCORES]


def _explore(walk: Callable, texts: Sequence[str]) -> tuple[list[_Place | None], Int[np.ndarray, "S C"]]:
    """Every place that can be reached by whole `texts`, numbered as states, and where each text leads."""
    places: list[_Place | None] = [None, (frozenset(), 0, "")]
    number, rows = {place: i for i, place in enumerate(places)}, []
    for place in places:  # grows while it is read
        row = []
        for after in (walk(place, text) for text in texts):
            if after not in number:
                number[after] = len(places)
                places.append(after)
            row.append(number[after])
        rows.append(row)
    return places, np.array(rows, np.int32)


def _walk(read: Callable, place: _Place | None, text: str) -> _Place | None:
    """The place after `text`, "" being the end of the answer; None if it does not fit."""
    if place is None or not text:
        return (frozenset(), _DONE, "") if place is not None and place[1] == _END else None
    for character in text:
        place = read(place, character)
        if place is None:
            break
    return place


def _reader(ids: Sequence[str]) -> Callable[[_Place, str], _Place | None]:
    """The function that reads one character of a list of `ids`."""

    @functools.cache
    def read(place: _Place, character: str) -> _Place | None:
        used, part, written = place
        if character in _SPACE and not written:
            return place if part < _END else None
        is_score = written in SCORES and part == _SCORE
        if is_score and (character in _SPACE or character == "}"):
            after = (used, part + 1, "")
            return after if character in _SPACE else read(after, character)
        written += character
        fits = [text for text in _choices(used, part, ids) if text.startswith(written)]
        if not fits:
            return None
        if written not in fits or part == _SCORE:  # a score ends with what follows it
            return used, part, written
        return _after(used, part, written)

    return read


def _choices(used: frozenset[str], part: int, ids: Sequence[str]) -> Sequence[str]:
    """The texts that `part` may be."""
    if part == _ID:
        return [f'"{name}"' for name in ids if name not in used]
    if part == _NEXT:
        return "]" if len(used) == len(ids) else ","
    return SCORES if part == _SCORE else _PARTS[part : part + 1] if part < _END else ()


def _after(used: frozenset[str], part: int, written: str) -> _Place:
    """The place after a whole part."""
    if part == _ID:
        used |= {written.strip('"')}
    if part == _NEXT and written == ",":
        return used, _OBJECT, ""
    return used, part + 1, ""
