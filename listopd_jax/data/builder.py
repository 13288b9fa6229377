"""Lists of reviews to ArrayRecord and back, through a TFDS builder; TensorFlow is needed for neither."""

import contextlib
import io
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from listopd_jax import files
from listopd_jax.errors import UserError
from listopd_jax.task.prompt import ListExample

NAME = "listwise_reviews"
REPORT = "report.json"
"""Next to the data set and written last, so a data set with a report is complete."""
VERSION = "1.0.0"


class _ListwiseReviews(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes the given examples in the given order."""

    name = NAME
    VERSION = tfds.core.Version(VERSION)

    def __init__(self, splits: Mapping[str, Iterable[dict]], folder: pathlib.Path):
        self._splits = splits
        super().__init__(data_dir=folder, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        text, texts = tfds.features.Text, lambda: tfds.features.Sequence(tfds.features.Text())
        features = {
            "key": text(),
            "product_id": text(),
            "title": text(),
            "reviews": texts(),
            "review_keys": texts(),
            "scores": tfds.features.Sequence(np.int32),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Lists of reviews of one product with helpfulness scores 0-10.",
            features=tfds.features.FeaturesDict(features),
            # Else TFDS orders the rows by a hash of their keys; the plan has already drawn their order.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(rows) for split, rows in self._splits.items()}

    def _generate_examples(self, rows: Iterable[dict]) -> Iterator[tuple[int, dict]]:
        yield from enumerate(rows)


def build(splits: Mapping[str, Iterable[dict]], folder: str | os.PathLike) -> dict[str, str]:
    """Write the splits as a TFDS data set in `folder`, in place of an older one and its report.

    A row has key, product_id, title (str), reviews, review_keys (K str each) and scores (K ints). Until it is
    finished the data set lies in a temporary folder, which the next build removes. Returns `built_files`.
    """
    folder = pathlib.Path(folder)
    try:
        # First: stopped anywhere after this, the folder does not pass for a finished data set.
        (folder / REPORT).unlink(missing_ok=True)
        if (folder / NAME).exists():
            shutil.rmtree(folder / NAME)
        folder.mkdir(parents=True, exist_ok=True)
        tfds.disable_progress_bar()
        with _quiet():
            # Nothing is downloaded, but TFDS makes this folder, by default where no build would remove it.
            _ListwiseReviews(splits, folder).download_and_prepare(download_dir=folder / NAME / "downloads")
    except OSError as e:
        raise files.not_written(folder, e) from e
    return built_files(folder)


def built_files(folder: str | os.PathLike) -> dict[str, str]:
    """SHA-256 of each file of the finished data set in `folder`; empty if there is none."""
    place = pathlib.Path(folder) / NAME / VERSION
    return {p.name: files.sha256(p) for p in sorted(place.glob("*")) if p.is_file()}


def read_split(folder: str | os.PathLike, split: str) -> list[ListExample]:
    """Read the examples of a split, in the order in which they were written. UserError if it is not there."""
    if not (pathlib.Path(folder) / NAME / VERSION).is_dir():
        raise UserError(f"{folder}: holds no finished data set; run the prepare stage")
    with _quiet():
        source = tfds.data_source(NAME, split=split, data_dir=folder)
    return [_example(source[i]) for i in range(len(source))]


def _example(row: dict) -> ListExample:
    return ListExample(
        key=row["key"].decode(),
        product_id=row["product_id"].decode(),
        title=row["title"].decode(),
        reviews=tuple(text.decode() for text in row["reviews"]),
        scores=tuple(int(score) for score in row["scores"]),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS prints a banner to stdout and logs each step; the job has its own progress and report."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
