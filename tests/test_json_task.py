"""Task json: what a file may say, what is said of each mistake in it, and how answers are judged and scored."""

import gzip
import json
import os
import pathlib
import re
import time

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from listopd_jax import config as config_module
from listopd_jax.data.chat import role_lines
from listopd_jax.errors import UserError
from listopd_jax.task.contract import TOKEN_CLASSES
from listopd_jax.task.metrics import summarize
from listopd_jax.task.schema import Contract
from listopd_jax.task.strict_json import dumps, loads, same
from listopd_jax.tasks.json_records import LONGEST_NAME, MOST_FIELDS, JsonTask, share_right

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z]"},
        "count": {"type": "integer", "minimum": 1},
        "tags": {"type": "array", "items": {"enum": ["new", "used"]}},
        "place": {"$ref": "#/$defs/place"},
    },
    "required": ["name", "count"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
}
LINES = [{"prompt": f"order {i}", "answer": {"name": f"N{i}", "count": i + 1}} for i in range(20)]


def task_of(folder, lines, schema=SCHEMA, **fields):
    """The task on a file of `lines`, objects or texts, and a schema, object or text or None."""
    path = folder / "data.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    config = config_module.defaults()
    config.task.name, config.data.path = "json", str(path)
    if schema is not None:
        config.task.schema = str(folder / "schema.json")
        pathlib.Path(config.task.schema).write_text(schema if isinstance(schema, str) else json.dumps(schema))
    config.update_from_flattened_dict(fields)
    config = config_module.validate(config)
    return JsonTask(config.data, config.task)


def records_of(folder, lines, schema=SCHEMA, **fields):
    task = task_of(folder, lines, schema, **fields)
    splits = task.splits(folder / "out")
    return task, splits


# --- files


def test_lines_are_split_once_and_for_all(tmp_path):
    task, splits = records_of(tmp_path, LINES)
    assert (len(splits.train), len(splits.validation)) == (18, 2)
    again = records_of(tmp_path, LINES)[1]
    assert again.report == splits.report and [r.key for r in again.train] == [r.key for r in splits.train]
    other = records_of(tmp_path, LINES, **{"data.seed": 1})[1]
    assert {r.key for r in other.validation} != {r.key for r in splits.validation}
    assert other.report["fingerprint"] != splits.report["fingerprint"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == other.report
    few = records_of(tmp_path, LINES, **{"data.max_lists": 5})[1]
    assert (len(few.train), len(few.validation)) == (4, 1)


def test_packed_files_and_blank_lines_are_read(tmp_path):
    task = task_of(tmp_path, ["", *LINES, "   "])
    path = tmp_path / "data.jsonl"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + path.read_bytes().lstrip()))
    records = list(task.read(path))
    assert [r.key for r in records][:2] == ["data.jsonl:1", "data.jsonl:2"] and len(records) == 20


def test_equal_prompts_stay_on_one_side(tmp_path):
    lines = [line for line in LINES for _ in range(3)]
    for seed in range(5):
        _, splits = records_of(tmp_path, lines, **{"data.seed": seed})
        sides = [{r.prompt for r in part} for part in (splits.train, splits.validation)]
        assert not sides[0] & sides[1] and len(splits.validation) == 6


HELLO = {"role": "user", "content": "hello"}
SAME_PROMPT = [
    ({"messages": [HELLO]}, {"messages": [{"content": "hello", "role": "user"}]}),
    ({"messages": [HELLO]}, {"messages": [HELLO | {"name": "Anna"}]}),
    ({"messages": [HELLO]}, {"prompt": "hello"}),
    ({"prompt": "hello"}, {"prompt": "hello \n"}),
    ({"messages": [HELLO]}, {"messages": [HELLO | {"content": " hello"}]}),
]
OTHER_PROMPT = [
    ({"messages": [HELLO]}, {"messages": [{"role": "system", "content": "Be brief."}, HELLO]}),
    ({"messages": [HELLO]}, {"messages": [HELLO | {"role": "tool"}]}),
    ({"prompt": "hello"}, {"prompt": "hel lo"}),
]


