"""Rank K passages by relevance to a query: MS MARCO and the Deep Learning tracks of TREC, as they are published.

`data.path` is read by the columns of its first line, which tabs part:

| columns | file | also needed |
|---|---|---|
| 2: id, passage | collection.tsv | queries as `data.meta_path`, qrels as `data.labels` |
| 3: query, relevant passage, other passage | triples.train.small.tsv | nothing |
| 4: query id, passage id, query, passage | top1000.dev, msmarco-passagetest2019-top1000.tsv | qrels as `data.labels` |

Qrels are lines of query id, an unused field, passage id and grade, 0 to 3; what is not judged is 0, as in trec_eval.
Only passages that may be in a list are kept, so the collection may be larger than the memory.
"""

import pathlib
import random
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from listopd_jax.data.reviews import clean_text, first_words
from listopd_jax.data.streams import read_text_lines
from listopd_jax.errors import UserError
from listopd_jax.task.prompt import ListExample, render_list
from listopd_jax.tasks.file_task import FileTask
from listopd_jax.tasks.listwise import Listwise, deal_lists

BEST = 3
RELEVANT = 1  # the grade of a relevant passage of a triple, as in MS MARCO's qrels


class Pool(NamedTuple):
    """The material of lists; ids are those of the files, for triples the texts themselves."""

    queries: dict[str, str]
    passages: dict[str, str]
    relevant: dict[str, dict[str, int]]  # query -> passage -> grade > 0
    others: dict[str, list[str]]  # query -> passages that are not relevant to it


class Judgement(NamedTuple):
    """One line of the qrels."""

    query: str
    passage: str
    grade: int
    where: str


class Passages(Listwise, FileTask):
    """Lists of up to K/2 relevant passages and others; all lists of a query stay on one side."""

    name, noun, best = "passages", "passage", BEST
    inputs = (*FileTask.inputs, "data.meta_path", "data.labels")

    def read(self, path: pathlib.Path) -> Iterator[ListExample]:
        """The lists of each query that has a relevant passage."""
        pool, k = self._pool(path), self.options.k
        texts = {i: first_words(text, self.options.max_review_words) for i, text in pool.passages.items()}
        if len(texts) < k or not any(pool.relevant.values()):
            raise UserError(
                f"{path}: {len(texts)} passages and {len(pool.relevant)} queries that have a relevant one make no list "
                f"of task.k={k}; give the file that the judgements are of, or lower task.k"
            )
        everyone = list(texts)
        for query, judged in pool.relevant.items():
            others = pool.others.get(query, [])
            if len(others) < k - 1:
                # More than are needed: those that are judged, or there already, drop out.
                others = others + _random_others(everyone, judged, others, f"{self.data.seed} {query}", 4 * k)
            if len(others) >= k - 1:
                yield from deal_lists(query, pool.queries[query], judged, others, texts, k, self.data.seed)

    def group(self, record: ListExample) -> str:
        """The query."""
        return record.product_id

    def prompt(self, record: ListExample) -> str:
        """The query, one line per passage, and the form of the answer."""
        head = f"Query: {record.title} Below are {len(record.reviews)} passages. Score each 0-{BEST} for relevance."
        return render_list(head, self.noun, record.reviews, example=BEST)

    def _pool(self, path: pathlib.Path) -> Pool:
        """The content of the file, by the columns of its first line."""
        columns = next((len(fields) for _, fields in _rows(path)), 0)
        readers = {2: self._of_collection, 3: self._of_triples, 4: self._of_candidates}
        if columns not in readers:
            raise UserError(
                f"{path}:1: {columns} columns between tabs; give a collection (2), triples (3) or candidates (4)"
            )
        if columns != 3 and not self.data.labels:
            raise UserError(f"data.labels is empty: {path} needs the qrels that judge its passages")
        return readers[columns](path)

    def _of_collection(self, path: pathlib.Path) -> Pool:
        """The passages that are judged, relevant or not."""
        if not self.data.meta_path:
            raise UserError(
                f"data.meta_path is empty: {path} is a collection; give the queries, as queries.*.tsv"
            )
        judgements = list(read_qrels(self.data.labels))
        queries = _texts(self.data.meta_path, {j.query for j in judgements})
        passages = _texts(path, {j.passage for j in judgements})
        pool = Pool(queries, passages, defaultdict(dict), defaultdict(list))
        for query, passage, grade, where in judgements:
            if query not in queries:
                raise UserError(
                    f"{where}: query {query[:20]!r} is not in {self.data.meta_path}; give its queries"
                )
            if passage not in passages:
                raise UserError(
                    f"{where}: passage {passage[:40]!r} is not in {path}; give its whole collection"
                )
            if grade > 0:
                pool.relevant[query][passage] = grade
            else:
                pool.others[query].append(passage)
        return pool

    def _of_candidates(self, path: pathlib.Path) -> Pool:
        """The relevant candidates of each query, and the first 2K others in the order of the file."""
        grades = {(j.query, j.passage): j.grade for j in read_qrels(self.data.labels)}
        wanted = {query for (query, _), grade in grades.items() if grade > 0}
        pool = Pool({}, {}, defaultdict(dict), defaultdict(list))
        for where, (query, passage, text, words) in _rows(path, 4):
            if query not in wanted:
                continue
            words, grade = _text(words, where, "passage"), grades.get((query, passage), 0)
            if grade <= 0 and len(pool.others[query]) >= 2 * self.options.k:
                continue
            if passage in pool.relevant[query] or passage in pool.others[query]:
                raise UserError(
                    f"{where}: passage {passage[:40]!r} appears twice for query {query[:20]!r}; keep one"
                )
            pool.queries[query], pool.passages[passage] = _text(text, where, "query"), words
            if grade > 0:
                pool.relevant[query][passage] = grade
            else:
                pool.others[query].append(passage)
        return pool._replace(relevant={query: judged for query, judged in pool.relevant.items() if judged})

    def _of_triples(self, path: pathlib.Path) -> Pool:
        """The relevant passages of each query, and the first 2K others in the order of the file."""
        pool, names = Pool({}, {}, defaultdict(dict), defaultdict(list)), {}
        for where, fields in _rows(path, 3):
            named = zip(fields, ("query", "relevant passage", "other passage"), strict=True)
            text, right, wrong = (_text(field, where, name) for field, name in named)
            query = names.setdefault(text, str(len(names) + 1))
            pool.queries[query], pool.passages[right] = text, right
            pool.relevant[query][right] = RELEVANT
            others = pool.others[query]
            if len(others) < 2 * self.options.k and wrong not in others:
                others.append(wrong)
                pool.passages[wrong] = wrong
        for query, judged in pool.relevant.items():
            # Only now are all relevant passages known: a later line may call one of these relevant.
            pool.others[query] = [text for text in pool.others[query] if text not in judged]
        return pool


