"""The strict parser against an oracle of json + jsonschema, its failure classes, repair, token classes."""

import collections
import json
import math
import random

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from listopd_jax.task.contract import (
    FAILURES,
    STRUCTURAL,
    TOKEN_CLASSES,
    repair_permutation,
    strict_parse,
    token_classes,
)
from listopd_jax.task.prompt import render_answer, review_ids

IDS = ("r1", "r2", "r3", "r4")


# --- the oracle: shares nothing with the parser but the standard json module ---


class NotJson(Exception):
    pass


def refuse(literal):
    raise NotJson(literal)


def unique_keys(pairs):
    if len({k for k, _ in pairs}) != len(pairs):
        raise NotJson("repeated key")
    return dict(pairs)


def load(text):
    try:
        return json.loads(
            text,
            parse_int=float,  # int() would refuse 5,000 digits
            parse_constant=refuse,
            object_pairs_hook=unique_keys,
        )
    except (json.JSONDecodeError, RecursionError) as e:
        raise NotJson from e


def schema(ids):
    item = {
        "type": "object",
        "required": ["review_id", "score"],
        "properties": {"review_id": {"enum": list(ids)}, "score": {"type": ["number", "string"]}},
    }
    named = [{"contains": {"properties": {"review_id": {"const": i}}}} for i in ids]
    return {"type": "array", "minItems": len(ids), "maxItems": len(ids), "items": item, "allOf": named}


VALIDATORS = {k: jsonschema.Draft202012Validator(schema(review_ids(k))) for k in (1, 2, 4, 8)}


def oracle_number(value):
    """A float if `value` is, or spells, a finite JSON number; NotJson otherwise."""
    if isinstance(value, str):
        if value != value.strip():
            raise NotJson("blanks")
        value = load(value)
    if not isinstance(value, float) or not math.isfinite(value):
        raise NotJson("not a finite number")
    return value


def oracle(text, k):
    """Scores in id order, or None."""
    try:
        before, bracket, rest = text.partition("[")
        inside, closing, after = rest.rpartition("]")
        value = load(bracket + inside + closing)
        if not VALIDATORS[k].is_valid(value):
            return None
        by_id = {item["review_id"]: oracle_number(item["score"]) for item in value}
    except NotJson:
        return None
    return tuple(by_id[i] for i in review_ids(k))


# --- the fuzzer ---

SCORES = [
    *(
        "7",
        "0",
        "10",
        "-0",
        "7.5",
        "1e1",
        "1E+2",
        "1e400",
        "-1e400",
        "1e-400",
        "1e999999",
        "07",
        "+7",
        "7.",
        ".5",
    ),
    *(
        "-",
        "0x10",
        "1_000",
        "٣",
        "７",
        "NaN",
        "Infinity",
        "-Infinity",
        "true",
        "false",
        "null",
        "",
        " 7 ",
        "[7]",
    ),
    *(
        "{}",
        '{"score":7}',
        '"7"7',
        '"7"',
        '"7.0"',
        '"-3e-2"',
        '" 7"',
        '"7 "',
        '"07"',
        '"+7"',
        '"1_000"',
        '"0x10"',
    ),
    *(
        '"٣"',
        '"1e400"',
        '"nan"',
        '"NaN"',
        '"inf"',
        '"Infinity"',
        '""',
        '"seven"',
        '"true"',
        '"7\\n"',
        '"\\u0037"',
    ),
    *("9" * 400, "9" * 5000, f'"{"9" * 5000}"', f"-{'9' * 300}.5", "1" + "0" * 308),
]
NAMES = [
    '"r1"',
    '"r2"',
    '"r3"',
    '"r4"',
    '"r5"',
    '"r0"',
    '"R1"',
    '" r1"',
    '"r1 "',
    '"r01"',
    "1",
    "null",
    '""',
    "[]",
    '["r1"]',
]
NAMES += ['"\\u00721"', '"\\ud800"', '"ｒ1"', "{}", "true", '"r1\u200b"', '"1"', "r1"]
ALPHABET = list('[]{},:"\\0123456789rR_.eE+- \n\t\x00\u00a0\ud800٣é') + [
    '},{"',
    '":"',
    "NaN",
    '"score":',
    '"review_id":"r1"',
    "//",
]
AROUND = [
    ("Sure: ", ""),
    ("```json\n", "\n```"),
    ("", "<|im_end|>"),
    ("{", "}"),
    ('{"a":', "}"),
    ("[", "]"),
    ("[1] ", ""),
]
AROUND += [
    ("", " [end]"),
    ("\ufeff", ""),
    ("\ud800", "\udfff"),
    ("[" * 3000, "]" * 3000),
    ("\n ", "\n "),
    ("]", "["),
    ("x", "]"),
]
EXTRAS = [
    ',"why":"ok"',
    ',"x":NaN',
    ',"x":1e400',
    ',"score":7',
    ',"review_id":"r1"',
    ',"x":{"a":1,"a":2}',
    ",",
    ',"x":[[],{}]',
]
EXTRAS += [',"\\u0073core":7', ',"Score":7', ',"":"]["', ',"x":' + "[" * 2000 + "]" * 2000, ',"x":"\t"']


