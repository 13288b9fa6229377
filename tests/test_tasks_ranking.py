"""Passages of MS MARCO and TREC-DL and products of ESCI: small files of the published form, and broken ones."""

import gzip
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import NO_LAMBDA, run_main
from ranx import Qrels, Run, evaluate
from test_tasks import opened

from benchmarks import ranking_files
from listopd_jax import config as config_module
from listopd_jax.errors import UserError
from listopd_jax.task.contract import TOKEN_CLASSES, Parsed
from listopd_jax.task.prompt import ListExample
from listopd_jax.tasks.cranfield import Cranfield
from listopd_jax.tasks.esci import Esci
from listopd_jax.tasks.passages import Passages, read_qrels
from listopd_jax.tasks.reviews import Reviews

QUERIES = 12


class Documents(Reviews):
    """A task of somebody's own, with another word for its texts."""

    noun = "document"


@pytest.mark.parametrize("kind", [Reviews, Cranfield, Passages, Esci, Documents])
def test_every_task_of_lists_classes_its_ids_and_scores(kind):
    """Ids are structure, whatever an answer calls them; the digits of scores are not."""
    defaults = config_module.defaults()
    task = kind(defaults.data, defaults.task)
    text = task.answer(ListExample("key", "1", "what?", ("a", "b"), (2, 0)))
    names = [TOKEN_CLASSES[i] for i in task.token_classes(list(text))]
    found = {
        name: "".join(c for c, own in zip(text, names, strict=True) if own == name) for name in set(names)
    }
    assert found == {
        "bracket": "[]", "brace": "{}{}", "comma": ",,,", "colon": "::::", "quote": '"' * 12,
        "field": f"{task.noun}_idscore" * 2, "id": "r1r2", "digit": "20",
    }  # fmt: skip


def collection(folder):
    """A collection, its queries, and the qrels of a Deep Learning track: ten passages judged 0 to 3 for each query."""
    rng = random.Random(0)
    passages = [f"{i}\tpassage {i} of &amp; words {rng.random():.3f}\n" for i in range(QUERIES * 10 + 30)]
    (folder / "collection.tsv").write_text("".join(passages))
    (folder / "queries.tsv").write_text("".join(f"{100 + q}\twhat is {q}?\n" for q in range(QUERIES + 5)))
    judged = [(100 + q, 10 * q + i, rng.choice((0, 0, 1, 2, 3))) for q in range(QUERIES) for i in range(10)]
    (folder / "qrels.txt").write_text("".join(f"{q} Q0 {i} {grade}\n" for q, i, grade in judged))
    names = {"data.path": "collection.tsv", "data.meta_path": "queries.tsv", "data.labels": "qrels.txt"}
    return {field: folder / name for field, name in names.items()}, {(q, i): grade for q, i, grade in judged}


def records(splits):
    """All lists."""
    return [*splits.train, *splits.validation]


def number(text):
    """The id of a passage, by its text."""
    return int(text.split()[1])


def highest_score(task, record):
    """The one that masks of the schema let through."""
    return task.schema(record)["items"]["properties"]["score"]["maximum"]


def test_a_collection_is_read_with_the_grades_of_its_qrels(tmp_path):
    fields, judged = collection(tmp_path)
    task, splits = opened("passages", tmp_path, **fields)
    assert {r.product_id for r in splits.train}.isdisjoint({r.product_id for r in splits.validation})
    for record in records(splits):
        assert record.title == f"what is {int(record.product_id) - 100}?"
        assert len(record.scores) == len(set(record.reviews)) == 8
        assert record.reviews[0].startswith(f"passage {number(record.reviews[0])} of & words")
        for text, score in zip(record.reviews, record.scores, strict=True):
            assert score == judged.get((int(record.product_id), number(text)), 0)
        assert 1 <= sum(score > 0 for score in record.scores) <= 4
        prompt = task.prompt(record)
        assert (
            prompt.startswith("Query: what is ") and "[Passage 8] id=r8 " in prompt and '"score":3' in prompt
        )
        assert task.parse(task.answer(record), record) == Parsed("ok", tuple(map(float, record.scores)))
        assert highest_score(task, record) == 3
    dealt = [
        (int(r.product_id), number(t))
        for r in records(splits)
        for t, s in zip(r.reviews, r.scores, strict=True)
        if s
    ]
    assert sorted(dealt) == sorted(pair for pair, grade in judged.items() if grade)


