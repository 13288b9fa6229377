"""Fuzz targets of data: the readers of reviews, labels and titles, and the tasks that read files of their own."""

import contextlib
import functools
import gzip
import io
import json
import pathlib
import random
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from mutate import drawn_value, edited, edited_json, edited_line, packed, spelled
from test_data_readers import ELEVEN
from test_json_task import LINES, SCHEMA
from test_tasks import opened
from test_tasks_ranking import candidates, collection, examples, products, written

from listopd_jax.data.labels import read_labels
from listopd_jax.data.readers import read_reviews, read_titles
from listopd_jax.data.reviews import Review, clean_text, first_words
from listopd_jax.errors import MOST_TEXT, UserError
from listopd_jax.tasks.cranfield import read_sections

DATA = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
ROWS = 40


class Absent(Exception):
    """A target needs real files that are not here."""


def need(*names: str) -> list[pathlib.Path]:
    """Real files by their names in the shared folder."""
    paths = [DATA / name for name in names]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise Absent(f"needs the real {missing[0]} in ../shared/data, absent here")
    return paths


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Swallow a UserError of one line that says something: any other exception is a fault."""
    try:
        yield
    except UserError as e:
        check_line(e)


def check_line(e: UserError) -> None:
    """One line that a terminal shows as it is."""
    assert str(e) and str(e).isprintable(), f"not one line of printable text: {str(e)!r}"
    assert len(str(e)) <= MOST_TEXT, f"{len(str(e))} characters"


# --- reviews


def reviews(folder: pathlib.Path):
    """Real rows, one of which is changed: the others read as before, and no value moves to another column."""
    clothing, amazon, meta = need(
        "womens_clothing_reviews.csv.zip", "AMAZON_FASHION_5.json.gz", "amazon_fashion_2023_meta_sample.jsonl"
    )
    header, *rows = _csv_records(_unzipped(clothing).decode())[: ROWS + 1]
    assert header == ELEVEN.rstrip("\n"), "the columns are those of the published file"
    objects = [json.loads(line) for line in gzip.decompress(amazon.read_bytes()).splitlines()[:ROWS]]
    titles = [json.loads(line) for line in meta.read_text("utf-8").splitlines()[:ROWS]]
    path = folder / "reviews"
    kinds: list[Callable] = []
    for source, form in (("amazon2018", dict), ("amazon2018", _of_2014), ("amazon2023", _of_2023)):
        table = [form(row) for row in objects]
        before = [_alone(source, path, spelled(row)) for row in table]
        kinds.append(functools.partial(_edited_objects, path, source, table, before))
    before = [_alone("clothing", path, _csv_bytes(header, [row])) for row in rows]
    table = Csv(path, header, rows, before)
    kinds += [functools.partial(kind, table) for kind in (_edited_columns, _edited_csv, _damaged)]
    kinds += [
        functools.partial(_edited_labels, path),
        functools.partial(_edited_titles, path, titles),
        _votes_case(path),
    ]
    return lambda rng: rng.choice(kinds)(rng)


class Csv(NamedTuple):
    """Where a CSV file is written, its header and rows as they are spelled, and what each row alone reads as."""

    path: pathlib.Path
    header: str
    rows: list[str]
    before: list[Review | None]


def _alone(source: str, path: pathlib.Path, data: bytes) -> Review | None:
    """What a file of one row reads as."""
    path.write_bytes(data)
    try:
        return read(source, path)[0]
    except UserError:
        return None


def _unzipped(path: pathlib.Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(archive.namelist()[0])


def _csv_records(text: str) -> list[str]:
    """The records of a CSV text, each without its line end: a line end between quotes is part of its record."""
    found, start, quotes = [], 0, 0
    for i, character in enumerate(text):
        quotes += character == '"'
        if character == "\n" and quotes % 2 == 0:
            found.append(text[start:i].rstrip("\r"))
            start = i + 1
            if len(found) > ROWS:
                break
    return found


def _of_2014(row: dict) -> dict:
    votes = int(row["vote"].replace(",", "")) if "vote" in row else 0
    return {k: v for k, v in row.items() if k != "vote"} | {"helpful": [votes, votes + 2]}


def _of_2023(row: dict) -> dict:
    votes = int(row.get("vote", "0").replace(",", ""))
    return {
        "user_id": row["reviewerID"],
        "parent_asin": row["asin"],
        "text": row.get("reviewText"),
        "helpful_vote": votes,
    }


def read(source: str, path: pathlib.Path) -> list[Review]:
    """All usable reviews, however many are broken."""
    found = list(read_reviews(source, path, 1.0, Counter()))
    assert all(review.product and review.text and review.votes >= 0 for review in found)
    texts = [text for r in found for text in (r.user, r.product, r.title, r.text)]
    assert not any(_UNCLEAN.search(text) or text != " ".join(text.split()) for text in texts), "not clean"
    return found


_UNCLEAN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def _edited_objects(
    path: pathlib.Path, source: str, rows: list[dict], before: list[Review | None], rng: random.Random
) -> None:
    """One line has another value, or other bytes; all other lines are read as before."""
    i = rng.randrange(len(rows))
    field = rng.choice(list(rows[i]))
    if by_value := rng.random() < 0.6:
        line = spelled(rows[i] | {field: drawn_value(rng)})
    else:
        line = edited(rng, spelled(rows[i]), 2).replace(b"\n", b" ")
    lines = [line if j == i else spelled(row) for j, row in enumerate(rows)]
    path.write_bytes(packed(rng, b"".join(x + b"\n" for x in lines)))
    with one_line():
        after = read(source, path)
        others = [review for j, review in enumerate(before) if j != i and review]
        kept = sum(review is not None for review in before[:i])
        own = after[kept : len(after) - (len(others) - kept)]
        assert after[:kept] + after[kept + len(own) :] == others and len(own) <= 1, (
            "another line reads otherwise"
        )
        if own and before[i] and by_value:
            _check_columns(own[0], before[i], _ATTRIBUTE.get(field, ""))


_ATTRIBUTE = {
    "reviewerID": "user", "user_id": "user", "asin": "product", "parent_asin": "product", "reviewText": "text",
    "text": "text", "vote": "votes", "helpful": "votes", "helpful_vote": "votes",
    "Clothing ID": "product", "Review Text": "text", "Positive Feedback Count": "votes", "Division Name": "title",
    "Class Name": "title", "Department Name": "category",
}  # fmt: skip


def _check_columns(found: Review, before: Review, changed: str) -> None:
    """Only the attribute of the field that was changed may differ; the title of a clothing review names its item."""
    may = {changed, "title"} if changed == "product" else {changed}
    for name in ("user", "product", "title", "text", "votes", "category"):
        assert name in may or getattr(found, name) == getattr(before, name), (
            f"{name} changed with {changed or 'none'}"
        )


def _csv_bytes(header: str, rows: list[str]) -> bytes:
    return "".join(f"{row}\n" for row in (header, *rows)).encode()


def _fields(row: str) -> list[str]:
    """The fields of a CSV record as they are spelled, quotes included."""
    return re.findall(r'(?:^|,)((?:"(?:[^"]|"")*"|[^,"])*)', row)


def _edited_columns(table: Csv, rng: random.Random) -> None:
    """One field of one row is spelled otherwise: that row is not read, or all its other fields are where they were."""
    i = rng.randrange(len(table.rows))
    fields, names = _fields(table.rows[i]), table.header.split(",")
    assert len(fields) == len(names), "the real row has its columns"
    column = rng.randrange(len(fields))
    fields[column] = edited(rng, fields[column].encode()).decode("utf-8", "surrogateescape")
    _check_csv(table, i, ",".join(fields), names[column])


def _edited_csv(table: Csv, rng: random.Random) -> None:
    """A comma, quote or line end too many or too few in one row."""
    i = rng.randrange(len(table.rows))
    row = table.rows[i]
    at = rng.randrange(len(row) + 1)
    marks = [m.start() for m in re.finditer('[,"]', row)]
    gone = rng.choice(marks)
    changed = rng.choice(
        (
            row[:at] + rng.choice((",", '"', "\n", "\r", "\0")) + row[at:],
            row[:gone] + row[gone + 1 :],
            row[:at],
        )
    )
    _check_csv(table, i, changed, None)


def _check_csv(table: Csv, i: int, changed: str, column: str | None) -> None:
    """What stands before the row is read as before; behind it too, from where quotes are closed again."""
    path, before = table.path, table.before
    lines = [changed if j == i else row for j, row in enumerate(table.rows)]
    path.write_bytes(
        "".join(f"{line}\n" for line in (table.header, *lines)).encode("utf-8", "surrogateescape")
    )
    with one_line():
        after = read("clothing", path)
        kept, behind = ([r for r in part if r] for part in (before[:i], before[i + 1 :]))
        assert after[: len(kept)] == kept, "a row before it reads otherwise"
        rest = after[len(kept) :]
        same = next(
            (n for n in range(len(behind), -1, -1) if rest[len(rest) - n :] == behind[len(behind) - n :]), 0
        )
        own, lost = rest[: len(rest) - same], len(behind) - same
        assert len(own) <= 1, "more than the one row reads otherwise"
        assert lost == 0 or '"' in changed or '"' in table.rows[i], f"{lost} rows behind it are lost"
        assert lost <= 3, f"{lost} rows behind it are lost"
        if own and before[i] and column is not None:
            _check_columns(own[0], before[i], _ATTRIBUTE.get(column, ""))
        elif own and before[i]:
            assert own[0].votes == before[i].votes, "the votes are of another column"


def _damaged(table: Csv, rng: random.Random) -> None:
    """An archive with other bytes is refused, or reads as the whole one: both kinds have a checksum."""
    data = packed(rng, _csv_bytes(table.header, table.rows))
    while data[:1] not in (b"\x1f", b"P"):
        data = packed(rng, data)
    changed = edited(rng, data, 3)
    table.path.write_bytes(changed)
    with one_line():
        found = read("clothing", table.path)
        if changed[:4] == data[:4]:
            assert found == [r for r in table.before if r], "damage was not noticed"


LABELS = [{"key": f"{i:016x}", "score": i % 11} for i in range(30)]


def _edited_labels(path: pathlib.Path, rng: random.Random) -> None:
    """Labels are those of the lines, or the line that is wrong is named."""
    i, lines = _edited_objects_line(rng, LABELS)
    path.write_bytes(packed(rng, lines))
    with one_line():
        found = read_labels(path)
        assert all(found[row["key"]] == row["score"] for j, row in enumerate(LABELS) if j != i)
        assert len(found) <= len(LABELS) and all(type(x) is int and 0 <= x <= 10 for x in found.values())


def _edited_objects_line(rng: random.Random, rows: list[Any]) -> tuple[int, bytes]:
    """JSON lines, one of them with another value or other bytes, and its number from 0."""
    i = rng.randrange(len(rows))
    line = edited_json(rng, spelled(rows[i])).replace(b"\n", b" ")
    return i, b"".join((line if j == i else spelled(row)) + b"\n" for j, row in enumerate(rows))


def _edited_titles(path: pathlib.Path, rows: list[dict], rng: random.Random) -> None:
    """The title of each product but that of the changed line is as before."""
    wanted = {row["parent_asin"] for row in rows}
    path.write_bytes(b"".join(spelled(row) + b"\n" for row in rows))
    before = read_titles(path, wanted, 1.0, Counter())
    i, lines = _edited_objects_line(rng, rows)
    path.write_bytes(packed(rng, lines))
    with one_line():
        found, own = read_titles(path, wanted, 1.0, Counter()), rows[i]["parent_asin"]
        assert {k: v for k, v in found.items() if k != own} == {k: v for k, v in before.items() if k != own}
        assert not any(_UNCLEAN.search(title) for title in found.values())


def _votes_case(path: pathlib.Path) -> Callable[[random.Random], None]:
    """Votes in any form are the count that they spell, or the row is broken."""

    def case(rng: random.Random) -> None:
        text = "".join(rng.choices("0123,,. -+eE_", k=rng.randint(0, 6)))
        value = drawn_value(rng) if rng.random() < 0.5 else text
        field = rng.choice(("vote", "helpful"))
        row = {"reviewerID": "u", "asin": "a", "reviewText": "fine"}
        path.write_bytes(spelled(row | {field: value}) + b"\n" + spelled(row) + b"\n")
        found = read("amazon2018", path)
        expected = _of_pair(value) if field == "helpful" else _count(value)
        assert [r.votes for r in found] == ([] if expected is None else [expected]) + [0], (
            f"{value!r} is {found}"
        )

    return case


def _count(value: Any) -> int | None:
    """A count as the readers' docstrings have it: 3, 3.0, "3", "1,234"; absent 0; None for anything else."""
    if value is None:
        return 0
    if isinstance(value, str):
        whole, _, zeros = value.strip().partition(".")
        digits = whole.replace(",", "")
        if not (digits.isascii() and digits.isdecimal() and len(digits) < 300 and not zeros.strip("0")):
            return None
        return int(digits) if "," not in whole or _grouped(whole) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 0 <= value <= sys.float_info.max and value == int(value) else None