def read_qrels(path: str | pathlib.Path) -> Iterator[Judgement]:
    """The judgements of a file of qrels; UserError for a malformed line, or one that judges a passage again."""
    seen = set()
    for where, line in read_text_lines(path):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 4:
            raise UserError(f"{where}: {len(fields)} fields; qrels are query id, 0, passage id and grade")
        query, _, passage, grade = fields
        if grade not in tuple(map(str, range(BEST + 1))):
            raise UserError(f"{where}: grade {grade[:20]!r} is none of 0 to {BEST}; correct it")
        if (query, passage) in seen:
            raise UserError(
                f"{where}: judges passage {passage[:40]!r} for query {query[:20]!r} again; keep one"
            )
        seen.add((query, passage))
        yield Judgement(query, passage, int(grade), where)
    if not seen:
        raise UserError(f"{path}: has no judgements; give the qrels as data.labels")


def _texts(path: str | pathlib.Path, wanted: Collection[str]) -> dict[str, str]:
    """Id → text of the wanted lines of a file of two columns."""
    found: dict[str, str] = {}
    for where, (name, text) in _rows(path, 2):
        if name in found:
            raise UserError(f"{where}: id {name[:40]!r} appears twice; keep one")
        if name in wanted:
            found[name] = _text(text, where, "text")
    return found


def _rows(path: str | pathlib.Path, columns: int = 0) -> Iterator[tuple[str, list[str]]]:
    """(where, fields) of each line; UserError for one without `columns` of them (0: any number)."""
    for where, line in read_text_lines(path):
        fields = line.split("\t")
        if columns and len(fields) != columns:
            raise UserError(f"{where}: {len(fields)} columns between tabs, not {columns}; correct the line")
        yield where, fields


def _text(field: str, where: str, name: str) -> str:
    """A text as it is shown; UserError if it is empty."""
    if text := clean_text(field):
        return text
    raise UserError(f"{where}: the {name} is empty; take the line out")


def _random_others(
    everyone: Sequence[str], judged: Mapping[str, int], others: Sequence[str], seed: str, count: int
) -> list[str]:
    """Up to `count` passages of other queries, drawn at random: for a query that has too few of its own."""
    drawn = random.Random(f"{seed} others").sample(everyone, min(count, len(everyone)))
    return [i for i in drawn if i not in judged and i not in others]