@pytest.mark.parametrize("a_b", SAME_PROMPT + OTHER_PROMPT)
def test_a_prompt_written_in_another_way_is_the_same_prompt(tmp_path, a_b):
    sides = [{**line, "fold": side} for line, side in zip(a_b, ("train", "validation"), strict=True)]
    lines = [*sides, *({"prompt": f"p{i}", "fold": side["fold"]} for i, side in enumerate(sides))]
    if a_b in SAME_PROMPT:
        with pytest.raises(UserError, match="data.jsonl:2: is for validation, but its prompt is that of"):
            records_of(tmp_path, lines, **{"data.split_field": "fold"})
        for seed in range(4):
            splits = records_of(tmp_path, [*a_b, *LINES], **{"data.seed": seed})[1]
            assert len({"data.jsonl:1", "data.jsonl:2"} & {r.key for r in splits.validation}) in (0, 2)
    else:
        assert len(records_of(tmp_path, lines, **{"data.split_field": "fold"})[1].train) == 2


def test_the_split_of_texts_is_that_of_older_workdirs(tmp_path):
    splits = records_of(tmp_path, LINES)[1]
    assert [r.key for r in splits.validation] == ["data.jsonl:5", "data.jsonl:20"]


def test_a_field_may_say_the_side(tmp_path):
    lines = [line | {"fold": "validation" if i % 4 == 0 else "train"} for i, line in enumerate(LINES)]
    _, splits = records_of(tmp_path, lines, **{"data.split_field": "fold"})
    assert sorted(r.key for r in splits.validation) == sorted(f"data.jsonl:{i}" for i in (1, 5, 9, 13, 17))
    wrong = [*lines, LINES[1] | {"fold": "validation"}]
    with pytest.raises(
        UserError, match=r"data.jsonl:21: is for validation, but its prompt is that of data.js"
    ):
        records_of(tmp_path, wrong, **{"data.split_field": "fold"})
    with pytest.raises(
        UserError, match=r"data.jsonl:1: 'fold' \(data.split_field\) is None; every line must"
    ):
        records_of(tmp_path, LINES, **{"data.split_field": "fold"})
    with pytest.raises(UserError, match="no record is for validation"):
        records_of(tmp_path, [x | {"fold": "train"} for x in LINES], **{"data.split_field": "fold"})


def deep(levels):
    return "[" * levels + "]" * levels


GOOD = {"name": "Anna", "count": 3}
MISTAKES = [
    ('{"prompt": "p", "answer": {', "data.jsonl:1: not JSON: "),
    ('{"prompt": "p", "prompt": "q"}', "data.jsonl:1: the key 'prompt' appears twice in one object"),
    ('{"prompt": "p", "answer": {"name": "A", "count": NaN}}', "data.jsonl:1: NaN is not JSON"),
    ('{"prompt": "p", "answer": -Infinity}', "-Infinity is not JSON"),
    ('{"prompt": "p", "answer": 1e999}', "the number 1e999 is out of range"),
    ('{"prompt": "p", "answer": ' + "9" * 5000 + "}", "is out of range"),
    ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
    ('{"prompt": "p", "answer": ' + deep(100) + "}", "nested deeper than 64 levels"),
    ('{"prompt": "p", "answer": ' + deep(200_000) + "}", "nested deeper than 64 levels"),
    ("[1]", "data.jsonl:1: is list, not an object"),
    ("[", "each line must be one JSON object"),
    ({"prompt": 3}, "data.jsonl:1: 'prompt' is int, not a text"),
    ({"prompt": " "}, "data.jsonl:1: the prompt is empty"),
    ({"promt": "p"}, "data.jsonl:1: unknown field 'promt'; did you mean 'prompt'? rename it"),
    ({"prompt": "p", "answers": GOOD}, "unknown field 'answers'; did you mean 'answer'?"),
    ({"answer": GOOD}, "data.jsonl:1: has neither 'prompt' nor 'messages'; give one of them"),
    ({"prompt": "p", "messages": []}, "has both 'prompt' and 'messages'; give one of them"),
    ({"messages": "p"}, "'messages' is str, not a list of messages"),
    ({"messages": []}, "a prompt is a text or a list of messages"),
    ({"messages": [{"role": "user"}]}, 'messages[0]: a message is {"role": …, "content": …}'),
    ({"messages": [{"role": "human", "content": "p"}]}, "messages[0]: role is 'human'; known: system, user"),
    ({"messages": [{"role": "user", "content": ["p"]}]}, "messages[0]: content must be a text"),
    (
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "{}"}]},
        "the last message is the assistant's; move it to 'answer'",
    ),
    (
        {"prompt": "p", "answer": {"name": "A", "count": 0}},
        "data.jsonl:1: 'answer' breaks its schema at $.count: 0 is less than the minimum of 1; correct the",
    ),
    (
        {"prompt": "p", "answer": json.dumps(GOOD)},
        "it is a text that holds JSON: write it as JSON, without the quotes around it",
    ),
    ({"prompt": "p", "schema": {"type": "strng"}}, "data.jsonl:1: 'schema': at $.type: 'strng' is not valid"),
    ({"prompt": "p", "schema": 3}, "data.jsonl:1: 'schema': a JSON Schema is an object, this is int"),
]