def test_packed_files_and_windows_lines_are_the_same(tmp_path):
    fields, _ = collection(tmp_path)
    _, plain = opened("passages", tmp_path, **fields)
    for field, path in fields.items():
        packed = path.with_name(f"{path.name}.gz")
        packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n")))
        fields[field] = packed
    _, again = opened("passages", tmp_path / "again", **fields)
    assert records(again) == records(plain)


def candidates(folder):
    """A file of candidates and its qrels: one relevant passage each, as in MS MARCO's."""
    lines = [
        f"{q}\t{q * 100 + i}\twhat is {q}?\tpassage {q * 100 + i}\n"
        for q in range(QUERIES)
        for i in range(40)
    ]
    random.Random(1).shuffle(lines)
    (folder / "top1000.dev").write_text("".join(lines))
    (folder / "qrels.dev.tsv").write_text(
        "".join(f"{q}\t0\t{q * 100 + 7}\t1\n" for q in range(QUERIES)) + "999\t0\t1\t1\n"
    )
    return {"data.path": folder / "top1000.dev", "data.labels": folder / "qrels.dev.tsv"}


def test_candidates_are_ranked_among_those_of_their_query(tmp_path):
    _, splits = opened("passages", tmp_path, **candidates(tmp_path))
    assert {int(r.product_id) for r in records(splits)} == set(range(QUERIES))
    for record in records(splits):
        query = int(record.product_id)
        assert {number(text) // 100 for text in record.reviews} == {query} and sum(record.scores) == 1
        assert number(record.reviews[record.scores.index(1)]) == query * 100 + 7


def test_triples_need_no_other_file(tmp_path):
    lines = [
        f"what is {q}?\tright {q}\twrong {q} {i}\n" for q in range(QUERIES) for i in range(20 if q else 2)
    ]
    random.Random(1).shuffle(lines)
    path = tmp_path / "triples.train.small.tsv"
    path.write_text("".join(lines))
    _, splits = opened("passages", tmp_path, **{"data.path": path})
    assert len(records(splits)) == QUERIES
    for record in records(splits):
        q = record.title[8:-1]
        right = record.reviews[record.scores.index(1)]
        assert right == f"right {q}" and sum(record.scores) == 1
        own = {text.split()[1] for text in record.reviews} == {q}
        assert own or q == "0", "a query with too few others has those of other queries besides"


def test_ndcg_is_trec_evals(tmp_path):
    """ranx computes NDCG as trec_eval does: linear gain of the grade, over the judged passages of the list."""
    fields, _ = collection(tmp_path)
    task, splits = opened("passages", tmp_path, **fields)
    assert_ndcg(task, records(splits), lambda scores: scores)


def assert_ndcg(task, found, gains):
    rng = np.random.default_rng(0)
    scores = {r.key: rng.permutation(8).astype(float) for r in found}
    qrels = {r.key: {f"d{i}": int(g) for i, g in enumerate(gains(r.scores))} for r in found}
    run = {key: {f"d{i}": float(s) for i, s in enumerate(of)} for key, of in scores.items()}
    for cutoff in (1, 3, 5, 10):
        ours = [task.score(Parsed("ok", tuple(scores[r.key])), r)[f"ndcg@{cutoff}"] for r in found]
        assert np.mean(ours) == pytest.approx(evaluate(Qrels(qrels), Run(run), f"ndcg@{cutoff}"), abs=1e-9)


def test_ndcg_is_that_of_trec_eval_itself(tmp_path):
    ir_measures = pytest.importorskip("ir_measures", reason="trec_eval itself, as an oracle")
    fields, _ = collection(tmp_path)
    task, splits = opened("passages", tmp_path, **fields)
    rng, found = np.random.default_rng(0), records(splits)
    scores = {r.key: rng.permutation(8).astype(float) for r in found}
    qrels = {r.key: {f"d{i}": s for i, s in enumerate(r.scores)} for r in found}
    run = {key: {f"d{i}": float(s) for i, s in enumerate(of)} for key, of in scores.items()}
    for cutoff in (1, 3, 5, 10):
        measure = ir_measures.nDCG @ cutoff
        theirs = ir_measures.calc_aggregate([measure], qrels, run)[measure]
        ours = [task.score(Parsed("ok", tuple(scores[r.key])), r)[f"ndcg@{cutoff}"] for r in found]
        assert np.mean(ours) == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        ("qrels.txt", "100 Q0 1", "qrels.txt:121: 3 fields; qrels are query id, 0, passage id and grade"),
        ("qrels.txt", "100 Q0 1 4", "qrels.txt:121: grade '4' is none of 0 to 3"),
        ("qrels.txt", "100 Q0 1 one", "qrels.txt:121: grade 'one' is none of 0 to 3"),
        ("qrels.txt", "100 Q0 1 2", "qrels.txt:121: judges passage '1' for query '100' again; keep one"),
        ("qrels.txt", "100 Q0 9999 2", "qrels.txt:121: passage '9999' is not in "),
        ("qrels.txt", "99 Q0 1 2", "qrels.txt:121: query '99' is not in "),
        (
            "collection.tsv",
            "900\ta\tb",
            "collection.tsv:151: 3 columns between tabs, not 2; correct the line",
        ),
        ("collection.tsv", "1\ta", "collection.tsv:151: id '1' appears twice; keep one"),
        ("queries.tsv", "no tab", "queries.tsv:18: 1 columns between tabs, not 2"),
        ("queries.tsv", "\udcff\ta", "queries.tsv:18: not UTF-8 at byte 1"),
    ],
)
def test_a_mistake_in_a_collection_is_one_line(tmp_path, name, line, says):
    fields, _ = collection(tmp_path)
    with open(tmp_path / name, "a", errors="surrogateescape") as file:
        file.write(f"{line}\n")
    assert_refused("passages", tmp_path, says, **fields)


