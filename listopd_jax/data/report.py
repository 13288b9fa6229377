"""What a data set turned out to be: counts, label histograms, the length baseline, notes for the reader."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from listopd_jax.data.labels import MAX_SCORE
from listopd_jax.data.splits import few


def summarize(
    rows: dict[str, list[dict]], read: dict[str, int], grouped: dict[str, int], max_lists: int
) -> dict:
    """The report on lists `rows` by split (dicts with reviews and scores); `read`, `grouped`: counts so far.

    Adds lists, lists_with_equal_scores (their ranking is not defined) and scores (histogram over 0..10) by
    split, length_correlation, and notes.
    """
    everything = [row for part in rows.values() for row in part]
    return {
        "read": read,
        "grouped": grouped,
        "lists": {split: len(part) for split, part in rows.items()},
        "lists_with_equal_scores": {
            s: sum(len(set(r["scores"])) == 1 for r in part) for s, part in rows.items()
        },
        "scores": {split: _histogram(part) for split, part in rows.items()},
        "length_correlation": length_correlation([(row["reviews"], row["scores"]) for row in everything]),
        "notes": _notes(rows, read, max_lists),
    }


def length_correlation(lists: Sequence[tuple[Sequence[str], Sequence[int]]]) -> float:
    """Mean over lists of the Pearson correlation of words with score: what length alone explains.

    Lists where either does not vary are left out; 0 if none is left.
    """
    values = []
    for reviews, scores in lists:
        words = [text.count(" ") + 1 for text in reviews]
        if len(set(words)) > 1 and len(set(scores)) > 1:
            values.append(np.corrcoef(words, scores)[0, 1])
    return float(np.mean(values)) if values else 0.0


def _histogram(rows: list[dict]) -> list[int]:
    counts = Counter(score for row in rows for score in row["scores"])
    return [counts[score] for score in range(MAX_SCORE + 1)]


def _notes(rows: dict[str, list[dict]], read: dict[str, int], max_lists: int) -> list[str]:
    notes = few(rows, "lists")
    if read.get("products_without_title"):
        notes.append(
            f"{read['products_without_title']} products have no title, only an id; data.meta_path gives some"
        )
    labels = {score for part in rows.values() for row in part for score in row["scores"]}
    if len(labels) == 1:
        notes.append(
            f"every label is {labels.pop()}: nothing to rank by; has this file the votes, or are they elsewhere?"
        )
    total = sum(map(len, rows.values()))
    if total < max_lists:
        notes.append(f"data.max_lists={max_lists}, but the reviews give only {total} lists")
    return notes