@pytest.mark.parametrize(("line", "says"), MISTAKES)
def test_a_mistake_in_the_file_is_one_line_that_names_it(tmp_path, line, says):
    with pytest.raises(UserError) as error:
        records_of(tmp_path, [line, *LINES])
    assert says in str(error.value) and "data.jsonl:1" in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("lines", "schema", "says"),
    [
        ([], SCHEMA, "data.jsonl: is empty; give one JSON object per line"),
        (["", "  "], SCHEMA, "data.jsonl: is empty"),
        (LINES[:1] * 3, SCHEMA, "at least 2 different prompts are needed"),
        (LINES, None, "data.jsonl:1: has no 'schema', and task.schema is not set; give one of them"),
        (LINES, "{", "schema.json: not JSON: "),
        (LINES, "[]", "schema.json: a JSON Schema is an object, this is list"),
        (LINES, {"type": "objekt"}, "schema.json: at $.type: 'objekt' is not valid"),
        (LINES, {"minimum": "1"}, "schema.json: at $.minimum: '1' is not of type 'number'"),
        (LINES, {"$ref": "https://example.com/s.json"}, "$ref='https://example.com/s.json' leads out of the file"),
        (LINES, {"properties": {"a": {"$ref": "other.json#/x"}}}, "leads out of the file, and nothing is fetched"),
        (LINES, {"$ref": "file:///etc/passwd"}, "leads out of the file"),
        (LINES, {"$ref": "#/$defs/absent"}, "$ref='#/$defs/absent' names nothing in the schema"),
        (LINES, {"$ref": "#"}, "the schema refers to itself without end"),
        (LINES, {"pattern": "^(a|aa)+$"}, "pattern '^(a|aa)+$' takes exponential time on 'aaa…'"),
        (LINES, {"patternProperties": {"^(\\d|\\d\\d)*$": {}}}, "takes exponential time on"),
        (LINES, {"properties": {"a": {"pattern": "("}}}, "pattern '(' is not a regular expression"),
        (
            LINES,
            {"patternProperties": {r"\p{L}": {}}, "unevaluatedProperties": False},
            r"pattern '\\p{L}' next to unevaluatedProperties is not one that Python's re knows",
        ),
        (LINES, {"$schema": "https://example.com/mine"}, "is not a known version of JSON Schema"),
        (LINES, json.dumps({"a": 1}) + deep(100_000), "schema.json: not JSON"),
        (LINES, '{"allOf": ' + deep(80) + "}", "schema.json: nested deeper than 64 levels"),
    ],
)  # fmt: skip
def test_a_mistake_of_the_whole_file_or_the_schema_is_one_line(tmp_path, lines, schema, says):
    began = time.process_time()
    with pytest.raises(UserError) as error:
        records_of(tmp_path, lines, schema)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert time.process_time() - began < 20, "nothing that is hostile takes long"


