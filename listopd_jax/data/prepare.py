"""The prepare stage: reviews of any source to a data set of lists with a report, built once and reused."""

import dataclasses
import functools
import hashlib
import pathlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np

from listopd_jax import files
from listopd_jax.data import builder, manifest
from listopd_jax.data.categories import FIELDS, is_held_out, of_categories
from listopd_jax.data.groups import ListPlan, plan_lists
from listopd_jax.data.labels import LabelFile, score_from_votes
from listopd_jax.data.readers import read_reviews, read_titles
from listopd_jax.data.report import summarize
from listopd_jax.data.reviews import Review, first_words
from listopd_jax.data.synthetic import synthetic_reviews
from listopd_jax.data.table import ReviewTable, fetch, scan
from listopd_jax.errors import UserError, require
from listopd_jax.metrics_log import progress

FORMAT = 2
"""Part of the fingerprint: raise it when the same config and files give another data set."""
_DATA_FIELDS = (
    "source",
    "vote_cap",
    "max_broken",
    "max_reviews_per_product",
    "validation_share",
    "max_lists",
    "seed",
)
_HUB = "amazon-fashion-2023"

Scorer = Callable[[Review], int | None]


def prepare(data: Any, task: Any, folder: str | pathlib.Path) -> dict:
    """Build the data set that the config asks for in `folder`, unless it is there, and return its report.

    Args:
      data: the data section of a validated config.
      task: the config's task section, of which `k` and `max_review_words` are read.
      folder: receives the TFDS data set and, when it is whole, `report.json`. A build that was interrupted,
        or that was made from another config or other files, is replaced.

    Returns:
      The report: counts of rows read and dropped by reason, lists, label histograms, notes for the reader.

    Raises:
      UserError: for a file that cannot be used, or too few reviews for a split.
    """
    folder = pathlib.Path(folder)
    inputs = _inputs(data)
    fingerprint = _fingerprint(data, task, inputs)
    report = _finished(folder, fingerprint)
    if report is None:
        report = _build(data, task, inputs, folder) | {"fingerprint": fingerprint}
        files.write_json(folder / builder.REPORT, report)
    return report


def listed_reviews(data: Any, task: Any) -> list[Review]:
    """The reviews of all lists that `prepare` would build, in file order: what a labels file should have.

    Each has its product's title, and its text as it is read, uncut. UserError as in `prepare`.
    """
    inputs, tally = _inputs(data), Counter()
    score = _scorer(data, inputs)
    table, plan = _planned(data, task, inputs, score, tally)
    reviews = fetch(_reviews(data, inputs, Counter()), score, table, _rows(plan))
    titles = _titles(data, inputs, reviews.values(), tally)
    return [dataclasses.replace(review, title=titles[review.product]) for review in reviews.values()]


def _inputs(data: Any) -> dict[str, pathlib.Path]:
    """The files to read, by config field, downloaded if need be and present; not yet verified."""
    paths = {name: getattr(data, name) for name in ("path", "meta_path", "labels") if getattr(data, name)}
    if data.source == "synthetic":
        paths = {name: path for name, path in paths.items() if name == "labels"}
    if data.source == "amazon2023" and not data.path:
        paths["path"] = manifest.download(_HUB, "raw/review_categories/Amazon_Fashion.jsonl")
        if "meta_path" not in paths:
            paths["meta_path"] = manifest.download(_HUB, "raw/meta_categories/meta_Amazon_Fashion.jsonl")
    for name, path in paths.items():
        if not pathlib.Path(path).is_file():
            kind = "is a folder; name the file in it" if pathlib.Path(path).is_dir() else "no such file"
            raise UserError(f"data.{name}={path}: {kind}")
    return {name: pathlib.Path(path) for name, path in paths.items()}


def _fingerprint(data: Any, task: Any, inputs: dict[str, pathlib.Path]) -> str:
    """SHA-256 of all that decides the data set: format, fields, each file's name and SHA-256."""
    stats = {name: (path.name, files.sha256(path)) for name, path in inputs.items()}
    fields = {name: getattr(data, name) for name in _DATA_FIELDS}
    fields |= {"k": task.k, "max_review_words": task.max_review_words}
    # Only where they are set, so that data sets built before there were categories are still found.
    fields |= {name: getattr(data, name) for name in FIELDS if getattr(data, name)}
    if data.source == "synthetic":
        fields |= {"synthetic": _synthetic_fields(data)}
    return files.json_sha256([FORMAT, fields, stats])


def _synthetic_fields(data: Any) -> dict:
    return {name: getattr(data.synthetic, name) for name in ("products", "reviews_per_product", "noise")}


