"""Rank K products by how well they answer a query: Amazon's shopping queries (ESCI) as they are published.

`data.path` is shopping_queries_dataset_examples.parquet, `data.meta_path` shopping_queries_dataset_products.parquet.
The lists are of the ranking task (small_version) in English (locale us); its test queries are held out. Exact is
labelled 3, Substitute 2, Complement 1 and Irrelevant 0. NDCG has the gains of the KDD Cup 2022: 1, 0.1, 0.01 and 0.
"""

import pathlib
import random
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from listopd_jax.data.reviews import clean_text, first_words
from listopd_jax.errors import UserError, first_line
from listopd_jax.task.contract import Parsed
from listopd_jax.task.metrics import CUTOFFS, list_metrics, ndcg
from listopd_jax.task.prompt import ListExample, render_list
from listopd_jax.tasks.file_task import FileTask
from listopd_jax.tasks.listwise import Listwise

LABELS = {"I": 0, "C": 1, "S": 2, "E": 3}
GAINS = np.array([0.0, 0.01, 0.1, 1.0])  # of the labels
LOCALE = "us"

_EXAMPLES = {"query": str, "query_id": int, "product_id": str, "product_locale": str, "esci_label": str}
_EXAMPLES |= {"small_version": int, "split": str}
_PRODUCTS = {"product_id": str, "product_locale": str, "product_title": str | None}
_SIDES = {"train": "train", "test": "validation"}


class Esci(Listwise, FileTask):
    """Lists of the products judged for one query, at least two labels in each."""

    name, noun, best = "esci", "product", max(LABELS.values())
    inputs = (*FileTask.inputs, "data.meta_path")

    def __init__(self, data: Any, options: Any):
        super().__init__(data, options)
        if options.ndcg_gain != "linear":
            raise UserError(
                f"task.ndcg_gain={options.ndcg_gain}: esci has gains of its own; leave it at 'linear'"
            )
        self.settings = {"gain": "esci"}

    def read(self, path: pathlib.Path) -> list[ListExample]:
        """The lists of each query, its products dealt out at random."""
        if not self.data.meta_path:
            raise UserError("data.meta_path is empty: give shopping_queries_dataset_products.parquet")
        asked = read_examples(path)
        wanted = {product for query in asked.values() for product in query.labels}
        titles = read_titles(self.data.meta_path, wanted)
        _check_titles(asked, titles, path, self.data.meta_path)
        words, k = self.options.max_review_words, self.options.k
        texts = {product: first_words(title, words) for product, title in titles.items() if title}
        lists = [
            r for number, query in asked.items() for r in _lists(number, query, texts, k, self.data.seed)
        ]
        if not lists:
            raise UserError(
                f"{path}: no query has task.k={k} products with a title, and two labels among them; lower task.k"
            )
        return lists

    def side(self, record: ListExample) -> str:
        """Test queries are held out."""
        return _SIDES[record.key.partition(" ")[0]]

    def group(self, record: ListExample) -> str:
        """The query."""
        return record.product_id

    def prompt(self, record: ListExample) -> str:
        """The query, one line per product, and the form of the answer."""
        head = f"Query: {record.title} Below are {len(record.reviews)} products. Score each: 3 exact, 2 substitute, "
        return render_list(f"{head}1 complement, 0 irrelevant.", self.noun, record.reviews, example=3)

    def score(self, parsed: Parsed, record: ListExample) -> dict[str, float]:
        """Ranking metrics against the labels, NDCG with the gains of the labels."""
        values = list_metrics(parsed, record.scores)
        if parsed.ok:
            predicted, gains = np.asarray(parsed.value, np.float64), GAINS[list(record.scores)]
            values |= {f"ndcg@{cutoff}": ndcg(predicted, gains, cutoff) for cutoff in CUTOFFS}
            values["useful"] = values["ndcg@1"]
        return values


class Query(NamedTuple):
    """One query with the products that were judged for it: the label of each, and its row in the file."""

    text: str
    split: str
    labels: dict[str, int]
    rows: dict[str, int]


def read_examples(path: str | pathlib.Path) -> dict[int, Query]:
    """Query id → the query, of the small version in LOCALE; UserError names the row and the column that is wrong."""
    asked: dict[int, Query] = {}
    for number, row in _rows(path, _EXAMPLES):
        label, split, product = row["esci_label"], row["split"], row["product_id"]
        if label not in LABELS:
            raise UserError(
                f"{path}: row {number}: esci_label is {label[:20]!r}, none of E, S, C, I; correct it"
            )
        if split not in _SIDES:
            raise UserError(
                f"{path}: row {number}: split is {split[:20]!r}, neither train nor test; correct it"
            )
        if row["product_locale"] != LOCALE or row["small_version"] != 1:
            continue
        query = asked.setdefault(row["query_id"], Query(clean_text(row["query"]), split, {}, {}))
        if product in query.labels or split != query.split:
            what = (
                f"product_id {product[:20]!r} appears twice"
                if split == query.split
                else "split is not that of others"
            )
            raise UserError(f"{path}: row {number}: {what} for query_id {row['query_id']}; keep one")
        query.labels[product], query.rows[product] = LABELS[label], number
    return asked


def read_titles(path: str | pathlib.Path, wanted: Collection[str]) -> dict[str, str]:
    """The titles, "" where there is none, of the wanted products of LOCALE."""
    found = (row for _, row in _rows(path, _PRODUCTS) if row["product_locale"] == LOCALE)
    return {
        row["product_id"]: clean_text(row["product_title"] or "")
        for row in found
        if row["product_id"] in wanted
    }


def _check_titles(
    asked: Mapping[int, Query], titles: Collection[str], path: pathlib.Path, products: str
) -> None:
    """UserError for the first product of the examples that is not among the products."""
    for query in asked.values():
        for product, row in query.rows.items():
            if product not in titles:
                raise UserError(
                    f"{path}: row {row}: product_id {product[:20]!r} is not in {products}; give the products of these "
                    "examples"
                )


def _lists(number: int, query: Query, texts: Mapping[str, str], k: int, seed: int) -> Iterator[ListExample]:
    """Disjoint lists of `k` products in random order; one whose labels are all equal has no ranking and is left out."""
    products = sorted(product for product in query.labels if product in texts)
    # A generator per query: its lists do not depend on which other queries the file has.
    random.Random(f"{seed} {number}").shuffle(products)
    for start in range(0, len(products) - k + 1, k):
        part = products[start : start + k]
        scores = tuple(query.labels[product] for product in part)
        if len(set(scores)) > 1:
            key = f"{query.split} q{number}.{start // k + 1}"
            yield ListExample(key, str(number), query.text, tuple(texts[product] for product in part), scores)


def _rows(path: str | pathlib.Path, columns: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, values of `columns`) of each row; UserError for a file or a value that is not of that form."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:  # of pages that have a checksum
            if missing := [name for name in columns if name not in file.schema_arrow.names]:
                raise UserError(
                    f"{path}: has no column {', '.join(missing)}; give the file as it is published"
                )
            batches = file.iter_batches(columns=list(columns))
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                for name, kind in columns.items():
                    if not isinstance(row[name], kind):
                        raise UserError(
                            f"{path}: row {number}: {name} is {str(row[name])[:20]!r}; correct it"
                        )
                yield number, row
    except (pa.ArrowException, OSError, ValueError) as e:
        raise UserError(
            f"{path}: is not a readable Parquet file ({first_line(e)[:120]}); fetch it again"
        ) from e