def _grouped(text: str) -> bool:
    """Whether every comma parts three digits, leading zeros or not."""
    first, *others = text.split(",")
    return 1 <= len(first) <= 3 and all(len(part) == 3 for part in others)


def _of_pair(value: Any) -> int | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    votes, of = map(_count, value)
    return votes if votes is not None and of is not None and votes <= of else None


# --- tasks with files of their own


def tasks(folder: pathlib.Path):
    """The files of a task, one line or value changed: records that hold their task's promises, or one line."""
    kinds = [_cranfield(folder), _bfcl(folder), _json(folder), _esci(folder)]
    kinds += [_passages(folder / name, *form) for name, form in _PASSAGES.items()]
    return lambda rng: rng.choice(kinds)(rng)


MOST_CHANGED = (
    3  # texts or records that an edit of one place changes: a line that is moved has two neighbours
)


def _check_records(task: Any, splits: Any) -> tuple[set[str], dict[str, Any]]:
    """Keys are distinct and right answers hold the contract: the texts of lists, and what other records ask by key."""
    found = [*splits.train, *splits.validation]
    assert len({r.key for r in found}) == len(found)
    for record in found:
        answer, prompt = task.answer(record), task.prompt(record)
        assert prompt and task.fields(record) is not None
        if answer is not None:
            parsed = task.parse(answer, record)
            assert parsed.ok, f"{record.key}: the right answer is {parsed.failure}"
            assert 0 <= task.score(parsed, record)["useful"] <= 1
    texts = {text for record in found for text in getattr(record, "reviews", ())}
    return texts, {} if texts else {r.key: (task.prompt(r), task.answer(r)) for r in found}