def _finished(folder: pathlib.Path, fingerprint: str) -> dict | None:
    """The report of a complete data set with that fingerprint, or None. report.json is written last."""
    if not (folder / builder.REPORT).is_file():
        return None
    report = files.read_json(folder / builder.REPORT)
    if not isinstance(report, dict):
        return None
    same = report.get("fingerprint") == fingerprint and report.get("files") == builder.built_files(folder)
    return report if same else None


def _build(data: Any, task: Any, inputs: dict[str, pathlib.Path], folder: pathlib.Path) -> dict:
    tally: Counter = Counter()
    score = _scorer(data, inputs)
    table, plan = _planned(data, task, inputs, score, tally)
    # Into a throwaway counter: the first reading has counted these rows.
    reviews = fetch(_reviews(data, inputs, Counter()), score, table, _rows(plan))
    titles = _titles(data, inputs, reviews.values(), tally)
    rows = {
        split: [
            _row([reviews[i] for i in members.tolist()], table.score[members], titles, task.max_review_words)
            for members in lists
        ]
        for split, lists in (("train", plan.train), ("validation", plan.validation))
    }
    built = builder.build(rows, folder)
    labels = f"file {inputs['labels'].name}" if "labels" in inputs else f"votes, capped at {data.vote_cap}"
    sources = {name: {"file": path.name, "bytes": path.stat().st_size} for name, path in inputs.items()}
    head = {"source": data.source, "inputs": sources, "labels": labels}
    summary = summarize(rows, dict(tally), plan.counts, data.max_lists)
    if isinstance(score, LabelFile):
        summary["notes"] += score.notes()
    return head | summary | {"files": built}


def _planned(
    data: Any, task: Any, inputs: dict[str, pathlib.Path], score: Scorer, tally: Counter
) -> tuple[ReviewTable, ListPlan]:
    """The first reading, and the lists of it; the files are verified first."""
    if data.verify:
        for path in inputs.values():
            manifest.verify(path)
    synthetic = data.synthetic
    count = synthetic.products * synthetic.reviews_per_product if data.source == "synthetic" else None
    reviews = progress(_reviews(data, inputs, tally), "reading reviews", total=count)
    table = scan(reviews, score, task.max_review_words, tally, functools.partial(is_held_out, data=data))
    tally["usable"] = len(table.product)
    if isinstance(score, LabelFile):
        score.check(data.max_broken)
    require(
        data.validation_category == "" or bool(table.held_out.any()),
        f"data.validation_category={data.validation_category}: none of its reviews has a label in data.labels",
    )
    plan = plan_lists(
        table,
        task.k,
        validation_share=data.validation_share,
        max_lists=data.max_lists,
        max_per_product=data.max_reviews_per_product,
        seed=data.seed,
    )
    return table, plan


def _rows(plan: ListPlan) -> set[int]:
    """The rows of the table that are in a list."""
    return {row for lists in (plan.train, plan.validation) for row in lists.ravel().tolist()}


def _reviews(data: Any, inputs: dict[str, pathlib.Path], tally: Counter) -> Iterator[Review]:
    if data.source == "synthetic":
        return synthetic_reviews(**_synthetic_fields(data), vote_cap=data.vote_cap, seed=data.seed)
    return of_categories(read_reviews(data.source, inputs["path"], data.max_broken, tally), data, tally)


def _scorer(data: Any, inputs: dict[str, pathlib.Path]) -> Scorer:
    if "labels" in inputs:
        return LabelFile(inputs["labels"])
    return lambda review: score_from_votes(review.votes, data.vote_cap)


def _titles(data: Any, inputs: dict, reviews: Collection[Review], tally: Counter) -> dict[str, str]:
    """A title for each product: of the metadata file, else of the reviews, else made of its id."""
    titles = {review.product: review.title for review in reviews if review.title}
    products = {review.product for review in reviews}
    if "meta_path" in inputs:
        titles |= read_titles(inputs["meta_path"], products, data.max_broken, tally)
    tally["products_without_title"] = len(products) - len(titles)
    return {product: titles.get(product, f"item {product}") for product in products}


def _row(reviews: list[Review], scores: np.ndarray, titles: dict[str, str], max_words: int) -> dict:
    keys = [review.key for review in reviews]
    return {
        "key": hashlib.sha1("".join(keys).encode()).hexdigest()[:16],
        "product_id": reviews[0].product,
        "title": titles[reviews[0].product],
        "reviews": [first_words(review.text, max_words) for review in reviews],
        "review_keys": keys,
        "scores": scores.tolist(),
    }