def mutate_items(rng, items):
    """One fault or harmless change at the level of objects, ids or scores; an item is [id, score, extra]."""
    i, j = rng.randrange(len(items)), rng.randrange(len(items))
    kind = rng.randrange(9)
    if kind == 0:
        del items[i]
    elif kind == 1:
        items.insert(j, list(items[i]))
    elif kind == 2:
        items[i], items[j] = items[j], items[i]
    elif kind == 3:
        items[i][0] = items[j][0]
    elif kind == 4:
        items[i][0] = rng.choice(NAMES)
    elif kind in (5, 6):
        items[i][1] = rng.choice(SCORES)
    elif kind == 7:
        items[i][2] = rng.choice(EXTRAS)
    else:
        rng.shuffle(items)
    return items or [["1", "1", ""]]


def mutate_text(rng, text):
    """One fault at the level of characters or of the whole text."""
    i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    kind = rng.randrange(8)
    if kind == 0:
        return text[:i] + text[i + 1 :]
    if kind == 1:
        return text[:i] + rng.choice(ALPHABET) + text[i:]
    if kind == 2:
        return text[:i] + rng.choice(ALPHABET) + text[i + 1 :]
    if kind == 3:
        return text[:i] + text[i:j][::-1] + text[j:]
    if kind == 4:
        return text[:j] + text[i:]
    if kind == 5:
        return text[:i]
    if kind == 6:
        return text.replace(
            *rng.choice(
                [(",", ", "), (":", " : "), ('"', "'"), ("{", "\n{"), ("score", "rating"), ("}", ",}")]
            )
        )
    before, after = rng.choice(AROUND)
    return before + text + after


def fuzzed(rng, k):
    items = [[f'"{name}"', str(rng.randrange(11)), ""] for name in review_ids(k)]
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        items = mutate_items(rng, items)
    text = "[" + ",".join(f'{{"review_id":{n},"score":{s}{x}}}' for n, s, x in items) + "]"
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        text = mutate_text(rng, text)
    return text


@pytest.mark.parametrize(
    "k, n", [(1, 1000), (2, 2000), (4, 4000), pytest.param(8, 8000, marks=pytest.mark.slow)]
)
def test_no_disagreement_with_json_and_jsonschema(k, n):
    rng = random.Random(k)
    seen = collections.Counter()
    for _ in range(n):
        text = fuzzed(rng, k)
        parsed, expected = strict_parse(text, review_ids(k)), oracle(text, k)
        assert parsed.value == expected, text[:2000]
        assert (parsed.failure == "ok") == (expected is not None)
        assert parsed.failure in FAILURES
        seen[parsed.failure] += 1
    assert seen["ok"] >= n / 10
    assert all(seen[name] >= n / 200 for name in FAILURES if k > 1), seen


@settings(max_examples=1000, deadline=None)
@given(st.text(st.sampled_from('[]{},:"\\r120score_viw NaN-.e') | st.characters(), max_size=80))
def test_garbage_gets_a_verdict(text):
    for parsed in (strict_parse(text, IDS), repair_permutation(text, IDS)):
        assert parsed.failure in FAILURES
        assert parsed.value == oracle(text, 4)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(IDS),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["review_id", "score", "x"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=500, deadline=None)