def test_a_file_that_is_not_utf8_or_not_there_is_one_line(tmp_path):
    task = task_of(tmp_path, LINES)
    (tmp_path / "data.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match="data.jsonl:2: not UTF-8 at byte 13; save the file as UTF-8"):
        list(task.read(tmp_path / "data.jsonl"))
    (tmp_path / "data.jsonl").unlink()
    with pytest.raises(UserError, match="data.path=.*data.jsonl: no such file"):
        task.splits(tmp_path / "out")
    with pytest.raises(UserError, match="task.schema=.*absent: cannot be read"):
        task_of(tmp_path, LINES, None, **{"task.schema": str(tmp_path / "absent")})


# --- judging


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ('{"name":"Anna","count":3}', "ok"),
        (' {"count": 3.0, "name": "Anna", "tags": []}\n', "ok"),
        ('{"name":"Anna","count":3', "no_json"),
        ('so: {"name":"Anna","count":3}', "no_json"),
        ('{"name":"Anna","count":3}{}', "no_json"),
        ('{"name":"Anna","count":3,"count":3}', "no_json"),
        ('{"name":"Anna","count":NaN}', "no_json"),
        ("", "no_json"),
        (deep(5000), "no_json"),
        ("[]", "type"),
        ('{"name":"Anna"}', "count/required"),
        ('{"name":"anna","count":3}', "name/pattern"),
        ('{"name":"Anna","count":"3"}', "count/type"),
        ('{"name":"Anna","count":0}', "count/minimum"),
        ('{"name":"Anna","count":true}', "count/type"),
        ('{"name":"Anna","count":3,"tags":["old"]}', "tags/[]/enum"),
        ('{"name":"Anna","count":3,"place":{}}', "place/city/required"),
        ('{"name":"Anna","count":3,"place":{"city":1}}', "place/city/type"),
        ('{"name":"Anna","count":3,"more":1}', "additionalProperties"),
    ],
)
def test_a_failure_is_named_by_the_path_that_failed(tmp_path, text, failure):
    task, splits = records_of(tmp_path, LINES)
    assert task.parse(text, splits.train[0]).failure == failure


def test_a_schema_of_a_record_holds_for_it_alone_and_fails_by_keyword(tmp_path):
    lines = [{"prompt": f"p{i}", "schema": {"const": i}, "answer": i} for i in range(6)]
    task, splits = records_of(tmp_path, [*LINES, *lines])
    own = [r for r in (*splits.train, *splits.validation) if isinstance(r.answer, int)]
    assert len(own) == 6
    for record in own:
        assert task.parse(str(record.answer), record).ok
        assert task.parse(str(record.answer + 1), record).failure == "const"


