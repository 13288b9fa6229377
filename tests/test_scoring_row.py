"""Scoring one completion per prompt in one causal row, the fused kernels' form, against the two-pass form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from listopd_jax.models.config import ModelConfig
from listopd_jax.models.decoder import Decoder
from listopd_jax.rollout.scoring import RowWidth, completion_hidden, one_row_hidden, row_width

B, P, T = 4, 6, 5
LENGTHS = jnp.array([6, 1, 3, 5])
TOKENS = jnp.array([[2], [5], [4], [3]])  # of the completions: no row has more than 8


@pytest.fixture(scope="module")
def both():
    """Value and gradient of a weighted sum of hidden states, by each form."""
    decoder = Decoder(ModelConfig(20, 16, 32, 2, 4, 2, 8, tied=True), rngs=nnx.Rngs(0))
    graph, params = nnx.split(decoder)
    rng = np.random.default_rng(0)
    prompts, completions = (
        jnp.asarray(rng.integers(20, size=(B, P))),
        jnp.asarray(rng.integers(20, size=(B, 1, T))),
    )
    weights = jnp.asarray(rng.normal(size=(B, 1, T, 16)), jnp.float32)

    real = jnp.arange(T) < TOKENS[..., None]

    def of(form):
        def loss(params):
            hidden = form(nnx.merge(graph, params), prompts, LENGTHS, completions)
            return (jnp.where(real[..., None], hidden, 0) * weights).sum(), hidden

        (_, hidden), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return jnp.where(real[..., None], hidden, 0), grads

    return of


@pytest.fixture(scope="module", params=[None, RowWidth(8)], ids=["widest", "cut"])
def pair(both, request):
    return both(completion_hidden), both(functools.partial(one_row_hidden, width=request.param))


def test_hidden_states_are_those_of_the_two_pass_form(pair):
    (expected, _), (hidden, _) = pair
    np.testing.assert_allclose(hidden, expected, rtol=0, atol=1e-5)


def test_gradients_are_those_of_the_two_pass_form(pair):
    (_, expected), (_, grads) = pair
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * float(jnp.abs(theirs).max()))


def test_rows_are_as_wide_as_the_longest_prompt_with_its_completion():
    assert row_width("cudnn", LENGTHS, TOKENS) == RowWidth(32)
    assert row_width("cudnn", jnp.array([700, 3]), jnp.array([[225], [512]])) == RowWidth(928)
    assert row_width("xla", LENGTHS, TOKENS) is None
    assert row_width("cudnn", LENGTHS, jnp.ones((4, 2), int)) is None  # prompts are shared, not repeated


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 925, 1024, 1025, 1100, 3000])
def test_widths_are_few_and_hardly_too_wide(tokens):
    width = RowWidth.holding(tokens).tokens
    assert tokens <= width <= tokens + max(31, tokens / 16)
    assert RowWidth.holding(width).tokens == width
    assert len({RowWidth.holding(n).tokens for n in range(1025, 2049)}) == 16
