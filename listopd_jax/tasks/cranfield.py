"""Rank K abstracts by relevance to a query: the Cranfield collection as it is published.

`data.path` is cran.all.1400, `data.meta_path` cran.qry, `data.labels` cranqrel. An abstract (`.W`) begins with its
title. A query in cranqrel is a position in cran.qry, not the number printed there. Grades are 1 (a complete answer) to
4 (of minimum interest) and become labels 4 to 1; those judged −1 or not at all have label 0.

225 queries are too few to learn from what a query has to do with a text. `data.synthetic_queries` adds that many lists
to the training ones, whose queries are made of words of the abstracts (tasks/synthetic_queries.py).
"""

import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from listopd_jax.data.reviews import clean_text, first_words
from listopd_jax.data.streams import read_text_lines
from listopd_jax.errors import UserError
from listopd_jax.task.prompt import ListExample, render_list
from listopd_jax.tasks.file_task import FileTask
from listopd_jax.tasks.listwise import Listwise, deal_lists
from listopd_jax.tasks.synthetic_queries import parts, synthetic_lists

BEST = 4  # the label of grade 1

Judgements = Mapping[int, Mapping[int, int]]  # query -> document -> label


class Cranfield(Listwise, FileTask):
    """Lists of up to K/2 relevant abstracts and others; all lists of a query stay on one side."""

    name, noun, best = "cranfield", "passage", BEST
    inputs = (*FileTask.inputs, "data.meta_path", "data.labels")

    def read(self, path: pathlib.Path) -> Iterator[ListExample]:
        """The lists of each query, its relevant abstracts dealt out over them."""
        for name in ("meta_path", "labels"):
            if not getattr(self.data, name):
                raise UserError(
                    f"data.{name} is empty: give cran.qry as data.meta_path, cranqrel as data.labels"
                )
        texts, queries = self._texts(path), read_sections(self.data.meta_path, "W")
        judged = read_judgements(self.data.labels, len(queries), texts)
        for number, query in enumerate(queries.values(), 1):
            of = judged.get(number, {})
            others = [i for i, text in texts.items() if text and i not in of]
            if of and len(others) < self.options.k - 1:
                raise UserError(
                    f"{path}: {len(others)} abstracts are not relevant to query {number}, too few for lists of "
                    f"task.k={self.options.k}; give the whole collection, or lower task.k"
                )
            yield from deal_lists(str(number), query, of, others, texts, self.options.k, self.data.seed)

    def divided(self, records: Sequence[ListExample]) -> dict[str, list[ListExample]]:
        """The lists by side; synthetic ones, if any, have no abstract that is relevant to a held-out query."""
        split, count = super().divided(records), self.data.synthetic_queries
        if count:
            queries = {record.product_id for record in split["validation"]}
            held_out = set(_relevant(record for record in records if record.product_id in queries))
            words = self.options.max_review_words
            documents = read_sections(self.data.path, "W").values()
            free = [text for text in documents if first_words(text, words) not in held_out]
            split["train"] += synthetic_lists(parts(free, words), count, self.options.k, BEST, self.data.seed)
        return split

    def group(self, record: ListExample) -> str:
        """The query."""
        return record.product_id

    def prompt(self, record: ListExample) -> str:
        """The query, one line per abstract, and the form of the answer."""
        head = f"Query: {record.title} Below are {len(record.reviews)} passages. Score each 0-{BEST} for relevance."
        return render_list(head, self.noun, record.reviews, example=BEST)

    def _report(self, paths: dict[str, pathlib.Path], split: dict[str, list[Any]]) -> dict[str, Any]:
        report, count = super()._report(paths, split), self.data.synthetic_queries
        said = [f"{count} training lists have synthetic queries: nobody has judged them"] if count else []
        return report | {"notes": report["notes"] + said}

    def _texts(self, path: str | pathlib.Path) -> dict[int, str]:
        """Number → the words of each abstract that is in a list."""
        documents = read_sections(path, "W")
        return {i: first_words(text, self.options.max_review_words) for i, text in documents.items()}


def read_sections(path: str | pathlib.Path, wanted: str) -> dict[int, str]:
    """Number → text of the `wanted` sections (letters) of each `.I` entry, in order; UserError if there are none."""
    found: dict[int, list[str]] = {}
    number, section = None, ""
    titled = False
    for where, line in read_text_lines(path):
        if line.startswith(".I "):
            number, section, titled = _integer(line[3:], where), "", False
            if number in found:
                raise UserError(f"{where}: a second entry .I {number}; keep one")
            found[number] = []
        elif line[:1] == "." and line[1:].strip() in tuple("TABW"):
            section = line[1:].strip()
            if section == "T" and titled:
                raise UserError(
                    f"{where}: a second title in entry .I {number}; put the line .I of the next entry before it"
                )
            titled = titled or section == "T"
        elif number is not None and section and section in wanted:
            found[number].append(line)
    if not found:
        raise UserError(
            f"{path}: has no .I entries; give the file of the Cranfield collection as it is published"
        )
    return {i: clean_text(" ".join(lines)) for i, lines in found.items()}


def read_judgements(path: str | pathlib.Path, queries: int, documents: Mapping[int, str]) -> Judgements:
    """The labels of the relevant documents by query; UserError for a line that judges what is not there."""
    judged: dict[int, dict[int, int]] = {}
    for where, line in read_text_lines(path):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 3:
            raise UserError(f"{where}: {len(fields)} fields; write query, document and grade")
        query, document, grade = (_integer(field, where) for field in fields)
        if not 1 <= query <= queries or document not in documents or grade not in (-1, 1, 2, 3, 4):
            raise UserError(
                f"{where}: no such query, document or grade; are the three files of one collection?"
            )
        # Two abstracts of the collection, 471 and 995, have no text.
        if grade > 0 and documents[document]:
            judged.setdefault(query, {})[document] = BEST + 1 - grade
    return judged


def _relevant(records: Iterable[ListExample]) -> Iterator[str]:
    for record in records:
        yield from (t for t, score in zip(record.reviews, record.scores, strict=True) if score > 0)


def _integer(text: str, where: str) -> int:
    if re.fullmatch(r"-?[0-9]{1,9}", text.strip()):
        return int(text)
    raise UserError(f"{where}: {text.strip()[:20]!r} is not a whole number; correct it")