def test_scores_by_hand(tmp_path):
    lines = [{"prompt": "p", "answer": GOOD}, {"prompt": "q"}]
    task = task_of(tmp_path, lines)
    answered, open_ended = task.read(tmp_path / "data.jsonl")
    texts = (
        '{"name":"Anna","count":3}',
        '{"name":"Anna","count":4}',
        '{"count":3,"name":"B","tags":[]}',
        "{",
    )
    judged = [(task.parse(text, answered), answered) for text in texts]
    judged.append((task.parse('{"name":"X","count":1}', open_ended), open_ended))
    found = summarize(task, judged, bootstrap=10)
    assert found["parse"] == 4 / 5 and found["exact_match"] == 1 / 4
    assert found["useful"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 0) / 4)
    assert found["fields"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert found["field name"] == found["field count"] == pytest.approx(2 / 3)
    assert found["field place"] == 1 and found["field tags"] == pytest.approx(2 / 3)
    assert found["counted"]["parse"] == 5 and found["counted"]["useful"] == 4
    assert found["failures"] == {"ok": 4, "no_json": 1}


@pytest.mark.parametrize(
    "schema",
    [None, {"$ref": "#/$defs/o", "$defs": {"o": {"properties": {"count": {}}}}}, {"allOf": [{}]}, {}],
)
def test_fields_of_the_right_answers_have_accuracies_whatever_the_schema_declares(tmp_path, schema):
    lines = [x | {"schema": {}} for x in LINES] if schema is None else LINES
    task, splits = records_of(tmp_path, lines, schema)
    assert task.metrics[4:] == ("field count", "field name")
    record = splits.validation[0]
    scores = task.score(task.parse(json.dumps(record.answer | {"count": 0}), record), record)
    assert (scores["field count"], scores["field name"]) == (0, 1)


def test_declared_fields_come_first_and_the_rarest_are_left_out(tmp_path):
    declared = {"type": "object", "properties": {"rare": {}, "name": {}, "count": {}}}
    lines = [{"prompt": f"p{i}", "answer": {"name": "A", f"k{i:02}": i, "often": 0}} for i in range(30)]
    names = [name.removeprefix("field ") for name in records_of(tmp_path, lines, declared)[0].metrics[4:]]
    assert names == ["name", "often", *(f"k{i:02}" for i in range(18))] and len(names) == MOST_FIELDS
    few = records_of(tmp_path, lines[:3], declared)[0].metrics[4:]
    assert few == tuple(f"field {x}" for x in ("rare", "name", "count", "often", "k00", "k01", "k02"))


@pytest.mark.parametrize("name", ["a\nb", "x" * (LONGEST_NAME + 1), "\x1b[2J", "a\u2028b"])
def test_a_name_that_is_no_printable_line_is_that_of_no_metric(tmp_path, name):
    kept = "y" * LONGEST_NAME
    lines = [{"prompt": f"p{i}", "answer": {name: 1, kept: 2}} for i in range(9)]
    task, splits = records_of(tmp_path, lines, {"properties": {name: {}}})
    assert task.metrics[4:] == (f"field {kept}",)
    wrong = task.parse(json.dumps({name: 0, kept: 2}), splits.train[0])
    assert task.score(wrong, splits.train[0])["useful"] == 0.5, "it still counts"


def test_marks_and_keys_are_structure(tmp_path):
    task = task_of(tmp_path, LINES)
    pieces = ["{", '"', "name", '":', '"', "An", "na", '",', '"count', '":', "3", "}", ""]
    names = [TOKEN_CLASSES[i] for i in task.token_classes(pieces)]
    assert names == "brace quote field colon quote other other comma quote colon other brace eos".split()


def test_messages_without_a_template_are_lines_of_roles():
    turns = [{"role": "system", "content": "Extract."}, {"role": "user", "content": "3 mugs"}]
    assert role_lines(turns) == "system: Extract.\nuser: 3 mugs\nassistant:\n"


def deeper(levels, call):
    return call() if levels == 0 else deeper(levels - 1, call)


def test_a_schema_without_end_is_one_line_wherever_the_recursion_ends():
    """In Rust it ends in a panic, which is no RecursionError and no Exception."""
    schema = {"if": {"type": ["object", "null", "array", "string", "integer"], "$ref": "#"}}
    for levels in range(30):
        with pytest.raises(UserError, match="here: the schema refers to itself without end"):
            deeper(levels, lambda: Contract(schema, "here"))


DRAFT_3, DRAFT_4, DRAFT_7 = (f"http://json-schema.org/draft-0{n}/schema#" for n in (3, 4, 7))


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ({"pattern": "("}, "pattern '(' is not a regular expression"),
        ({"pattern": "^(a|aa)+$"}, "pattern '^(a|aa)+$' takes exponential time on 'aaa…'"),
        ({"$ref": "http://example.com/x"}, "$ref='http://example.com/x' leads out of the file"),
        ({"type": "strng"}, "$ref='#/components/A': at $.type: 'strng' is not valid"),
        ({"properties": 3}, "$ref='#/components/A': at $.properties: 3 is not of type 'object'"),
        ([1], "$ref='#/components/A': at $: [1] is not of type 'object', 'boolean'"),
        ("A", "$ref='#/components/A': at $: 'A' is not of type"),
        ({"items": {"$ref": "#/components/B/0"}}, "$ref='#/components/B/0' names nothing in the schema"),
    ],
)
def test_what_a_reference_leads_to_is_checked_wherever_it_is(target, says):
    schema = {"properties": {"x": {"$ref": "#/components/A"}}, "components": {"A": target, "B": 3}}
    with pytest.raises(UserError) as error:
        Contract(schema, "here")
    assert str(error.value).startswith("here: ") and says in str(error.value)


DYNAMIC, RECURSIVE = {"$dynamicRef": "#nope"}, {"$recursiveRef": "#/nope"}