def assert_refused(name, folder, says, **fields):
    with pytest.raises(UserError) as error:
        opened(name, folder, **fields)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_is_missing_is_asked_for(tmp_path):
    fields, _ = collection(tmp_path)
    path = {"data.path": fields["data.path"]}
    assert_refused("passages", tmp_path, "data.labels is empty", **path)
    assert_refused(
        "passages", tmp_path, "data.meta_path is empty", **path, **{"data.labels": fields["data.labels"]}
    )
    top = candidates(tmp_path)
    with open(top["data.path"], "a") as file:
        file.write("3\t307\twhat is 3?\tagain\n")
    assert_refused("passages", tmp_path, "top1000.dev:481: passage '307' appears twice for query '3'", **top)
    for text, says in (
        ("one column\n", "few.tsv:1: 1 columns between tabs; give a collection (2)"),
        ("", "few.tsv:1: 0 columns"),
        (
            "q\tright\twrong\n",
            "few.tsv: 2 passages and 1 queries that have a relevant one make no list of task.k=8",
        ),
        ("q\tright\twrong\nq\tright\n", "few.tsv:2: 2 columns between tabs, not 3"),
        ("q\t \twrong\n", "few.tsv:1: the relevant passage is empty; take the line out"),
    ):
        (tmp_path / "few.tsv").write_text(text)
        assert_refused("passages", tmp_path, says, **{"data.path": tmp_path / "few.tsv"})
    (tmp_path / "none").write_text("\n")
    with pytest.raises(UserError, match="has no judgements"):
        list(read_qrels(tmp_path / "none"))


