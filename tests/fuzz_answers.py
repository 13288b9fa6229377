"""Fuzz targets of answers: the contract's parser and automaton, strict JSON, JSON Schema and its masks."""

import collections
import json
import pathlib
import random
import re
from typing import Any

import hypothesis
import jsonschema
import numpy as np
from mutate import drawn_value, edited, edited_value, spelled
from test_contract import IDS, fuzzed, oracle
from test_grammar import PIECES as GRAMMAR_PIECES
from test_json_task import SCHEMAS, VALUES

from listopd_jax.data.tokenizer import train_tokenizer
from listopd_jax.errors import UserError
from listopd_jax.task.contract import FAILURES, TOKEN_CLASSES, repair_permutation, strict_parse, token_classes
from listopd_jax.task.grammar import DEAD, START, contract_automaton
from listopd_jax.task.prompt import review_ids
from listopd_jax.task.schema import Contract
from listopd_jax.task.schema_masks import Schema, SchemaMasks
from listopd_jax.task.strict_json import MAX_DEPTH, dumps, loads, same

# --- the contract of lists


def contract(folder: pathlib.Path):
    """strict_parse against json + jsonschema and a restatement of its classes; the automaton against an expression."""
    tables = {k: contract_automaton(PIECES, [END], k) for k in (1, 2, 3, 4)}

    def case(rng: random.Random) -> None:
        k = rng.choice((1, 2, 4, 8))
        text = fuzzed(rng, k) if rng.random() < 0.8 else _noise(rng)
        _check_parse(text, k)
        _check_classes(rng, text)
        for k, automaton in tables.items():
            _check_automaton(rng, automaton, _near_answer(rng, k), k)

    return case


def _check_parse(text: str, k: int) -> None:
    ids = review_ids(k)
    parsed, expected = strict_parse(text, ids), oracle(text, k)
    assert parsed.value == expected, "the parser's scores are not the oracle's"
    assert parsed.failure == restated(text, ids), f"{parsed.failure} is not {restated(text, ids)}"
    repaired = repair_permutation(text, ids)
    assert repaired.failure in FAILURES and (repaired.value is None) == (not repaired.ok)
    assert repaired == parsed or parsed.failure == "duplicate_id", "only a repeated id is repaired"


def restated(text: str, ids: tuple[str, ...]) -> str:
    """The failure class, by the list in contract.py's docstring."""

    def whole(pairs):
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError
        return dict(pairs)

    odd = []
    inside = re.search(r"\[.*\]", text, re.DOTALL)
    try:
        items = json.loads(
            inside[0] if inside else "", parse_int=float, parse_constant=odd.append, object_pairs_hook=whole
        )
    except (ValueError, RecursionError):
        return "no_json"
    named = [item.get("review_id") if isinstance(item, dict) else None for item in items]
    counts = collections.Counter(name for name in named if isinstance(name, str) and name in ids)
    if len(items) == len(ids) - 1 and len(counts) == len(items):
        return "truncated_k_minus_1"
    if len(items) != len(ids):
        return "wrong_length"
    if any(n > 1 for n in counts.values()):
        return "duplicate_id"
    if len(counts) < len(ids):
        return "unknown_id"
    return "bad_score" if odd or oracle(text, len(ids)) is None else "ok"


def _check_classes(rng: random.Random, text: str) -> None:
    """One class a token, whatever the tokens are, which no later token changes."""
    pieces = []
    while text:
        n = rng.randint(1, 6)
        pieces, text = [*pieces, text[:n]], text[n:]
    pieces = pieces[:200]
    classes, cut = token_classes([*pieces, ""]), rng.randint(0, len(pieces))
    assert len(classes) == len(pieces) + 1 and all(0 <= c < len(TOKEN_CLASSES) for c in classes)
    assert classes[-1] == TOKEN_CLASSES.index("eos") and classes[:cut] == token_classes(pieces[:cut])


PIECES = [*GRAMMAR_PIECES, "\t", "\r", "\n\t", "10}]"]
END = PIECES.index("")


def _near_answer(rng: random.Random, k: int) -> str:
    """A right answer with white space, its ids in any order, often broken at one place."""
    blank = lambda: "".join(rng.choices(" \t\r\n", k=rng.choice((0, 0, 0, 1, 2))))  # noqa: E731
    ids = [rng.choice(IDS)] * k if rng.random() < 0.1 else rng.sample(review_ids(k), k)
    parts = ["["]
    for name in ids:
        parts += [
            "{",
            '"review_id"',
            ":",
            f'"{name}"',
            ",",
            '"score"',
            ":",
            str(rng.randint(0, 10)),
            "}",
            ",",
        ]
    parts[-1] = "]"
    text = "".join(blank() + part for part in parts)
    if rng.random() < 0.5:
        i = rng.randrange(len(text))
        text = text[:i] + rng.choice(["", *PIECES[:-1]]) + text[i + rng.randint(0, 2) :]
    return text