@pytest.mark.parametrize(
    ("version", "keywords", "known"),
    [
        (DRAFT_7, DYNAMIC | RECURSIVE, False),
        ("https://json-schema.org/draft/2019-09/schema", DYNAMIC, False),
        ("https://json-schema.org/draft/2020-12/schema", RECURSIVE, False),
        ("https://json-schema.org/draft/2020-12/schema", DYNAMIC, True),
    ],
)
def test_only_references_that_the_version_has_are_followed(version, keywords, known):
    schema = {"$schema": version, "type": "integer"} | keywords
    if known:
        with pytest.raises(UserError, match="names nothing in the schema"):
            Contract(schema, "here")
    else:
        assert [Contract(schema, "here").failure(x) for x in (1, "a")] == ["ok", "type"]


@pytest.mark.parametrize(
    ("keyword", "version"), [("$ref", "2020-12"), ("$dynamicRef", "2020-12"), ("$recursiveRef", "2019-09")]
)
def test_a_reference_is_no_step_of_a_failure(keyword, version):
    schema = {"$schema": f"https://json-schema.org/draft/{version}/schema", "type": ["object", "null"]}
    schema |= {"properties": {"next": {keyword: "#"}}}
    assert Contract(schema, "here").failure({"next": 3}) == "next/type"


def test_parts_that_refer_to_each_other_are_checked_once():
    tree = {"properties": {"left": {"$ref": "#/components/B"}}, "required": ["left"], "type": "object"}
    schema = {"$ref": "#/components/A", "components": {"A": tree, "B": {"anyOf": [{"type": "null"}, tree]}}}
    assert Contract(schema, "here").failure({"left": {"left": None}}) == "ok"
    assert Contract(schema, "here").failure({"left": {}}) != "ok"


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"$schema": DRAFT_3, "type": [{"type": "integer"}]}, "is too old; write the schema in draft-04 or"),
        ({"$schema": DRAFT_3, "extends": {"$ref": "#/x"}}, "is too old"),
        (
            {"$schema": DRAFT_4, "enum": [*map(str, range(200)), "1"]},
            "has non-unique elements; correct the schema",
        ),
        ({"$schema": DRAFT_4, "id": 3}, "here: at $.id: 3 is not of type 'string'"),
        (
            {"$id": "http://a/", "items": {"$id": "http://[b"}},
            "here: cannot be read (ValueError: Invalid IPv6",
        ),
        ({"$schema": DRAFT_7, "dependencies": {"a": ["b"], "c": {"pattern": "("}}}, "pattern '(' is not"),
    ],
)
def test_old_and_odd_schemas_are_one_line(schema, says):
    with pytest.raises(UserError, match=re.escape(says)):
        Contract(schema, "here")


def test_a_version_inside_a_schema_changes_nothing():
    """Neither the patterns' time nor what is a schema: the version is that of the whole."""
    Contract({"definitions": {"x": {"$schema": DRAFT_4, "items": True}}}, "here")
    inner = {"$schema": DRAFT_3, "pattern": r"^\p{L}", "extends": [3]}  # draft-03 would follow `extends`
    contract = Contract({"properties": {"x": inner}}, "here")
    assert [contract.failure({"x": text}) for text in ("é", "1")] == ["ok", "x/pattern"]
    with pytest.raises(UserError, match="takes exponential time"):
        Contract({"properties": {"x": inner | {"pattern": "^(a|aa)+$"}}}, "here")


@pytest.mark.parametrize(
    ("schema", "value", "failure", "by_keyword", "place"),
    [
        ({"properties": {"a": False}}, {"a": 1}, "a/false", "false", "$.a"),
        ({"patternProperties": {"^x": False}}, {"x1": 1}, "^x/false", "false", "$.x1"),
        ({"prefixItems": [{}, False]}, [1, 2], "[]/1/false", "false", "$[1]"),
        ({"properties": {"a": {"$ref": "#/$defs/no"}}, "$defs": {"no": False}}, {"a": 1}, "a/false", "false", "$.a"),
        ({"properties": {"a": {"allOf": [{}, False]}}}, {"a": 1}, "a/allOf/1/false", "false", "$.a"),
        ({"dependentSchemas": {"a": False}}, {"a": 1}, "dependentSchemas/a/false", "false", "$"),
        ({"not": {}}, 1, "not", "not", "$"),
    ],
)  # fmt: skip
def test_a_schema_that_allows_nothing_fails_as_false(schema, value, failure, by_keyword, place):
    contract = Contract(schema, "here")
    assert contract.failure(value) == failure
    assert Contract(schema, "here", by_path=False).failure(value) == by_keyword
    assert contract.explain(value).startswith(f"at {place}: ")