# --- products


def examples():
    """Rows of the published columns: ten products a query, and some that the ranking task in English leaves out."""
    rng = random.Random(0)
    rows = [
        (q, f"query {q}", f"B{q:03}{i}", "us", rng.choice("EESSCI"), 1, "test" if q % 4 == 0 else "train")
        for q in range(QUERIES) for i in range(10)
    ]  # fmt: skip
    rows += [(900, "otra", f"B900{i}", "es", "E", 1, "train") for i in range(9)]
    rows += [(901, "large", f"B901{i}", "us", "E", 0, "train") for i in range(9)]
    rows += [(902, "all exact", f"B902{i}", "us", "E", 1, "train") for i in range(9)]
    names = ("query_id", "query", "product_id", "product_locale", "esci_label", "small_version", "split")
    return [dict(zip(names, row, strict=True), example_id=i, large_version=1) for i, row in enumerate(rows)]


def products(rows):
    """A row for each product, in two locales, with all columns."""
    more = ("product_description", "product_bullet_point", "product_brand", "product_color")
    keys = sorted({(row["product_id"], locale) for row in rows for locale in ("us", row["product_locale"])})
    return [
        {"product_id": product, "product_title": f"{locale} product {product}", "product_locale": locale}
        | dict.fromkeys(more, "text")
        for product, locale in keys
    ]


def written(folder, rows, catalogue):
    """The two files."""
    paths = {"data.path": folder / "examples.parquet", "data.meta_path": folder / "products.parquet"}
    for path, table in zip(paths.values(), (rows, catalogue), strict=True):
        pq.write_table(pa.Table.from_pylist(table), path, write_page_checksum=True)
    return paths


def test_products_are_read_with_their_labels_and_splits(tmp_path):
    rows = examples()
    task, splits = opened("esci", tmp_path, **written(tmp_path, rows, products(rows)))
    labels = {row["product_id"]: "ICSE".index(row["esci_label"]) for row in rows}
    assert {int(r.product_id) % 4 == 0 for r in splits.validation} == {True}
    assert {int(r.product_id) % 4 == 0 for r in splits.train} == {False}
    assert {int(r.product_id) for r in records(splits)} == set(range(QUERIES))
    for record in records(splits):
        assert record.title == f"query {record.product_id}" and len(set(record.reviews)) == 8
        for title, score in zip(record.reviews, record.scores, strict=True):
            assert title.startswith("us product ") and labels[title.split()[-1]] == score
        prompt = task.prompt(record)
        assert "[Product 8] id=r8 us product B" in prompt and '"product_id":"r1"' in prompt
        assert task.parse(task.answer(record), record) == Parsed("ok", tuple(map(float, record.scores)))
        assert highest_score(task, record) == 3
    assert task.settings == {"gain": "esci"}
    assert_ndcg(task, records(splits), lambda scores: [(0, 1, 10, 100)[s] for s in scores])
    failed = task.score(Parsed("k_minus_1"), splits.train[0])
    assert failed["useful"] == 0 and np.isnan(failed["ndcg@1"])


def test_a_product_without_a_title_is_left_out(tmp_path):
    rows, catalogue = examples(), products(examples())
    for product in catalogue:
        if product["product_id"].endswith("3"):
            product["product_title"] = None
    _, splits = opened("esci", tmp_path, **written(tmp_path, rows, catalogue))
    assert not any(title.endswith("3") for r in records(splits) for title in r.reviews)