def _task_case(
    name: str,
    folder: pathlib.Path,
    originals: dict[str, pathlib.Path],
    change: Callable,
    known: set[str] = frozenset(),
) -> Callable[[random.Random], None]:
    """Copies of files with one of them changed by `change(rng, field, data)`, read as a task of the texts `known`."""
    before = {field: path.read_bytes() for field, path in originals.items()}
    task, splits = opened(name, folder / "calm", **{f: _put(folder, f, d) for f, d in before.items()})
    texts, asked = _check_records(task, splits)
    assert texts <= known, "what is read of the files as they are"

    def case(rng: random.Random) -> None:
        field = rng.choice(list(before))
        data = change(rng, field, before[field])
        paths = {f: _put(folder, f, data if f == field else d) for f, d in before.items()}
        with one_line():
            task, splits = opened(name, folder / "out", **paths)
            texts, records = _check_records(task, splits)
            assert len(texts - known) <= MOST_CHANGED, f"{len(texts - known)} texts are of no line"
            changed = [key for key, record in records.items() if asked.get(key, record) != record]
            assert len(changed) <= 1, f"records {changed} are not those of their lines"

    return case


def _put(folder: pathlib.Path, field: str, data: bytes) -> pathlib.Path:
    path = folder / field.replace(".", "_")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _by_lines(separator: bytes | None) -> Callable:
    def change(rng: random.Random, field: str, data: bytes) -> bytes:
        changed = edited(rng, data, 3) if rng.random() < 0.1 else edited_line(rng, data, separator)[1]
        return packed(rng, changed)

    return change


