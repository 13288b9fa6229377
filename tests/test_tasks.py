"""The shipped tasks other than reviews and json: what they make of the published files, and of broken ones."""

import gzip
import json
import re
import shutil

import numpy as np
import pytest
from ranx import Qrels, Run, evaluate

from listopd_jax import config as config_module
from listopd_jax.errors import UserError
from listopd_jax.task.contract import TOKEN_CLASSES, Parsed
from listopd_jax.tasks.bfcl import accepts, json_schema
from listopd_jax.tasks.cranfield import BEST, read_judgements, read_sections
from listopd_jax.tasks.load import load_task
from listopd_jax.tasks.synthetic_queries import parts, synthetic_lists


def opened(name, folder, **fields):
    """The task on some files, and all of its records."""
    config = config_module.defaults()
    config.task.name = name
    plain = {field: value if isinstance(value, int) else str(value) for field, value in fields.items()}
    config.update_from_flattened_dict(plain)
    config = config_module.validate(config)
    task = load_task(config)
    return task, task.splits(folder / "out")


# --- function calls


@pytest.fixture(scope="module")
def calls(shared, tmp_path_factory):
    path = shared / "data" / "bfcl" / "BFCL_v4_simple_python.json"
    answers = path.with_name(f"possible_answer_{path.name}")
    folder = tmp_path_factory.mktemp("bfcl")
    return opened("bfcl", folder, **{"data.path": path, "data.labels": answers})


def test_every_published_call_is_right_under_its_own_schema(calls):
    task, splits = calls
    records = [*splits.train, *splits.validation]
    assert len(records) == 400 and len(splits.validation) == 40
    unanswered = [r.key for r in records if task.answer(r) is None]
    assert unanswered == ["simple_python_200"], "whose answer is none of its enum"
    assert any("1 training records have no answer" in note for note in splits.report["notes"])
    for record in records:
        if record.key not in unanswered:
            parsed = task.parse(task.answer(record), record)
            assert task.score(parsed, record) == {"useful": 1.0, "arguments": 1.0}


def test_wrong_calls_fail_or_score_as_they_should(calls):
    task, splits = calls
    record = next(r for r in (*splits.train, *splits.validation) if r.key == "simple_python_0")

    def judged(name="calculate_triangle_area", **arguments):
        parsed = task.parse(json.dumps({"name": name, "arguments": arguments}), record)
        return parsed.failure if not parsed.ok else task.score(parsed, record)

    assert (
        judged(base=10, height=5) == judged(base=10, height=5, unit="Units") == {"useful": 1, "arguments": 1}
    )
    assert judged(base=11, height=5) == {"useful": 0, "arguments": pytest.approx(2 / 3)}
    assert judged(base=10, height=5, unit="cm")["useful"] == 0
    assert judged(name="area", base=10, height=5) == "wrong_name"
    assert judged(base=10) == "missing_argument"
    assert judged(base=10, height=5, width=1) == "unknown_argument"
    assert judged(base="10", height=5) == "wrong_type"
    assert task.parse("calculate(10, 5)", record).failure == "no_json"
    names = task.token_classes(['{"', "name", '":"', "f", '"}', ""])
    assert [TOKEN_CLASSES[i] for i in names] == ["brace", "field", "colon", "other", "brace", "eos"]


def test_the_types_of_the_files_become_json_schema():
    described = {
        "type": "dict",
        "required": ["x"],
        "properties": {"x": {"type": "tuple", "items": {"type": "float"}}, "y": {"type": "any"}},
    }
    assert json_schema(described, "here") == {
        "type": "object",
        "required": ["x"],
        "properties": {"x": {"type": "array", "items": {"type": "number"}}, "y": {}},
        "additionalProperties": False,
    }
    for accepted, value in (
        ([[1, 2]], [1, 2]),
        (["New York, NY"], "new york ny"),
        ([{"a": [1], "b": ["", 2]}], {"a": 1}),
    ):
        assert accepts(accepted, value)
    for accepted, value in (([1], True), (["a"], "b"), ([{"a": [1]}], {"a": 1, "b": 2}), ([[1, 2]], [2, 1])):
        assert not accepts(accepted, value)


