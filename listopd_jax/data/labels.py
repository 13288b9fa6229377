"""Labels 0–10 of reviews: from helpful votes by a fixed rule, or from a file, so that any rubric will do."""

import json
import math
import os

from listopd_jax.data.reviews import Review
from listopd_jax.data.streams import read_lines
from listopd_jax.errors import UserError

MAX_SCORE = 10


def score_from_votes(votes: int, cap: int) -> int:
    """Helpful votes → 0–10: round(10 · log(1+min(votes, cap)) / log(1+cap)).

    Logarithmic because votes are heavy-tailed: with cap 50, 0/1/2/3/5/10/20/50 votes score 0/2/3/4/5/6/8/10.
    """
    return round(MAX_SCORE * math.log1p(min(votes, cap)) / math.log1p(cap))


def votes_from_score(score: float, cap: int) -> int:
    """Votes whose score is about `score`: the inverse of `score_from_votes`, for synthetic data."""
    return max(0, round(math.expm1(score / MAX_SCORE * math.log1p(cap))))


class LabelFile:
    """Scores of reviews from a file: `label_file(review)` is the score, or None for a review without one.

    It remembers which keys it met, to detect a file made for other reviews.
    """

    def __init__(self, path: str | os.PathLike):
        self._path, self._scores, self._met = path, read_labels(path), set()

    def __call__(self, review: Review) -> int | None:
        key = review.key
        if key in self._scores:
            self._met.add(key)
        return self._scores.get(key)

    def notes(self) -> list[str]:
        """Notes on the scores: whether they look like those of a smaller scale."""
        lowest, highest = min(self._scores.values()), max(self._scores.values())
        if highest > MAX_SCORE / 2:
            return []
        return [
            f"{self._path}: scores only from {lowest} to {highest} where the scale is 0-{MAX_SCORE}; scale them up if "
            "the rubric was another"
        ]

    def check(self, max_unmet: float) -> None:
        """Raise UserError if more than the share `max_unmet` of the keys, or all, named no review so far."""
        unmet = [key for key in self._scores if key not in self._met]
        if not self._met or len(unmet) > max_unmet * len(self._scores):
            raise UserError(
                f"{self._path}: {len(unmet)} of {len(self._scores)} keys, e.g. {unmet[0]}, name no review "
                f"of this data, above data.max_broken={max_unmet}; data/reviews.py says what a key is"
            )


def read_labels(path: str | os.PathLike) -> dict[str, int]:
    """Read a labels file: JSON lines `{"key": <Review.key>, "score": <0..10>}`; other fields are ignored.

    A score may be fractional (a rubric's mean): it is rounded to the nearest integer, halves to even.

    Raises:
      UserError: naming file and line, for a line that is not such an object, a score outside 0–10, a key with
        two scores; or if the scores are fractions of 1.
    """
    labels: dict[str, int | float] = {}
    for number, line in enumerate(read_lines(path), 1):
        if line.isspace():
            continue
        key, score = _label(line, f"{path}:{number}")
        if round(labels.setdefault(key, score)) != round(score):
            raise UserError(f"{path}:{number}: key {key} has two scores, {labels[key]} and {score}; keep one")
    if not labels:
        raise UserError(
            f'{path}: has no labels; give lines like {{"key": "0f3a…", "score": 7}} or no data.labels'
        )
    if max(labels.values()) <= 1 and any(score != int(score) for score in labels.values()):
        raise UserError(
            f"{path}: every score is between 0 and 1, so rounding would leave 0 and 1 alone; the scale is "
            f"0-{MAX_SCORE}, multiply them by {MAX_SCORE}"
        )
    return {key: round(score) for key, score in labels.items()}


def _label(line: bytes, where: str) -> tuple[str, int | float]:
    try:
        row = json.loads(line)
        key, score = row["key"], row["score"]
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise UserError(f'{where}: not a JSON object with "key" and "score"') from e
    if not isinstance(key, str):
        raise UserError(f'{where}: "key" is {type(key).__name__}, not a string')
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= MAX_SCORE:
        raise UserError(f'{where}: "score" is {score!r}, not a number from 0 to {MAX_SCORE}')
    return key, score
