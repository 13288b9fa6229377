"""Which tokens an automaton over tokens lets through at each position of a text, as traced lookups in its tables."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

DEAD, START = 0, 1  # states: after a token that does not fit; before the first token


class Grammar(NamedTuple):
    """The tables of listopd_jax.task.grammar.Automaton, S states and C kinds of tokens, on the device."""

    step: Int[Array, "S C"]
    column: Int[Array, " V"]
    content: Bool[Array, "S C"]


def states(grammar: Grammar, start: Int[Array, "*s"], tokens: Int[Array, "*s T"]) -> Int[Array, "*s T"]:
    """The state before each token of texts that begin in state `start`."""

    def after(state, column):
        return grammar.step[state, column], state

    columns = jnp.moveaxis(grammar.column[tokens], -1, 0)
    return jnp.moveaxis(jax.lax.scan(after, start, columns)[1], 0, -1)


def state_after(
    grammar: Grammar, state: Int[Array, "*s T"], tokens: Int[Array, "*s T"], count: Int[Array, "*s"]
) -> Int[Array, "*s"]:
    """The state after the first `count` ≥ 1 tokens; `state` is the one before each."""
    at = jnp.maximum(count - 1, 0)[..., None]
    state, tokens = (jnp.take_along_axis(x, at, axis=-1)[..., 0] for x in (state, tokens))
    return grammar.step[state, grammar.column[tokens]]


def content_tokens(grammar: Grammar, state: Int[Array, "*s"]) -> Bool[Array, "*s V"]:
    """The tokens that only choose a score in `state`."""
    return grammar.content[state][..., grammar.column]


def chooses_score(grammar: Grammar, state: Int[Array, "*s"]) -> Bool[Array, "*s"]:
    """Whether some token only chooses a score in `state`."""
    return grammar.content.any(-1)[state]


def allowed_tokens(grammar: Grammar, state: Int[Array, "*s"]) -> Bool[Array, "*s V"]:
    """The tokens that `state` lets through; all of them where none is left to continue with."""
    # Looked up by kind of token first, [S, C] with C far below V; only the rows that are needed grow to V.
    allowed = grammar.step != DEAD
    return (allowed | ~allowed.any(-1, keepdims=True))[state][..., grammar.column]