@pytest.mark.parametrize(
    ("row", "possible", "says"),
    [
        ({"id": "b"}, {}, "q.json:1: id 'b' has no possible answer in"),
        ({"id": 3}, {}, "q.json:1: field 'id' must be a str"),
        (
            {"question": []},
            {},
            "q.json:1: has several turns, functions or calls; give the simple_python file",
        ),
        ({"function": [{"name": "f"}]}, {}, "q.json:1: field 'parameters' must be a dict"),
        ({"question": [["hello"]]}, {}, "messages[1]: a message is"),
        ({"question": ["hello"]}, {}, "q.json:1: field 'question' must hold a list of messages"),
        ({}, {"ground_truth": [{"g": {}}]}, "a.json:1: field 'f' must be a dict"),
        ({}, {"ground_truth": [{"f": {"x": 3}}]}, "a.json:1: 'x' must have a list of accepted values"),
        (
            {},
            {"ground_truth": [{"f": {"x": [{"y": {"0": 1}}]}}]},
            "a.json:1: 'y' must have a list of accepted",
        ),
        (
            {"function": [{"name": "f", "parameters": {"properties": {"x": "an int"}}}]},
            {},
            "q.json:1: a parameter is described by str, not an object",
        ),
        (
            {"function": [{"name": "f", "parameters": {"properties": {"x": {"type": "HashMap"}}}}]},
            {},
            "q.json:1: the type of a parameter is 'HashMap', which simple_python does not have; give its files",
        ),
    ],
)
def test_a_mistake_in_the_questions_is_one_line(tmp_path, row, possible, says):
    good = {
        "id": "a",
        "question": [[{"role": "user", "content": "?"}]],
        "function": [{"name": "f", "parameters": {}}],
    }
    (tmp_path / "q.json").write_text(json.dumps(good | row))
    (tmp_path / "a.json").write_text(json.dumps({"id": "a", "ground_truth": [{"f": {}}]} | possible))
    with pytest.raises(UserError) as error:
        opened("bfcl", tmp_path, **{"data.path": tmp_path / "q.json", "data.labels": tmp_path / "a.json"})
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_accepted_object_is_answered_with_the_first_value_of_each_field_that_is_one(tmp_path):
    """ "" says that a field may be left out; where it came first, the record had no right answer."""
    fields = {"x": {"type": "integer"}, "y": {"type": "integer"}, "z": {"type": "integer"}}
    described = {"type": "dict", "properties": {"o": {"type": "dict", "properties": fields}}}
    question = {"question": [[{"role": "user", "content": "?"}]]}
    ask = [question | {"id": i, "function": [{"name": i, "parameters": described}]} for i in "ab"]
    accepted = {"o": [{"x": [1], "y": ["", 2], "z": [""]}]}
    (tmp_path / "q.json").write_text("\n".join(map(json.dumps, ask)))
    answers = [{"id": i, "ground_truth": [{i: accepted}]} for i in "ab"]
    (tmp_path / "a.json").write_text("\n".join(map(json.dumps, answers)))
    files = {"data.path": tmp_path / "q.json", "data.labels": tmp_path / "a.json"}
    task, splits = opened("bfcl", tmp_path, **files)
    record = splits.train[0]
    assert json.loads(task.answer(record))["arguments"] == {"o": {"x": 1, "y": 2}}
    assert task.score(task.parse(task.answer(record), record), record)["useful"] == 1


# --- passages


@pytest.fixture(scope="module")
def passages(shared, tmp_path_factory):
    return cranfield(shared, tmp_path_factory.mktemp("cran"))


def cranfield(shared, out, **fields):
    folder = shared / "data" / "cranfield"
    files = {"data.path": "cran.all.1400", "data.meta_path": "cran.qry", "data.labels": "cranqrel"}
    return opened("cranfield", out, **{k: folder / v for k, v in files.items()}, **fields)


def word(number):
    """A word of letters."""
    return "word" + "".join(chr(ord("a") + int(digit)) for digit in str(number))


def test_the_collection_is_read_as_it_is_published(shared):
    folder = shared / "data" / "cranfield"
    documents, queries = read_sections(folder / "cran.all.1400", "W"), read_sections(folder / "cran.qry", "W")
    assert list(documents) == list(range(1, 1401)) and len(queries) == 225
    assert documents[1].startswith(
        "experimental investigation of the aerodynamics of a wing in a slipstream ."
    )
    judged = read_judgements(folder / "cranqrel", 225, documents)
    assert len(judged) == 225 and 0 not in {label for of in judged.values() for label in of.values()}
    assert judged[1][184] == 3 and 995 not in judged[1], (
        "grade 2 is the second best; what is empty is left out"
    )
    assert list(queries)[2] == 4 and judged[3], "the third query is called 4"


