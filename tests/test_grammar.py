"""The contract's automaton: what it lets through holds the contract, and right answers in any form go through."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from listopd_jax.errors import UserError
from listopd_jax.task.contract import strict_parse
from listopd_jax.task.grammar import DEAD, START, contract_automaton
from listopd_jax.task.prompt import render_answer, review_ids

PIECES = [
    *'[]{}:,"_ \n',
    *"0123456789",
    *"reviwdsco",
    '[{"',
    '},{"',
    "}]",
    '":"',
    '","',
    '":',
    "review",
    "_id",
    "score",
]
PIECES += ["a", "", "10", "r1", "é", ' {"', "-"]
END = PIECES.index("")
K = 3
TABLES = contract_automaton(PIECES, [END], K)


def tokens_of(text):
    """The longest piece at each place."""
    ids = []
    while text:
        piece = max((p for p in PIECES if p and text.startswith(p)), key=len)
        ids.append(PIECES.index(piece))
        text = text[len(piece) :]
    return [*ids, END]


def states(tokens, tables=TABLES):
    """The state before each token, and the last."""
    found = [START]
    for token in tokens:
        found.append(int(tables.step[found[-1], tables.column[token]]))
    return found


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
@pytest.mark.parametrize("scores", [(0, 10, 7), (1, 1, 10)])
def test_a_right_answer_goes_through_in_any_order_and_with_white_space(separators, indent, order, scores):
    items = [{"review_id": f"r{i}", "score": s} for i, s in zip(order, scores, strict=True)]
    assert DEAD not in states(tokens_of(json.dumps(items, separators=separators, indent=indent)))


@pytest.mark.parametrize(
    "text",
    [
        render_answer((7, 7)),
        render_answer((7, 7, 7, 7)),
        render_answer((7, 7, 7)).replace("r3", "r2"),
        render_answer((7, 7, 7)).replace("r3", "r4"),
        render_answer((7, 7, 11)),
        render_answer((7, 7, 7)).replace(":7", ":07"),
        render_answer((7, 7, 7)).replace(":7", ":-7"),
        render_answer((7, 7, 7)).replace(":7", ":1 0"),
        render_answer((7, 7, 7)).replace(":7", ":"),
        render_answer((7, 7, 7)) + "a",
        "a" + render_answer((7, 7, 7)),
        "",
    ],
)
def test_what_breaks_the_list_or_the_scale_does_not(text):
    assert states(tokens_of(text))[-1] == DEAD


@hypothesis.given(st.randoms(use_true_random=False))
def test_every_walk_that_the_automaton_allows_to_the_end_holds_the_contract(random):
    state, tokens = START, []
    while not tokens or tokens[-1] != END:
        allowed = np.flatnonzero(TABLES.step[state, TABLES.column] != DEAD).tolist()
        assert allowed, "no state is a dead end"
        blank = [t for t in allowed if not PIECES[t].strip(" \n") and t != END]
        tokens.append(random.choice([t for t in allowed if t not in blank] or blank))
        state = int(TABLES.step[state, TABLES.column[tokens[-1]]])
    text = "".join(PIECES[t] for t in tokens)
    parsed = strict_parse(text, review_ids(K))
    assert parsed.failure == "ok" and all(x in range(11) for x in parsed.value)


@pytest.mark.parametrize("scores", [(7, 0, 10), (1, 1, 1)])
def test_content_is_the_digits_of_scores_and_of_nothing_else(scores):
    tokens = tokens_of(render_answer(scores))
    content = [
        bool(TABLES.content[s, TABLES.column[t]]) for s, t in zip(states(tokens), tokens, strict=False)
    ]
    assert [PIECES[t] for t, c in zip(tokens, content, strict=True) if c] == [
        piece for s in scores for piece in ([str(s)] if str(s) in PIECES else list(str(s)))
    ]


def test_after_a_whole_score_a_digit_is_content_only_if_it_makes_another_score():
    prefix = tokens_of('[{"review_id":"r1","score":')[:-1]
    after = lambda text: states(prefix + tokens_of(text)[:-1])[-1]  # noqa: E731
    of = lambda state: {PIECES[t] for t in range(len(PIECES)) if TABLES.content[state, TABLES.column[t]]}  # noqa: E731
    assert of(after("")) == {*"0123456789", "10"} and of(after("1")) == {"0"} and of(after("7")) == set()


def test_states_grow_with_the_lists_and_long_ones_are_refused():
    assert len(contract_automaton(PIECES, [END], 2).step) < len(TABLES.step)
    with pytest.raises(UserError, match="task.k=11"):
        contract_automaton(PIECES, [END], 11)
