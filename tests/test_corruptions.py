"""Teacher errors by design: each has the fault that its name says, and the report tells what became of them."""

import json
import random
import re
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from listopd_jax import config as config_module
from listopd_jax.data.encode import AnswerNoise, noisy_answer
from listopd_jax.errors import UserError
from listopd_jax.records import Result
from listopd_jax.report.errors_section import errors_section
from listopd_jax.report.inputs import Inputs
from listopd_jax.stages.job import known_noise
from listopd_jax.task import corruptions
from listopd_jax.task.prompt import ListExample
from listopd_jax.task.strict_json import dumps, loads
from listopd_jax.tasks.reviews import Reviews

TASK = Reviews(None, config_module.defaults().task)
LISTS = [ListExample(f"k{i}", "p", "t", ("a", "b", "c"), (i % 11, 3, 10)) for i in range(200)]


@pytest.mark.parametrize(
    ("name", "failures"),
    [
        ("truncate", {"truncated_k_minus_1"}),
        ("duplicate_id", {"duplicate_id"}),
        ("wrong_field", {"unknown_id", "bad_score"}),
        ("missing_field", {"bad_score"}),
        ("wrong_digit", {"ok"}),
        ("unclosed_string", {"no_json"}),
    ],
)
def test_each_corruption_of_a_list_fails_as_its_name_says(name, failures):
    noise = AnswerNoise(((name, 1.0),), seed=3)
    texts = [noisy_answer(TASK, record, noise) for record in LISTS]
    judged = [TASK.parse(text, record) for text, record in zip(texts, LISTS, strict=True)]
    assert {parsed.failure for parsed in judged} == failures
    assert texts == [noisy_answer(TASK, record, noise) for record in LISTS], (
        "seeded by record, the same in every epoch"
    )
    assert all(text != TASK.answer(record) for text, record in zip(texts, LISTS, strict=True))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)


