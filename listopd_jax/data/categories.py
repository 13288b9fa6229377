"""Reviews of chosen categories only: train on one and hold out another, as EC's zero-shot checks do."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from listopd_jax.data.reviews import Review
from listopd_jax.errors import UserError, unknown_name

FIELDS = ("category", "validation_category")


def of_categories(reviews: Iterable[Review], data: Any, tally: Counter) -> Iterator[Review]:
    """The reviews of `data.category` ("": of all) and of `data.validation_category`; others count as other_category.

    Raises UserError at the end if a category has no review; it names those that the file has.
    """
    seen: Counter = Counter()
    for review in reviews:
        seen[review.category] += 1
        if data.category in ("", review.category) or is_held_out(review, data):
            yield review
        else:
            tally["other_category"] += 1
    for field in FIELDS:
        if getattr(data, field) and getattr(data, field) not in seen:
            if not (known := [name for name, _ in seen.most_common() if name]):
                raise UserError(f"data.path={data.path}: no review has a category; leave data.{field} empty")
            raise unknown_name(f"data.{field}", getattr(data, field), known)


def is_held_out(review: Review, data: Any) -> bool:
    """Whether the review is of the category that is held out."""
    return data.validation_category != "" and review.category == data.validation_category