def test_lists_are_of_one_query_and_have_a_ranking(passages):
    task, splits = passages
    assert {r.product_id for r in splits.train}.isdisjoint({r.product_id for r in splits.validation})
    assert {int(r.product_id) for r in (*splits.train, *splits.validation)} == set(range(1, 226))
    for record in splits.validation:
        assert len(record.scores) == len(set(record.reviews)) == 8
        assert 1 <= sum(score > 0 for score in record.scores) <= 4 and max(record.scores) <= 4
        prompt = task.prompt(record)
        assert prompt.startswith("Query: ") and "[Passage 8] id=r8 " in prompt
        assert task.parse(task.answer(record), record) == Parsed("ok", tuple(map(float, record.scores)))
        assert not task.parse(task.answer(record).replace("passage", "review"), record).ok
    first = [record.scores[0] for record in splits.train]
    assert 0.2 < np.mean([score > 0 for score in first]) < 0.6, "the place of a passage says nothing"


@pytest.fixture(scope="module")
def with_synthetic(shared, tmp_path_factory):
    return cranfield(shared, tmp_path_factory.mktemp("synthetic"), **{"data.synthetic_queries": 300})


def test_synthetic_lists_are_for_training_alone(passages, with_synthetic):
    _, plain = passages
    task, splits = with_synthetic
    assert splits.validation == plain.validation and splits.train[:-300] == plain.train
    assert splits.report["fingerprint"] != plain.report["fingerprint"]
    assert "300 training lists have synthetic queries: nobody has judged them" in splits.report["notes"]
    for record in splits.train[-300:]:
        assert task.prompt(record).startswith(f"Query: {record.title} Below are 8 passages.")
        assert len(set(record.reviews)) == 8 and set(record.scores) <= {0, 2, 4}
        for text, label in zip(record.reviews, record.scores, strict=True):
            shared = set(record.title.split()) & set(re.findall("[a-z]+", text.lower()))
            assert len(shared) >= label
    relevant = np.array([record.scores for record in splits.train[-300:]]) > 0
    assert (np.abs(relevant.mean(0) - 2.5 / 8) < 0.1).all(), "the place of a passage says nothing"
    # Nor do the labels before it: of a constant number the last would follow from the others.
    assert (
        set(relevant.sum(1)) == {1, 2, 3, 4} and 0.1 < relevant[relevant[:, :-1].sum(1) == 2, -1].mean() < 0.5
    )


def test_nothing_of_a_held_out_query_is_in_a_synthetic_list(with_synthetic):
    """Neither a text that is relevant to it, in whichever of its lists, nor the query."""
    _, splits = with_synthetic
    shown = {text for record in splits.train[-300:] for text in record.reviews}
    relevant = {
        text
        for record in splits.validation
        for text, score in zip(record.reviews, record.scores, strict=True)
        if score
    }
    assert shown.isdisjoint(relevant) and len(shown) > 500
    assert {r.title for r in splits.train[-300:]}.isdisjoint({r.title for r in splits.validation})


def test_lists_of_a_held_out_query_that_max_lists_drops_are_held_out_too(shared, tmp_path):
    fields = {"data.synthetic_queries": 300, "data.max_lists": 20}
    _, few = cranfield(shared, tmp_path / "few", **fields)
    _, whole = cranfield(shared, tmp_path / "whole")
    queries, shown = {r.product_id for r in few.validation}, {t for r in few.train[-300:] for t in r.reviews}
    lists = [r for r in (*whole.train, *whole.validation) if r.product_id in queries]
    assert len(few.validation) == 2 < len(lists)
    assert not any(t in shown for r in lists for t, s in zip(r.reviews, r.scores, strict=True) if s)


def test_parts_are_the_texts_cut_each_once():
    texts = ["a b c d e", "", "f g a b", "a b"]
    assert parts(texts, 2) == ["a b", "c d", "e", "f g"]
    assert parts(texts, 0) == ["a b c d e", "f g a b", "a b"]