def shape(value):
    """A JSON value with every number 0: what wrong_digit must not change."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value]
    return 0 if isinstance(value, int) and not isinstance(value, bool) else value


@settings(max_examples=200)
@given(VALUES, st.integers(0, 99))
def test_any_answer_can_be_corrupted_in_one_place(value, seed):
    text = dumps(value)
    digit = json.loads(corruptions.wrong_digit(text, random.Random(seed)))
    assert shape(digit) == shape(value) and (digit != value) == bool(
        re.search(r"\b\d", re.sub(r'"(\\.|[^"\\])*"', "", text))
    )
    for change in (corruptions.wrong_field, corruptions.missing_field):
        changed = json.loads(change(text, random.Random(seed)))
        assert (changed != value) == bool(re.search(r"\{[^}]", re.sub(r'"(\\.|[^"\\])*"', "s", text)))
    open_ended = corruptions.unclosed_string(text, random.Random(seed))
    assert len(open_ended) == len(text) - ('"' in text)


@pytest.mark.parametrize("number", [2**53, -(2**60), 17 * 10**307, int(sys.float_info.max), 1.7e308, -1e300])
def test_a_number_too_large_to_show_a_digit_is_wrong_all_the_same_and_in_range(number):
    changed = loads(corruptions.wrong_digit(dumps({"a": number}), random.Random(1)))["a"]
    assert changed == -number
    assert loads(corruptions.wrong_digit("9007199254740991", random.Random(1))) > 2**53 - 1


@pytest.mark.parametrize("answer", ["no JSON", "1e999", "{"])
def test_an_answer_that_a_corruption_cannot_read_is_one_line(answer):
    task = SimpleNamespace(answer=lambda record: answer)
    task.corruptions = corruptions.json_corruptions(task.answer)
    record = SimpleNamespace(key="line 3")
    with pytest.raises(UserError, match="line 3: wrong_digit cannot break its right answer .*sft.*.noise"):
        noisy_answer(task, record, AnswerNoise((("wrong_digit", 1.0),), seed=3))


def test_what_a_users_corruption_raises_is_no_mistake_of_the_data():
    def broken(record, rng):
        raise ValueError("mine")

    task = SimpleNamespace(answer=lambda record: "{}", corruptions={"broken": broken})
    with pytest.raises(ValueError, match="^mine$"):
        noisy_answer(task, SimpleNamespace(key="line 3"), AnswerNoise((("broken", 1.0),)))


def test_shares_are_of_all_answers_and_in_the_order_of_the_config():
    config = config_module.defaults()
    config.sft.teacher.noise = "truncate:0.3,wrong_digit:0.2,strange:0.4"
    noise = AnswerNoise(known_noise(TASK, config_module.validate(config).sft.teacher), seed=0)
    assert noise.shares == (("truncate", 0.3), ("wrong_digit", 0.2)), (
        "what the task does not define is dropped"
    )
    kinds = [len(json.loads(noisy_answer(TASK, r, noise))) for r in LISTS]
    right = sum(noisy_answer(TASK, r, noise) == TASK.answer(r) for r in LISTS)
    config.sft.teacher.steps, config.sft.teacher.epochs = 0, 0.0
    assert known_noise(TASK, config_module.validate(config).sft.teacher) == (), "an SFT that trains nothing"
    assert 0.2 < kinds.count(2) / 200 < 0.4 and 0.4 < right / 200 < 0.6


def record(stage, lam=None, guard="", sweep="", **failures):
    found = {"parse": 0.5, "useful": 0.4, "failures": {"ok": 50, **failures}}
    return Result(stage=stage, lam=lam, seed=0, steps=5, guard=guard, sweep=sweep, **found)


def test_the_report_says_which_errors_transfer():
    results = [
        record("sft_teacher", no_json=10, duplicate_id=40),
        record("sft_student", no_json=50),
        record("opd", 1.0, no_json=5, duplicate_id=45),
        record("opd", 1.5, no_json=0, duplicate_id=50),
    ]
    config = {"config": {"sft": {"teacher": {"noise": "unclosed_string:0.1,duplicate_id:0.4"}}}}
    noise = {"teacher": {"unclosed_string": 0.1, "duplicate_id": 0.4}}
    section = errors_section(Inputs(config={}, results=results, noise=noise))
    assert section == errors_section(Inputs(config=config, results=results)), (
        "of a run from before it was written"
    )
    assert "unclosed_string in 0.1, duplicate_id in 0.4" in section.lead
    (table,) = section.tables
    assert table.head == ("failure class", "SFT teacher", "SFT student", "λ = 1", "λ = 1.5")
    assert [[cell.text.replace("\u00a0", " ") for cell in row] for row in table.rows] == [
        ["duplicate id", "40 %", "0 %", "45 %", "50 %"],
        ["no JSON", "10 %", "50 %", "5 %", "0 %"],
        ["useful", "0.400", "0.400", "0.400", "0.400"],
    ]
    assert "duplicate id: 45" in section.plots[0].svg


def test_errors_that_keep_the_contract_show_in_what_answers_are_worth():
    config = {"config": {"sft": {"teacher": {"noise": "wrong_digit:0.3"}}}}
    section = errors_section(Inputs(config=config, results=[record("sft_teacher"), record("opd", 1.5)]))
    assert [row[0].text for row in section.tables[0].rows] == ["useful"] and not section.plots


@pytest.mark.parametrize(
    "sft",
    [{}, 3, {"teacher": {"noise": ""}}, {"teacher": {"noise": [1]}}]
    + [{"teacher": {"noise": "truncate:0.2", "epochs": 0.0, "steps": 0}}],
)
def test_without_errors_by_design_there_is_no_such_section(sft):
    results = [record("sft_teacher", no_json=50), record("opd", 1.0, no_json=50)]
    assert errors_section(Inputs(config={"config": {"sft": sft}}, results=results)) is None


def test_policies_of_one_lambda_have_a_column_and_a_line_each():
    """Under a guard and without it, and at two points of a sweep."""
    wide, tight = {"sweep": "clip=5.0"}, {"sweep": "clip=1.5"}
    results = [record("sft_teacher", no_json=50)] + [
        record("opd", 1.0, no_json=n, **at)
        for n, at in ((10, tight), (50, wide), (0, tight | {"guard": "margin=1.25"}))
    ]
    section = errors_section(Inputs(results=results, noise={"teacher": {"truncate": 0.2}}))
    (table,) = section.tables
    assert table.head[2:] == ("λ = 1, clip=1.5", "λ = 1, guarded, clip=1.5", "λ = 1, clip=5.0")
    assert [cell.text.replace("\u00a0", " ") for cell in table.rows[0]] == [
        "no JSON",
        "50 %",
        "17 %",
        "0 %",
        "50 %",
    ]
    for said in ("no JSON, clip=1.5: 17", "no JSON, guarded, clip=1.5: 0", "no JSON, clip=5.0: 50"):
        assert said in section.plots[0].svg