def _cranfield(folder: pathlib.Path) -> Callable:
    paths = need(*(f"cranfield/{name}" for name in ("cran.all.1400", "cran.qry", "cranqrel")))
    abstracts, queries, judged = (path.read_bytes() for path in paths)
    place = folder / "cranfield"
    few = {
        "data.path": b".I ".join(abstracts.split(b".I ")[:61]),
        "data.meta_path": b".I ".join(queries.split(b".I ")[:9]),
        "data.labels": b"".join(_few_judgements(judged, 8, 60)),
    }
    originals = {field: _put(place / "source", field, data) for field, data in few.items()}
    texts = {first_words(text, 200) for text in read_sections(originals["data.path"], "W").values()}
    return _task_case("cranfield", place, originals, _by_lines(b" "), texts)


def _few_judgements(data: bytes, queries: int, documents: int) -> Iterator[bytes]:
    for number, line in enumerate(data.splitlines(keepends=True)):
        query, document, grade = line.split()[:3]
        if int(query) <= queries:
            yield b"%s %d %s\n" % (query, 1 + (int(document) + number) % documents, grade)


def _bfcl(folder: pathlib.Path) -> Callable:
    questions, answers = need(
        "bfcl/BFCL_v4_simple_python.json", "bfcl/possible_answer_BFCL_v4_simple_python.json"
    )
    few = {"data.path": questions, "data.labels": answers}
    place = folder / "bfcl"
    originals = {
        field: _put(place / "source", field, b"".join(path.read_bytes().splitlines(keepends=True)[:12]))
        for field, path in few.items()
    }
    return _task_case("bfcl", place, originals, _by_objects)


