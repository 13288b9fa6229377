"""The common part of tasks that score lists of texts: the contract of EC (arXiv:2605.08737) and ranking metrics."""

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from listopd_jax.data.reviews import first_words
from listopd_jax.task.contract import (
    FAILURES,
    Parsed,
    list_values,
    repair_permutation,
    strict_parse,
    token_classes,
)
from listopd_jax.task.corruptions import json_corruptions
from listopd_jax.task.metrics import METRICS, list_metrics
from listopd_jax.task.prompt import ListExample, render_answer, review_ids
from listopd_jax.task.protocol import Task


class Listwise(Task):
    """Records are `ListExample`s; the value of an answer is the tuple of its scores in the order of the texts."""

    noun = "review"
    best = 10  # the highest score that is asked for
    failures = FAILURES
    metrics = METRICS
    useful = "parse · NDCG@1"

    def __init__(self, data: Any, options: Any):
        super().__init__(data, options)
        self.settings = {"gain": options.ndcg_gain}
        # The first two are failures of EC's SFT models (EC §5)
        self.corruptions = {"truncate": self._truncated, "duplicate_id": self._duplicated}
        self.corruptions |= json_corruptions(self.answer)

    @property
    def _field(self) -> str:
        """The key under which an answer names an id."""
        return f"{self.noun}_id"

    def answer(self, record: ListExample) -> str:
        """The list with the labels as scores."""
        return self._render(record.scores)

    def parse(self, text: str, record: ListExample) -> Parsed:
        """EC's strict parse."""
        return strict_parse(text, review_ids(len(record.scores)), self._field)

    def schema(self, record: ListExample) -> dict[str, Any]:
        """K objects, each with an id of the list and a whole score; no schema can say that no id appears twice."""
        return list_schema(len(record.scores), self._field, self.best)

    def repair(self, text: str, record: ListExample) -> Parsed:
        """EC's permutation repair."""
        return repair_permutation(text, review_ids(len(record.scores)), self._field)

    def score(self, parsed: Parsed, record: ListExample) -> dict[str, float]:
        """Ranking metrics of the scores against the labels."""
        return list_metrics(parsed, record.scores, self.settings["gain"])

    def shown(self, parsed: Parsed, record: ListExample) -> dict[str, Any]:
        """Labels, and the scores of an answer that parses."""
        scores = list(parsed.value) if parsed.ok else None
        return {"true_scores": list(map(float, record.scores)), "scores": scores}

    def token_classes(self, pieces: Sequence[str]) -> list[int]:
        """Everything but score digits and stray text is structure."""
        return token_classes(pieces, values=list_values(self._field))

    def shortened(self, record: ListExample) -> Iterator[tuple[Callable[[int], ListExample], int]]:
        """By words of each text; where one word is too long, by characters, the title too."""
        yield functools.partial(_by_words, record), max(r.count(" ") + 1 for r in record.reviews)
        yield functools.partial(_by_characters, record), max(map(len, (record.title, *record.reviews)))

    def hint(self, records: Sequence[ListExample]) -> str:
        """An answer that knows nothing of any list."""
        return self._render([7] * len(records[0].scores))

    def _render(self, scores: Sequence[int]) -> str:
        return render_answer(scores, self._field)

    def _truncated(self, record: ListExample, rng: random.Random) -> str:
        """A well-formed list of K−1 objects."""
        return self._render(record.scores[:-1])

    def _duplicated(self, record: ListExample, rng: random.Random) -> str:
        """The right list, but its last object repeats the id before it."""
        before, last = review_ids(len(record.scores))[-2:]
        return self.answer(record).replace(f'"{last}"', f'"{before}"')


def deal_lists(
    name: str,
    query: str,
    judged: Mapping[Any, int],
    others: Sequence[Any],
    texts: Mapping[Any, str],
    k: int,
    seed: int,
) -> Iterator[ListExample]:
    """Lists of `k` texts of the query called `name`: its relevant ones dealt out, at most k/2 per list, and others.

    `judged` has the labels of the relevant ones, `others` at least k − 1 that have label 0; places are random.
    """
    rng = random.Random(f"{seed} {name}")
    # Sorted first, so that the order of the judgements file does not matter.
    relevant = rng.sample(sorted(judged), len(judged))
    for start in range(0, len(relevant), k // 2):
        part = relevant[start : start + k // 2]
        chosen = part + rng.sample(others, k - len(part))
        rng.shuffle(chosen)
        scores = tuple(judged.get(i, 0) for i in chosen)
        key = f"q{name}.{start // (k // 2) + 1}"
        yield ListExample(key, name, query, tuple(texts[i] for i in chosen), scores)


def list_schema(k: int, field: str, best: int) -> dict[str, Any]:
    """The JSON Schema of a list of `k` scores from 0 to `best`, each with an id under `field`."""
    score = {"type": "integer", "minimum": 0, "maximum": best}
    item = {
        "type": "object",
        "properties": {field: {"enum": list(review_ids(k))}, "score": score},
        "required": [field, "score"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": item, "minItems": k, "maxItems": k}


def _by_words(record: ListExample, count: int) -> ListExample:
    return dataclasses.replace(record, reviews=tuple(first_words(r, count) for r in record.reviews))


def _by_characters(record: ListExample, count: int) -> ListExample:
    reviews = tuple(r[:count] for r in record.reviews)
    return dataclasses.replace(record, title=record.title[:count], reviews=reviews)