@given(st.lists(JSON_VALUES, max_size=5))
def test_any_json_list_agrees_with_the_oracle(value):
    text = json.dumps(value)
    assert strict_parse(text, IDS).value == oracle(text, 4)


@settings(max_examples=300, deadline=None)
@given(
    st.permutations(IDS),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=4, max_size=4),
    st.booleans(),
)
def test_order_and_spelling_of_numbers_do_not_matter(names, scores, quoted):
    items = [{"review_id": n, "score": repr(s) if quoted else s} for n, s in zip(names, scores, strict=True)]
    expected = dict(zip(names, scores, strict=True))
    assert strict_parse(json.dumps(items, indent=2), IDS).value == tuple(expected[i] for i in IDS)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from([*IDS, "r5", "r0"]), max_size=6), st.booleans())
def test_class_follows_from_the_ids(names, bad):
    """The precedence, restated over multisets of ids."""
    text = json.dumps([{"review_id": n, "score": None if bad else 1} for n in names])
    real = collections.Counter(n for n in names if n in IDS)
    k_minus_1 = len(names) == 3 and sum(real.values()) == 3 and max(real.values()) == 1
    expected = (
        ("truncated_k_minus_1" if k_minus_1 else "wrong_length")
        if len(names) != 4
        else "duplicate_id"
        if real and max(real.values()) > 1
        else "unknown_id"
        if sum(real.values()) < 4
        else "bad_score"
        if bad
        else "ok"
    )
    assert strict_parse(text, IDS).failure == expected


def answer(names, scores=(1, 2, 3, 4)):
    return json.dumps([{"review_id": n, "score": s} for n, s in zip(names, scores, strict=False)])


GOOD = answer(IDS)
EXAMPLES = [
    ("ok", GOOD),
    ("ok", "Here you are: " + GOOD + " Enjoy!"),
    ("ok", '{"results": ' + GOOD + "}"),
    ("ok", "```json\n" + GOOD + "\n```"),
    ("ok", answer(IDS, ("1", "2.0", "3e0", "-0"))),
    ("ok", answer(IDS, (11, -5, 1e300, 0.5))),
    ("ok", GOOD.replace('"r1"', '"\\u0072\\u0031"')),
    ("ok", GOOD.replace("}", ', "why": "short"}')),
    ("no_json", ""),
    ("no_json", "I cannot rank these."),
    ("no_json", "]["),
    ("no_json", GOOD[:-1]),
    ("no_json", GOOD.replace('"', "'")),
    ("no_json", GOOD[:-1] + ",]"),
    ("no_json", GOOD + "[1]"),
    ("no_json", "Scores [0-10]: " + GOOD),
    ("no_json", GOOD.replace('"score": 1}', '"score": 1, "score": 2}')),
    ("no_json", GOOD.replace('"score": 1}', '"score": 07}')),
    ("no_json", GOOD.replace('"r1"', '"r\n1"')),
    ("no_json", "[" * 100_000 + "]" * 100_000),
    ("no_json", '[{"a":' * 50_000 + "]"),
    ("truncated_k_minus_1", answer(IDS[:3])),
    ("truncated_k_minus_1", answer(IDS[1:])),
    ("truncated_k_minus_1", answer(IDS[1:], (None, True, "x"))),
    ("wrong_length", "[]"),
    ("wrong_length", answer(IDS[:2])),
    ("wrong_length", answer(("r1", "r2", "r2"))),
    ("wrong_length", answer(("r1", "r2", "r9"))),
    ("wrong_length", answer((*IDS, "r5"), range(5))),
    ("wrong_length", answer((*IDS, "r1"), range(5))),
    ("wrong_length", "[" + GOOD + "]"),
    ("duplicate_id", answer(("r1", "r2", "r3", "r3"))),
    ("duplicate_id", answer(("r1", "r1", "r9", "r8"))),
    ("duplicate_id", answer(("r1", "r1", "r2", "r3"), (None,) * 4)),
    ("unknown_id", answer(("r1", "r2", "r3", "r5"))),
    ("unknown_id", answer((1, 2, 3, 4))),
    ("unknown_id", answer(("r9",) * 4)),
    ("unknown_id", answer(("r1", "r2", "r3", "R4"))),
    ("unknown_id", answer(("r1", "r2", "r3", None), (None,) * 4)),
    ("unknown_id", answer(("r1", "r2", "r3", ["r4"]))),
    ("unknown_id", answer(("r1", "r2", "r3", "\ud800"))),
    ("unknown_id", "[7, 3, 5, 1]"),
    ("unknown_id", '[{"score": 1}, {"score": 1}, {"score": 1}, {"score": 1}]'),
    *[
        ("bad_score", answer(IDS, (1, 2, 3, s)))
        for s in (None, True, "", "x", [], {}, [4], math.nan, -math.inf)
    ],
    *[
        ("bad_score", answer(IDS, (1, 2, 3, s)))
        for s in (" 7 ", "+7", "07", "7.", ".5", "1_000", "0x10", "٣", "７")
    ],
    *[
        ("bad_score", answer(IDS, (1, 2, 3, s)))
        for s in ("nan", "Infinity", "1e400", "9" * 400, 10**400, "7\n")
    ],
    ("bad_score", GOOD.replace("4}", "1e400}")),
    ("bad_score", GOOD.replace("4}", "9" * 5000 + "}")),
    ("bad_score", GOOD.replace(', "score": 4', "")),
    ("bad_score", GOOD.replace("4}", '4, "x": NaN}')),
]