@pytest.mark.parametrize(
    ("row", "change", "says"),
    [
        (2, {"esci_label": "X"}, "examples.parquet: row 3: esci_label is 'X', none of E, S, C, I"),
        (2, {"esci_label": None}, "examples.parquet: row 3: esci_label is 'None'"),
        (2, {"split": "dev"}, "examples.parquet: row 3: split is 'dev', neither train nor test"),
        (2, {"split": "train"}, "examples.parquet: row 3: split is not that of others for query_id 0"),
        (
            2,
            {"product_id": "B0000"},
            "examples.parquet: row 3: product_id 'B0000' appears twice for query_id 0",
        ),
        (2, {"product_id": "B7"}, "examples.parquet: row 3: product_id 'B7' is not in "),
    ],
)
def test_a_mistake_in_the_examples_is_one_line(tmp_path, row, change, says):
    rows = examples()
    catalogue = products(rows)
    rows[row] |= change
    assert_refused("esci", tmp_path, says, **written(tmp_path, rows, catalogue))


def test_another_byte_in_a_text_is_noticed_by_its_checksum(tmp_path):
    rows = examples()
    fields = written(tmp_path, rows, products(rows))
    data = fields["data.meta_path"].read_bytes()
    assert b"us product B0000" in data
    fields["data.meta_path"].write_bytes(data.replace(b"us product B0000", b"us produce B0000"))
    assert_refused("esci", tmp_path, "products.parquet: is not a readable Parquet file", **fields)


def test_files_that_are_not_those_are_one_line(tmp_path):
    rows = examples()
    fields = written(tmp_path, rows, products(rows))
    assert_refused("esci", tmp_path, "data.meta_path is empty", **{"data.path": fields["data.path"]})
    swapped = dict(zip(fields, reversed(fields.values()), strict=True))
    assert_refused("esci", tmp_path, "products.parquet: has no column query, query_id, esci_label", **swapped)
    assert_refused(
        "esci", tmp_path, "esci has gains of its own", **fields, **{"task.ndcg_gain": "exponential"}
    )
    assert_refused("esci", tmp_path, "no query has task.k=11 products", **fields, **{"task.k": 11})
    whole = fields["data.path"].read_bytes()
    for content in (
        b"",
        b"query_id,query\n1,a\n",
        whole[: len(whole) // 2],
        whole[:200] + b"\xff" * 300 + whole[500:],
    ):
        fields["data.path"].write_bytes(content)
        assert_refused("esci", tmp_path, "examples.parquet: is not a readable Parquet file", **fields)


# --- from files to a report


TABLES = {
    "passages": {"path": "collection.tsv", "meta_path": "queries.tsv", "labels": "qrels.txt"},
    "esci": {"path": "examples.parquet", "meta_path": "products.parquet"},
}


@pytest.mark.soak
def test_the_files_of_the_documentation_are_a_run_to_the_report(tmp_path):
    """benchmarks/ranking_files.py and the two commands of docs/bring_your_own.md, at the smallest scale."""
    ranking_files.main([f"--out={tmp_path}/files", "--queries=20"])
    for task, tables in TABLES.items():
        flags = [f"--config.data.{field}={tmp_path}/files/{name}" for field, name in tables.items()]
        flags += [f"--config.task.name={task}", "--config.task.k=2", "--config.opd.lambdas=1.0,"]
        flags += ["--config.data.max_lists=32", "--config.opd.eval_steps=()", "--config.task.max_response=48"]
        ended = run_main(tmp_path / task, *NO_LAMBDA, *flags)
        assert ended.returncode == 0, ended.stderr[-2000:]
        records = json.loads((tmp_path / task / "results.json").read_text())
        assert {r["stage"] for r in records} == {"sft_teacher", "sft_student", "forecast", "opd"}
        assert all(
            r["n"] == 6 and sum(r["failures"].values()) == 6 and r["ended"] is not None for r in records
        )
        page = (tmp_path / task / "report.html").read_text()
        assert (
            "NDCG@1" in page and "Which teacher errors transfer" in page and f"{TABLES[task]['path']}" in page
        )
