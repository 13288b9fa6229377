"""Chunked log-probabilities against NumPy, torch and trl; no array of positions × vocabulary exists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from listopd_jax.ops.head import entropy_of, log_distribution, map_positions, token_logprobs

D, V, PADDED = 12, 37, 48
SHAPE = (2, 3, 5)


@pytest.fixture(scope="module")
def case():
    """Hidden states, a head with rows that are no tokens, and tokens."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(*SHAPE, D)).astype(np.float32)
    head = rng.normal(size=(PADDED, D)).astype(np.float32)
    head[V:] *= 100  # would swallow all probability if it counted
    return hidden, head, rng.integers(V, size=SHAPE)


def exact(hidden, head, tokens):
    """log π(token) and entropy in float64."""
    logits = hidden.astype(np.float64) @ head[:V].T.astype(np.float64)
    logp = logits - logits.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    return np.take_along_axis(logp, tokens[..., None], -1)[..., 0], -(np.exp(logp) * logp).sum(-1)


@pytest.mark.parametrize("chunk", [1, 4, 7, 30, 1000])
def test_chunks_give_what_float64_gives(case, chunk):
    for got, expected in zip(token_logprobs(*case, V, chunk), exact(*case), strict=True):
        assert got.dtype == jnp.float32 and got.shape == SHAPE
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # trl takes seconds to import
def test_is_trl_selective_log_softmax_and_entropy(case):
    torch = pytest.importorskip("torch", reason="needs torch, the oracle")
    utils = pytest.importorskip("trl.trainer.utils", reason="needs trl, the oracle")
    hidden, head, tokens = map(torch.tensor, case)
    theirs = utils.selective_log_softmax_and_entropy(hidden @ head[:V].T, tokens)
    for got, expected in zip(token_logprobs(*case, V, 8), theirs, strict=True):
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-5)


def weighted(hidden, head, tokens, weights, chunk):
    logprob, entropy = token_logprobs(hidden, head, tokens, V, chunk)
    return (weights[0] * logprob + weights[1] * entropy).sum()


@pytest.fixture(scope="module")
def weights():
    return np.random.default_rng(1).normal(size=(2, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize("chunk", [7, 30])
def test_gradients_are_torch_gradients(case, weights, chunk):
    torch = pytest.importorskip("torch", reason="needs torch, the oracle")
    hidden, head = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in case[:2])
    policy = torch.distributions.Categorical(logits=hidden @ head[:V].T)
    w = torch.tensor(weights)
    (w[0] * policy.log_prob(torch.tensor(case[2])) + w[1] * policy.entropy()).sum().backward()
    ours = jax.grad(weighted, (0, 1))(*case, weights, chunk)
    np.testing.assert_allclose(ours[0], hidden.grad, atol=2e-5)
    np.testing.assert_allclose(ours[1], head.grad, atol=2e-5)


def test_rows_beyond_the_vocabulary_get_no_gradient(case, weights):
    grad = np.asarray(jax.grad(weighted, 1)(*case, weights, 7))
    assert (grad[V:] == 0).all()
    assert (np.abs(grad[:V]).max(-1) > 0).all()


def test_large_logits_stay_finite_and_accurate(case):
    hidden, head, tokens = case
    expected = exact(1e4 * hidden, head, tokens)
    for got, truth in zip(token_logprobs(1e4 * hidden, head, tokens, V, 8), expected, strict=True):
        np.testing.assert_allclose(got, truth, rtol=1e-5, atol=1e-2)
    grads = jax.grad(weighted, (0, 1))(1e4 * hidden, head, tokens, np.ones((2, *SHAPE), np.float32), 8)
    assert all(np.isfinite(x).all() for x in grads)


def test_bfloat16_inputs_are_accumulated_in_float32(case):
    hidden, head = (jnp.asarray(x, jnp.bfloat16) for x in case[:2])
    rounded = [np.asarray(x, np.float32) for x in (hidden, head)]
    for got, expected in zip(
        token_logprobs(hidden, head, case[2], V, 8), exact(*rounded, case[2]), strict=True
    ):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, atol=1e-4)  # bfloat16 logits would be off by 1e-2


def test_distribution_is_normalised_over_the_tokens_that_exist(case):
    logp = np.asarray(log_distribution(case[0], case[1], V))
    assert logp.shape == (*SHAPE, V)
    np.testing.assert_allclose(np.exp(logp).sum(-1), 1, rtol=1e-5)


def test_entropy_of_known_distributions():
    logp = jax.nn.log_softmax(jnp.array([[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, -200.0, -200.0]]))
    np.testing.assert_allclose(entropy_of(logp), [np.log(4), np.log(2)], rtol=1e-6)
    certain = jax.nn.log_softmax(jnp.array([1e4, 0.0, -1e4]))
    assert float(entropy_of(certain)) == 0


def test_map_positions_is_the_function_itself():
    x = np.arange(22, dtype=np.float32).reshape(11, 2)

    def double_and_sum(rows):
        return {"double": 2 * rows[0], "sum": (rows[0].sum(-1) + rows[1], rows[1])}

    expected = double_and_sum((x, x[:, 0]))
    for chunk in (1, 4, 11, 50):
        got = map_positions(double_and_sum, (x, x[:, 0]), chunk)
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def largest_array(jaxpr) -> int:
    """Size of the largest intermediate array of a program, inner programs (loops, recomputation) included."""
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
    inner = [largest_array(sub) for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params)]
    return max([*sizes, *inner], default=0)


@pytest.mark.parametrize("chunk", [8, 64])
def test_no_array_of_positions_by_vocabulary_exists(chunk):
    """Forward and backward, 512 positions × 1000 tokens: the largest array is a chunk's, or a parameter's."""
    positions, vocab, dim = 512, 1000, 4
    args = jnp.zeros((positions, dim)), jnp.zeros((vocab, dim)), jnp.zeros(positions, jnp.int32)

    def loss(hidden, head, tokens):
        return sum(x.sum() for x in token_logprobs(hidden, head, tokens, vocab, chunk))

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(*args)
    assert largest_array(jaxpr.jaxpr) <= max(chunk * vocab, vocab * dim, positions * dim)