@pytest.mark.parametrize("failure, text", EXAMPLES, ids=[f"{i}-{f}" for i, (f, _) in enumerate(EXAMPLES)])
def test_failure_classes_by_example(failure, text):
    assert strict_parse(text, IDS).failure == failure


def test_every_class_has_an_example_and_nothing_else_is_reported():
    assert {failure for failure, _ in EXAMPLES} == set(FAILURES)


def test_scores_come_in_the_order_of_the_input_ids():
    assert strict_parse(answer(("r3", "r1", "r4", "r2"), (3, "1", 4.5, 2)), IDS).value == (
        1.0,
        2.0,
        3.0,
        4.5,
    )


def test_hostile_lengths_take_linear_time():
    for text in ("[" * 10**6, '["' + "\\" * 10**6, '"' * 10**6, "]" * 10**6, "[" + "9" * 10**6 + "]"):
        assert strict_parse(text, IDS).failure in ("no_json", "wrong_length")


# --- repair ---


@settings(max_examples=300, deadline=None)
@given(st.permutations(IDS), st.integers(0, 3), st.integers(0, 3), st.data())
def test_repair_restores_the_overwritten_id(names, i, j, data):
    """Name one item after an earlier one: repair gives back the original, strict parse refuses."""
    if i == j:
        return
    earlier, later = sorted((i, j))
    scores = data.draw(st.lists(st.integers(0, 10), min_size=4, max_size=4))
    broken = [*names]
    broken[later] = names[earlier]
    assert strict_parse(answer(broken, scores), IDS).failure == "duplicate_id"
    assert repair_permutation(answer(broken, scores), IDS) == strict_parse(answer(names, scores), IDS)


@pytest.mark.parametrize(
    "failure, text",
    [
        *[(failure, text) for failure, text in EXAMPLES if failure not in ("duplicate_id",)],
        ("duplicate_id", answer(("r1", "r1", "r1", "r2"))),
        ("duplicate_id", answer(("r1", "r1", "r2", "r2"))),
        ("duplicate_id", answer(("r1", "r1", "r2", "r9"))),
        ("duplicate_id", answer(("r1", "r1", "r2", 3))),
        ("bad_score", answer(("r1", "r1", "r2", "r3"), (1, 2, 3, None))),
        ("ok", answer(("r1", "r1", "r2", "r3"))),
    ],
)
def test_repair_touches_nothing_else(failure, text):
    assert repair_permutation(text, IDS).failure == failure


# --- token classes ---