def test_synthetic_lists_depend_on_the_seed_alone():
    texts = [f"the flow of {' and '.join(map(word, range(i, i + 4)))}" for i in range(0, 800, 4)]
    lists = list(synthetic_lists(texts, 20, 4, BEST, seed=1))
    assert (
        lists
        == list(synthetic_lists(texts, 20, 4, BEST, seed=1))
        != list(synthetic_lists(texts, 20, 4, BEST, seed=2))
    )
    assert len({record.key for record in lists}) == 20


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"task.max_review_words": 1}, "0 texts have 4 uncommon words, too few for lists of task.k=8"),
        ({"data.synthetic_queries": -1}, "data.synthetic_queries=-1: must be >= 0"),
        (
            {"task.name": "bfcl"},
            "data.synthetic_queries is of task.name='cranfield', not of 'bfcl'; set it to 0",
        ),
    ],
)
def test_a_mistake_about_synthetic_queries_is_one_line(shared, tmp_path, fields, says):
    with pytest.raises(UserError) as error:
        cranfield(shared, tmp_path, **{"data.synthetic_queries": 9} | fields)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_ndcg_is_trec_evals(passages):
    """ranx computes NDCG as trec_eval does: linear gain of the graded label."""
    task, splits = passages
    rng, records = np.random.default_rng(0), splits.validation
    scores = {r.key: rng.permutation(8).astype(float) for r in records}
    qrels = {r.key: {f"d{i}": s for i, s in enumerate(r.scores)} for r in records}
    run = {key: {f"d{i}": float(s) for i, s in enumerate(of)} for key, of in scores.items()}
    for cutoff in (1, 3, 5, 10):
        ours = [task.score(Parsed("ok", tuple(scores[r.key])), r)[f"ndcg@{cutoff}"] for r in records]
        assert np.mean(ours) == pytest.approx(evaluate(Qrels(qrels), Run(run), f"ndcg@{cutoff}"), abs=1e-9)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("cranqrel", "1 184\n", "cranqrel:1: 2 fields; write query, document and grade"),
        ("cranqrel", "1 184 2\n226 1 1\n", "cranqrel:2: no such query, document or grade"),
        ("cranqrel", "1 a 1\n", "cranqrel:1: 'a' is not a whole number"),
        ("cran.qry", "hello\n", "cran.qry: has no .I entries"),
        ("cran.all.1400", ".I one\n", "cran.all.1400:1: 'one' is not a whole number"),
        ("cran.all.1400", ".I 1_0\n", "cran.all.1400:1: '1_0' is not a whole number"),
        ("cran.all.1400", ".I 1\n.W\na\n.I 1\n", "cran.all.1400:4: a second entry .I 1; keep one"),
        (
            "cran.all.1400",
            ".I 1\n.T\na\n.T\nb\n",
            "cran.all.1400:4: a second title in entry .I 1; put the line .I",
        ),
        (
            "cran.all.1400",
            ".I 1\n.W\n\udcff\n",
            "cran.all.1400:3: not UTF-8 at byte 1; save the file as UTF-8",
        ),
    ],
)
def test_a_mistake_in_the_collection_is_one_line(shared, tmp_path, name, text, says):
    shutil.copytree(shared / "data" / "cranfield", tmp_path / "c", copy_function=shutil.copyfile)
    (tmp_path / "c").chmod(0o755)
    files = {"data.path": "cran.all.1400", "data.meta_path": "cran.qry", "data.labels": "cranqrel"}
    fields = {k: tmp_path / "c" / v for k, v in files.items()}
    (tmp_path / "c" / name).write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=f"{name}: truncated or modified"):
        opened("cranfield", tmp_path, **fields)
    config = config_module.defaults()
    config.task.name, config.data.verify = "cranfield", False
    config.update_from_flattened_dict({k: str(v) for k, v in fields.items()})
    with pytest.raises(UserError) as error:
        load_task(config_module.validate(config)).splits(tmp_path / "out")
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_part_of_a_collection_too_small_for_a_list_is_one_line_and_a_packed_one_is_read(tmp_path):
    texts = {
        "data.path": b"".join(b".I %d\n.T\nt\n.W\ntext %d\n" % (i, i) for i in range(1, 13)),
        "data.meta_path": b".I 1\n.W\none\n.I 2\n.W\ntwo\n",
        "data.labels": b"1 1 1\n2 2 1\n",
    }
    fields = {field: tmp_path / field for field in texts}
    for field, path in fields.items():
        path.write_bytes(gzip.compress(texts[field]))
    _, splits = opened("cranfield", tmp_path, **fields)
    assert [r.scores.count(4) for r in (*splits.train, *splits.validation)] == [1, 1]
    fields["data.path"].write_bytes(texts["data.path"].split(b".I 8")[0])
    with pytest.raises(UserError, match="6 abstracts are not relevant to query 1, too few .* task.k=8"):
        opened("cranfield", tmp_path, **fields)


@pytest.mark.parametrize("name", ["bfcl", "cranfield"])
def test_files_that_are_not_named_are_asked_for(tmp_path, name):
    (tmp_path / "data").write_text("{}")
    with pytest.raises(UserError, match=r"data\.(labels|meta_path) is empty: give"):
        opened(name, tmp_path, **{"data.path": tmp_path / "data"})