def _by_objects(rng: random.Random, field: str, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    i = rng.randrange(len(lines))
    lines[i] = edited_json(rng, lines[i]).replace(b"\n", b" ") + b"\n"
    return packed(rng, b"".join(lines))


def _json(folder: pathlib.Path) -> Callable:
    place = folder / "json"
    messages = [{"role": "system", "content": "Extract."}, {"role": "user", "content": "3 mugs"}]
    own = [{"messages": messages, "schema": {"const": 3}, "answer": 3, "teacher_prompt": "it is 3"}]
    schema, path = _put(place / "source", "task.schema", spelled(SCHEMA)), place / "source" / "lines"
    path.write_bytes(b"".join(spelled(line) + b"\n" for line in [*LINES[:8], *own]))

    def change(rng: random.Random, field: str, data: bytes) -> bytes:
        return edited_json(rng, data) if field == "task.schema" else _by_objects(rng, field, data)

    return _task_case("json", place, {"data.path": path, "task.schema": schema}, change)


def _triples(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    lines = [f"what is {q}?\tright {q}\twrong {q} {i}\n" for q in range(6) for i in range(10 if q else 2)]
    (folder / "triples").write_text("".join(lines))
    return {"data.path": folder / "triples"}


_PASSAGES = {
    "collection": (lambda folder: collection(folder)[0], [1]),
    "candidates": (candidates, [3]),
    "triples": (_triples, [1, 2]),
}
"""What makes the files of each form, and the columns of passages."""


def _passages(folder: pathlib.Path, make: Callable, columns: list[int]) -> Callable:
    folder.mkdir()
    paths = make(folder)
    rows = [line.split("\t") for line in paths["data.path"].read_text().splitlines()]
    texts = {clean_text(row[column]) for row in rows for column in columns}
    return _task_case("passages", folder, paths, _by_lines(b"\t"), texts)


def _esci(folder: pathlib.Path) -> Callable:
    place = folder / "esci"
    place.mkdir()
    tables = {"data.path": examples(), "data.meta_path": products(examples())}
    originals = written(place, *tables.values())

    def change(rng: random.Random, field: str, data: bytes) -> bytes:
        if rng.random() < 0.3:
            return edited(rng, data, 3)
        rows = [dict(row) for row in tables[field]]
        i, name = rng.randrange(len(rows)), rng.choice(list(rows[0]))
        value = rng.choice(
            [row[name] for row in rows] + [None, "", "\x1b", -1, 0, 3.5, "&#" + "9" * 5000 + ";"]
        )
        whole = rng.random() < 0.2
        for j, row in enumerate(rows):
            if whole or j == i:
                row[name] = value
        try:
            out = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows), out, write_page_checksum=True)
        except pa.ArrowException:  # a column of two types cannot be written
            return data
        return out.getvalue()

    titles = {row["product_title"] for row in tables["data.meta_path"]}
    return _task_case("esci", place, originals, change, titles)