def _check_automaton(rng: random.Random, automaton: Any, text: str, k: int) -> None:
    """It accepts what the expression does, however the text is cut into tokens, and only what holds the contract."""
    state, rest = START, text
    while rest:
        fits = [piece for piece in PIECES if piece and rest.startswith(piece)]
        if not fits:
            return
        piece = rng.choice(fits)
        state = int(automaton.step[state, automaton.column[PIECES.index(piece)]])
        rest = rest[len(piece) :]
    accepted = int(automaton.step[state, automaton.column[END]]) != DEAD
    assert accepted == _in_grammar(text, k), "the automaton and the expression disagree"
    assert not accepted or strict_parse(text, review_ids(k)).ok


def _in_grammar(text: str, k: int) -> bool:
    """grammar.py's docstring as an expression, and each id once."""
    parts = ["{", '"review_id"', ":", '"(r[0-9]+)"', ",", '"score"', ":", "(?:10|[0-9])", "}"]
    item = "".join(rf"[ \t\r\n]*{part}" for part in parts)
    form = rf"[ \t\r\n]*\[{item}(?:[ \t\r\n]*,{item}){{{k - 1}}}[ \t\r\n]*\]"
    return re.fullmatch(form, text) is not None and sorted(re.findall(r'"(r[0-9]+)"', text)) == sorted(
        review_ids(k)
    )


def _noise(rng: random.Random) -> str:
    alphabet = '[]{},:"\\r120score_view NaN-.e\n\x00é\ud800'
    return "".join(rng.choices(alphabet, k=rng.randint(0, 60)))


# --- strict JSON, schemas and their masks


def json_answers(folder: pathlib.Path):
    """The three below, so often that each has its share of the time."""
    kinds = [strict_json(folder), masks(folder), schemas(folder)]
    return lambda rng: rng.choices(kinds, (70, 29, 1))[0](rng)


def strict_json(folder: pathlib.Path):
    """loads against json and a statement of RFC 7493."""

    def case(rng: random.Random) -> None:
        value = drawn_value(rng)
        for _ in range(rng.randint(0, 4)):
            value = edited_value(rng, {rng.choice("abé"): value, "b": [drawn_value(rng), 1]})
        text = (
            spelled(value)
            if rng.random() < 0.5
            else json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
        )
        if rng.random() < 0.6:
            text = edited(rng, text, 3)
        text = text.decode("utf-8", "replace")
        expected, value = _strictly(text)
        try:
            found = loads(text)
        except ValueError as e:
            assert not expected, f"refused ({e}), and is strict JSON"
            assert "\n" not in str(e)
            return
        assert expected, "is no strict JSON"
        assert same(found, value) and same(loads(dumps(found)), found), "does not come back"

    return case


class _Pairs(list):
    """An object as json reads it, pair by pair."""


class _Digits(bytes):
    """A number as it is spelled; no str, which a text would be."""

    def __new__(cls, text: str):
        return super().__new__(cls, text.encode())


def _strictly(text: str) -> tuple[bool, Any]:
    """Whether a text is strict JSON, and what json makes of it: judged after reading, not while."""
    try:
        pairs = json.loads(text, object_pairs_hook=_Pairs, parse_int=_Digits, parse_float=_Digits)
    except (ValueError, RecursionError):
        return False, None
    if not all(_may_be(value, depth) for value, depth in _walk(pairs, 1)):
        return False, None
    return True, json.loads(text)


def _walk(value: Any, depth: int):
    yield value, depth
    if isinstance(value, _Pairs):
        for key, inner in value:
            yield key, depth + 1
            yield from _walk(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner, depth + 1)


def _may_be(value: Any, depth: int) -> bool:
    if isinstance(value, _Pairs) and len({key for key, _ in value}) < len(value):
        return False
    if isinstance(value, float):  # NaN, Infinity: all other numbers are _Digits here
        return False
    if isinstance(value, _Digits) and not np.isfinite(float(value)):
        return False
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        return False
    return depth <= MAX_DEPTH + 1


def schemas(folder: pathlib.Path):
    """Contract against jsonschema's own validators, on drawn schemas and values."""

    def case(rng: random.Random) -> None:
        @hypothesis.seed(rng.getrandbits(64))
        @hypothesis.settings(
            max_examples=50, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        )  # fmt: skip
        @hypothesis.given(SCHEMAS, hypothesis.strategies.lists(VALUES, min_size=1, max_size=4))
        def agree(schema, values):
            _check_schema(schema, values)

        agree()

    return case


def _check_schema(schema: Any, values: list[Any]) -> None:
    try:
        judge = Contract(schema, "here")
    except UserError as e:
        assert str(e).startswith("here: ") and str(e).isprintable() and len(str(e)) < 600, (
            "the line of the error"
        )
        return
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    for value in values:
        failure = judge.failure(value)
        assert failure.isprintable() and (failure == "ok") == (judge.explain(value) is None)
        try:
            valid = kind(schema).is_valid(value)
        except (RecursionError, re.error):  # Python's re does not know the pattern
            continue
        assert (failure == "ok") == valid, f"{failure} for {value!r}, jsonschema says {valid}"


# --- masks of schemas


