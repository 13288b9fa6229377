"""Scoring one completion per prompt in one causal row, the fused kernels' form, against the two-pass form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from listopd_jax.models.config import ModelConfig
from listopd_jax.models.decoder import Decoder
from listopd_jax.rollout.scoring import completion_hidden, one_row_hidden

B, P, T = 4, 6, 5
LENGTHS = jnp.array([6, 1, 3, 5])


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

    def of(form):
        def loss(params):
            hidden = form(nnx.merge(graph, params), prompts, LENGTHS, completions)
            return (hidden * weights).sum(), hidden

        (_, hidden), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return hidden, grads

    return of(completion_hidden), of(one_row_hidden)


def test_hidden_states_are_those_of_the_two_pass_form(both):
    (expected, _), (hidden, _) = both
    np.testing.assert_allclose(hidden, expected, rtol=0, atol=1e-5)


def test_gradients_are_those_of_the_two_pass_form(both):
    (_, expected), (_, grads) = both
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * float(jnp.abs(theirs).max()))