def names(pieces):
    return [TOKEN_CLASSES[c] for c in token_classes(pieces)]


def test_qwen_tokens_of_an_answer(shared):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared / "tokenizer" / "qwen3")
    pieces = [tokenizer.decode([t]) for t in tokenizer(render_answer((7, 10)))["input_ids"]] + [""]
    assert list(zip(pieces, names(pieces), strict=True)) == [
        ("[", "bracket"),
        ('{"', "brace"),
        ("review", "field"),
        ("_id", "field"),
        ('":"', "colon"),
        ("r", "id"),
        ("1", "id"),
        ('","', "comma"),
        ("score", "field"),
        ('":', "colon"),
        ("7", "digit"),
        ('},{"', "comma"),
        ("review", "field"),
        ("_id", "field"),
        ('":"', "colon"),
        ("r", "id"),
        ("2", "id"),
        ('","', "comma"),
        ("score", "field"),
        ('":', "colon"),
        ("1", "digit"),
        ("0", "digit"),
        ("}]", "bracket"),
        ("", "eos"),
    ]


@pytest.mark.parametrize("k", [1, 4, 8])
def test_character_counts_of_an_answer(k):
    count = collections.Counter(names(list(render_answer([10] * k))))
    assert count == {
        "bracket": 2,
        "brace": 2 * k,
        "comma": 2 * k - 1,
        "colon": 2 * k,
        "quote": 6 * k,
        "field": k * len("review_idscore"),
        "id": k * len("r1"),
        "digit": k * len("10"),
    }


@pytest.mark.parametrize(
    "pieces, expected",
    [
        (["Sure", ": ", '"x"', "[", "]", " done", ", {"], ["other"] * 3 + ["bracket"] * 2 + ["other"] * 2),
        (
            ['[{"score":', ' "', "7.5", '"', " }", "]"],
            ["bracket", "quote", "digit", "quote", "brace", "bracket"],
        ),
        (['[{"score":', " ", "-1e", "5", "}"], ["bracket", "other", "digit", "digit", "brace"]),
        (['[{"review_id":', "12", ",", '"'], ["bracket", "id", "comma", "quote"]),
        (['[{"why":"', "a,b]", '\\"', "c", '"', "}"], ["bracket"] + ["other"] * 3 + ["quote", "brace"]),
        (['[{"review_id":"', "r", "[", "9", '"}]'], ["bracket", "id", "id", "id", "bracket"]),
        (["[\n", "  ", '{\n"', "sco", "re", '"'], ["bracket", "other", "brace", "field", "field", "quote"]),
        (["", "[", ""], ["eos", "bracket", "eos"]),
        (['[{"', "a", "\\"], ["bracket", "field", "field"]),
        (["[", "7", ",", '"a"'], ["bracket", "other", "comma", "quote"]),
        ([], []),
    ],
)
def test_token_classes_by_example(pieces, expected):
    assert names(pieces) == expected


PRIORITY = ("bracket", "comma", "brace", "colon", "quote", "field", "id", "digit", "other")
JSONISH = st.text(st.sampled_from('[]{},:"\\17 x') | st.characters(), max_size=8) | st.sampled_from(
    ['"review_id":', '"score":', '[{"', '},{"', '"}', "}]", '":"', ""]
)


@settings(max_examples=1000, deadline=None)
@given(st.lists(JSONISH, max_size=15))
def test_a_token_takes_the_most_structural_of_its_characters(pieces):
    characters = iter(names(list("".join(pieces))))
    for piece, name in zip(pieces, names(pieces), strict=True):
        own = {next(characters) for _ in piece}
        assert name == ("eos" if not piece else next(c for c in PRIORITY if c in own))


@settings(max_examples=500, deadline=None)
@given(st.lists(JSONISH, max_size=15), st.integers(0, 15))
def test_later_tokens_change_nothing(pieces, n):
    assert token_classes(pieces)[:n] == token_classes(pieces[:n])


def test_structural_is_all_but_scores_and_prose():
    assert set(TOKEN_CLASSES) - STRUCTURAL == {"digit", "other"}
    assert set(PRIORITY) | {"eos"} == set(TOKEN_CLASSES)