def masks(folder: pathlib.Path):
    """Whatever the masks of a schema let through holds it, and they let through every compact text of a right value."""
    tokenizer = train_tokenizer(
        [dumps({"ab": ["é", -1.5e3, None, True], "b": '"'}) * 3], 300, folder / "tokenizer"
    )
    end = tokenizer.eos_token_id
    made = SchemaMasks(tokenizer, len(tokenizer), [end])
    short = {
        i
        for i in range(len(tokenizer))
        if tokenizer.decode([i]).strip() in ('"', "}", "]", '"}', "0", "1", "null")
    }

    def case(rng: random.Random) -> None:
        schema, value_of = drawn_schema(rng)
        judge, given = Contract(schema, "here"), Schema(schema, "here")
        value = value_of(rng)
        assert judge.failure(value) == "ok", "the value is right"
        ids = tokenizer(dumps(value), add_special_tokens=False)["input_ids"]
        assert made.keeps(given, ids), f"{dumps(value)} is not let through"
        text = _walked(rng, made.rows([given]), tokenizer, end, short)
        if text is not None:
            _check_let_through(judge, text)

    return case


def _check_let_through(judge: Contract, text: str) -> None:
    """It holds the schema, but for what docs/constrained.md says no mask can see."""
    any_key = '"additionalProperties":true' in dumps(judge.schema)
    try:
        value = loads(text)
    except ValueError as e:
        may = "out of range" in str(e) or ("appears twice" in str(e) and any_key)
        assert may, f"{text!r} is let through: {e}"
    else:
        assert judge.failure(value) == "ok", f"{text!r} is let through"


def _walked(rng: random.Random, masks: Any, tokenizer: Any, end: int, short: set[int]) -> str | None:
    """A text that the masks let through, or None if it does not end soon: later on, what may end it is preferred."""
    ids: list[int] = []
    last = None
    for step in range(120):
        bits = np.unpackbits(masks(np.zeros(1, np.int64), last).view(np.uint8)[0], bitorder="little")
        allowed = np.flatnonzero(bits).tolist()
        if step > rng.randint(0, 60):
            allowed = [i for i in allowed if i == end or i in short] or allowed
        token = end if end in allowed and rng.random() < 0.5 else rng.choice(allowed)
        if token == end:
            return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        ids.append(token)
        last = np.array([token])
    return None


def drawn_schema(rng: random.Random, depth: int = 0) -> tuple[dict[str, Any], Any]:
    """A schema of the usual keywords, and what draws a value that it accepts."""
    kinds = [_of_values, _of_integers, _of_numbers, _of_texts]
    return rng.choice(kinds if depth > 2 else [*kinds, _of_lists, _of_objects, _of_objects, _of_either])(
        rng, depth
    )


def _of_values(rng: random.Random, depth: int):
    values = rng.sample(
        [None, True, False, 0, -1, 1.5, "", "a", 'é"', "a\nb", [], [1, "b"], {"a": 1}], rng.randint(1, 4)
    )
    return rng.choice(({"enum": values}, {"const": values[0]})), lambda rng: values[0]


def _of_integers(rng: random.Random, depth: int):
    low = rng.randint(-20, 20)
    high = low + rng.randint(0, 200)
    return {"type": "integer", "minimum": low, "maximum": high}, lambda rng: rng.randint(low, high)


def _of_numbers(rng: random.Random, depth: int):
    return {"type": rng.choice(("number", "integer"))}, lambda rng: rng.randint(-1000, 1000)


def _of_texts(rng: random.Random, depth: int):
    low, more = rng.randint(0, 3), rng.randint(0, 4)
    schema = {"type": "string", "minLength": low, "maxLength": low + more}
    if rng.random() < 0.3:
        schema = {"type": "string", "pattern": f"^[ab]{{{low},{low + more}}}$"}
    alphabet = "ab" if "pattern" in schema else 'ab"\\é 帽\n'
    return schema, lambda rng: "".join(rng.choices(alphabet, k=rng.randint(low, low + more)))


def _of_lists(rng: random.Random, depth: int):
    inner, value_of = drawn_schema(rng, depth + 1)
    low, more = rng.randint(0, 2), rng.randint(0, 3)
    schema = {"type": "array", "items": inner, "minItems": low, "maxItems": low + more}
    return schema, lambda rng: [value_of(rng) for _ in range(rng.randint(low, low + more))]


def _of_objects(rng: random.Random, depth: int):
    inner = {
        name: drawn_schema(rng, depth + 1)
        for name in rng.sample(["a", "b", "ab", 'é"', ""], rng.randint(0, 4))
    }
    required = [name for name in inner if rng.random() < 0.5]
    schema = {
        "type": "object", "properties": {name: s for name, (s, _) in inner.items()}, "required": required,
        "additionalProperties": rng.random() < 0.2,
    }  # fmt: skip
    kept = lambda rng: {n: f(rng) for n, (_, f) in inner.items() if n in required or rng.random() < 0.5}  # noqa: E731
    return schema, kept


def _of_either(rng: random.Random, depth: int):
    choices = [drawn_schema(rng, depth + 1) for _ in range(2)]
    return {"anyOf": [schema for schema, _ in choices]}, lambda rng: rng.choice(choices)[1](rng)
