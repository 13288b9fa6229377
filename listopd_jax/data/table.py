"""All reviews as a table of hashes, 27 bytes per row, and the texts of chosen rows from a second reading.

Lists are planned on the table (`groups.py`), so that no more texts are ever held than the chosen lists
contain, however large the file is.
"""

import array
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Bool, UInt8, UInt64

from listopd_jax.data.reviews import Review, first_words, hash64
from listopd_jax.errors import UserError

LINK_WORDS = 5
"""A shorter text ("Love it!") that one user posts on two products does not make them variants of one."""


@dataclasses.dataclass(frozen=True)
class ReviewTable:
    """One row a labelled review, in file order."""

    product: UInt64[np.ndarray, " rows"]
    copy: UInt64[np.ndarray, " rows"]  # hash of (user, text): equal in two rows if one is a copy of the other
    text: UInt64[np.ndarray, " rows"]
    score: UInt8[np.ndarray, " rows"]
    links: Bool[np.ndarray, " rows"]  # long enough that a copy on another product links the two products
    held_out: Bool[np.ndarray, " rows"]  # of the category that is held out, if one is


def scan(
    reviews: Iterable[Review],
    score: Callable[[Review], int | None],
    max_words: int,
    tally: Counter,
    held_out: Callable[[Review], bool] = lambda review: False,
) -> ReviewTable:
    """First reading: hashes and scores of all reviews that `score` gives one; others count as `unlabelled`.

    Texts are compared as they will be shown, i.e. cut to `max_words` words (0: uncut).
    """
    # They grow like lists, but a hash takes 8 bytes instead of an object's 36.
    product, copy, text = array.array("Q"), array.array("Q"), array.array("Q")
    scores, links, sides = array.array("B"), array.array("B"), array.array("B")
    for review in reviews:
        value = score(review)
        if value is None:
            tally["unlabelled"] += 1
            continue
        shown = first_words(review.text, max_words)
        product.append(hash64(review.product))
        copy.append(hash64(review.user, shown))
        text.append(hash64(shown))
        scores.append(value)
        links.append(shown.count(" ") + 1 >= LINK_WORDS)
        sides.append(held_out(review))
    columns = (np.frombuffer(c, np.uint64) for c in (product, copy, text))
    flags = (np.frombuffer(c, np.bool_) for c in (links, sides))
    return ReviewTable(*columns, np.frombuffer(scores, np.uint8), *flags)


def fetch(
    reviews: Iterable[Review], score: Callable[[Review], int | None], table: ReviewTable, rows: Iterable[int]
) -> dict[int, Review]:
    """Second reading: the reviews at `rows` of the table made from the same file with the same `score`.

    Raises UserError if a row now holds another product: the file has changed in between.
    """
    wanted, found, row = set(rows), {}, 0
    for review in reviews:
        if score(review) is None:
            continue
        if row in wanted:
            if row >= len(table.product) or hash64(review.product) != int(table.product[row]):
                raise UserError("the review file changed while it was read; run again when it is complete")
            found[row] = review
        row += 1
    if row != len(table.product):
        raise UserError("the review file changed while it was read; run again when it is complete")
    return found