LIKE_PUBLISHED = {  # written here, of the kinds that JSONSchemaBench has: schema, right value, wrong ones by failure
    "function call": (
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "properties": {"amount": {"type": "number", "exclusiveMinimum": 0}, "to": {"enum": ["EUR", "USD"]}},
            "required": ["amount", "to"],
        },
        {"amount": 2.5, "to": "EUR"},
        {"amount/exclusiveMinimum": {"amount": 0, "to": "EUR"}, "to/enum": {"amount": 1, "to": "eur"}},
    ),
    "resource": (
        {
            "$schema": DRAFT_7,
            "x-kind": [{"group": "", "version": "v1"}],
            "properties": {
                "kind": {"const": "Pod"},
                "spec": {"type": ["object", "null"], "additionalProperties": {"type": ["string", "integer"]}},
                "ports": {"type": "array", "items": {"format": "int32", "type": "integer"}},
            },
        },
        {"kind": "Pod", "spec": {"a": 1}, "ports": [80]},
        {"spec/additionalProperties/type": {"spec": {"a": None}}, "ports/[]/type": {"ports": ["80"]}},
    ),
    "event": (
        {
            "$schema": DRAFT_4,
            "self": {"vendor": "org.example", "format": "jsonschema", "version": "1-0-0"},
            "properties": {"at": {"type": "integer", "minimum": 0, "exclusiveMinimum": True}},
            "additionalProperties": False,
        },
        {"at": 1},
        {"at/minimum": {"at": 0}, "additionalProperties": {"on": 1}},
    ),
    "document": (
        {
            "$schema": DRAFT_4,
            "id": "https://example.org/story.json",
            "type": "object",
            "definitions": {
                "part": {"oneOf": [{"$ref": "#/definitions/text"}, {"$ref": "#"}]},
                "text": {"type": "string"},
            },
            "properties": {"parts": {"type": "array", "items": {"$ref": "#/definitions/part"}, "minItems": 1}},
            "required": ["parts"],
        },
        {"parts": ["a", {"parts": ["b"]}]},
        {"parts/minItems": {"parts": []}, "parts/required": {}},
    ),
    "configuration": (
        {
            "$schema": DRAFT_7,
            "properties": {"mode": {"enum": ["on", "off"]}, "retries": {"$ref": "#/$shared/count"}},
            "if": {"properties": {"mode": {"const": "on"}}, "required": ["mode"]},
            "then": {"required": ["retries"]},
            "dependencies": {"proxy": ["mode"], "cache": {"properties": {"cache": {"minLength": 1}}}},
            "patternProperties": {r"^x-\p{L}+$": {"not": {"type": "null"}}},
            "$shared": {"count": {"type": "integer", "multipleOf": 1}},
        },
        {"mode": "on", "retries": 2, "x-é": 1, "cache": "c"},
        {
            "then/retries/required": {"mode": "on"},
            "dependencies": {"proxy": 1},
            "dependencies/cache/cache/minLength": {"cache": ""},
            r"^x-\p{L}+$/not": {"x-a": None},
            "retries/type": {"retries": "2"},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LIKE_PUBLISHED)
def test_schemas_of_the_published_kinds_judge_as_they_should(kind):
    schema, right, wrong = LIKE_PUBLISHED[kind]
    contract = Contract(loads(dumps(schema)), "here")
    assert contract.failure(right) == "ok"
    assert {failure: contract.failure(value) for failure, value in wrong.items()} == {f: f for f in wrong}


@pytest.fixture
def published_schemas(request):
    """The files of JSONSchemaBench (third_party/manifest.toml): in LISTOPD_JSONSCHEMABENCH, or in ../shared."""
    given = os.environ.get("LISTOPD_JSONSCHEMABENCH")
    given = given or request.getfixturevalue("shared") / "data" / "jsonschemabench"
    paths = sorted(pathlib.Path(given).rglob("*.json"))
    if not paths:
        pytest.skip(f"needs the schemas of JSONSchemaBench: LISTOPD_JSONSCHEMABENCH={given} has none")
    return paths


def test_published_schemas_are_contracts_or_one_line(published_schemas):
    """No traceback, at load or later; and few are refused, each for what it is."""
    refused, judged = [], 0
    for path in published_schemas:
        try:
            contract = Contract(loads(path.read_text("utf-8")), path.name)
        except (UserError, ValueError) as e:  # ValueError: of strict JSON, as from task.schema
            assert "\n" not in str(e)
            refused.append(f"{path.parent.name}/{path.name}: {e}")
            continue
        for value in (None, {}, [], "", 0, {"id": "x", "name": 3, "type": [], "spec": {"a": None}}):
            failure = contract.failure(value)
            assert (
                failure and "None" not in failure and (failure == "ok") == (contract.explain(value) is None)
            )
        judged += 1
    print(f"{judged} contracts, {len(refused)} refused", *refused, sep="\n")
    assert len(refused) <= 0.01 * len(published_schemas)


NAMES = st.text("ab", max_size=2) | st.text(max_size=3)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(VALUES)
def test_answers_come_back_from_their_text(value):
    assert same(loads(dumps(value)), value) and share_right(value, loads(dumps(value))) == 1


@settings(max_examples=300)
@given(st.text() | VALUES.map(json.dumps) | st.text('[]{}":,0e1-. tn\\', max_size=30))
def test_every_text_gets_a_verdict(text):
    contract = Contract(SCHEMA, "s")
    try:
        value = loads(text)
    except ValueError as e:
        assert "\n" not in str(e)
    else:
        valid = jsonschema.Draft202012Validator(SCHEMA).is_valid(value)
        assert (contract.failure(value) == "ok") == valid, "the oracle is the unmodified validator"


INNER = st.deferred(lambda: SCHEMAS)
KEYWORDS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["object", "array", "string", "number", "nope"]),
        "properties": st.dictionaries(st.text("ab", max_size=2), INNER, max_size=2),
        "patternProperties": st.dictionaries(
            st.text("a.*+(", max_size=3) | st.just(r"\p{L}"), INNER, max_size=2
        ),
        "additionalProperties": INNER,
        "unevaluatedProperties": INNER,
        "propertyNames": INNER,
        "dependentSchemas": st.dictionaries(st.text("ab", max_size=1), INNER, max_size=1),
        "items": INNER,
        "prefixItems": st.lists(INNER, min_size=1, max_size=2),
        "unevaluatedItems": INNER,
        "contains": INNER,
        "minItems": st.integers(0, 2),
        "maxLength": st.integers(0, 2),
        "exclusiveMaximum": st.sampled_from([0, 1.5, 1e308]),
        "enum": st.lists(st.sampled_from([0, 1, True, None, "a", [1], {"a": 1}]), min_size=1, max_size=3),
        "if": INNER,
        "then": INNER,
        "not": INNER,
        "required": st.lists(st.text("ab", max_size=1), max_size=2) | st.just(True),
        "pattern": st.text("a.*+()[]\\d", max_size=5) | st.sampled_from([r"\p{L}", r"^\S+$"]),
        "multipleOf": st.sampled_from([2, 0.1, 0, "x"]),
        "anyOf": st.lists(INNER, max_size=2),
        "$ref": st.sampled_from(
            ["#", "#/properties/a", "#/components/a", "#/components", "x", "http://x/y", "#/%"]
        ),
        "$schema": st.sampled_from([DRAFT_3, DRAFT_4, DRAFT_7, "http://x", 3]),
        "$id": st.sampled_from(["http://a/b", "c", "::"]),
        "uniqueItems": st.booleans(),
        "dependencies": st.dictionaries(st.text("ab", max_size=1), INNER | st.just(["a"]), max_size=2),
        "components": st.dictionaries(st.just("a"), INNER | VALUES, max_size=1),
    },
)
SCHEMAS = KEYWORDS | st.booleans()


@settings(max_examples=300)
@given(SCHEMAS, VALUES)
def test_any_schema_is_a_contract_or_one_line(schema, value):
    try:
        contract = Contract(schema, "here")
    except UserError as e:
        assert str(e).startswith("here: ") and "\n" not in str(e)
    else:
        assert isinstance(contract.failure(value), str)
