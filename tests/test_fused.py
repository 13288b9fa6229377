"""The fused loss against a dense float64 one: values, extras, gradients, and what the program keeps in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from listopd_jax.ops.fused import fused_loss

V, VOCAB, D = 20, 17, 6


def cross_entropy(logits, rows, shared):
    """A loss with everything that ours have: picked log-probabilities, entropy, weights, something shared."""
    token, weight = rows
    logp = jax.nn.log_softmax(logits)
    at = jnp.take_along_axis(logp, token[:, None], 1)[:, 0]
    entropy = -(jnp.exp(logp) * logp).sum(-1)
    return -(weight * (at + shared * entropy)).sum(), {"at": at, "entropy": entropy}


def make(n, scale=1.0, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    hidden, head = (jnp.asarray(scale * rng.normal(size=(m, D)), dtype) for m in (n, V))
    rows = (
        jnp.asarray(rng.integers(VOCAB, size=n)),
        jnp.asarray(rng.random(n) * (rng.random(n) > 0.3), np.float32),
    )
    return hidden, head, rows


def dense(hidden, head, rows, shared):
    """The same loss, all logits at once, in float64 NumPy, with its gradients by hand."""
    hidden, head, weight = (np.asarray(x, np.float64) for x in (hidden, head, rows[1]))
    token, n = np.asarray(rows[0]), len(hidden)
    logits = hidden @ head[:VOCAB].T
    logp = logits - logits.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    p, at = np.exp(logp), logp[np.arange(n), token]
    entropy = -(p * logp).sum(-1)
    d_logits = weight[:, None] * (p - np.eye(VOCAB)[token] + shared * p * (logp + entropy[:, None]))
    d_head = np.zeros((V, D))
    d_head[:VOCAB] = d_logits.T @ hidden
    return -(weight * (at + shared * entropy)).sum(), at, entropy, d_logits @ head[:VOCAB], d_head


def ours(hidden, head, rows, shared, chunk):
    f = lambda h, w: fused_loss(cross_entropy, VOCAB, chunk, h, w, rows, jnp.float32(shared))  # noqa: E731
    (loss, extras), grads = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(hidden, head)
    return loss, extras["at"], extras["entropy"], *grads


@pytest.mark.parametrize(("n", "chunk"), [(1, 4), (7, 3), (12, 4), (12, 100)])
@pytest.mark.parametrize("scale", [0.3, 5.0])
def test_it_is_the_dense_loss_in_any_chunks(n, chunk, scale):
    case = make(n, scale)
    for got, wanted in zip(ours(*case, 0.1, chunk), dense(*case, 0.1), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5 * max(1, np.abs(wanted).max()))


def test_bfloat16_inputs_accumulate_in_float32():
    """Sums over 4096 rows would lose two digits in bfloat16; what is left is the rounding of the factors."""
    case = make(4096, 0.5, jnp.bfloat16)
    got, wanted = ours(*case, 0.0, 64), dense(*case, 0.0)
    assert float(got[0]) == pytest.approx(wanted[0], rel=1e-3)
    error = np.abs(np.asarray(got[4], np.float64) - wanted[4]).max() / np.abs(wanted[4]).max()
    assert error < 2**-7


def test_the_value_without_a_gradient_is_the_same():
    hidden, head, rows = make(9)
    loss, extras = fused_loss(cross_entropy, VOCAB, 4, hidden, head, rows, jnp.float32(0.2))
    assert float(loss) == pytest.approx(dense(hidden, head, rows, 0.2)[0], rel=1e-5)
    assert extras["at"].shape == (9,)


def test_a_scaled_loss_has_scaled_gradients():
    hidden, head, rows = make(9)
    grad = jax.grad(lambda h: 3 * fused_loss(cross_entropy, VOCAB, 4, h, head, rows, jnp.float32(0))[0])
    np.testing.assert_allclose(grad(hidden), 3 * dense(hidden, head, rows, 0)[3], rtol=1e-4, atol=1e-5)


def test_extreme_logits_stay_finite():
    case = make(8, 1e4)
    assert all(np.isfinite(np.asarray(x)).all() for x in ours(*case, 0.1, 4))


def temp_bytes(n, vocab):
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, 8), (vocab, 8), (n,))]
    tokens = jax.ShapeDtypeStruct((n,), jnp.int32)

    def loss(hidden, head, weight, token):
        return fused_loss(cross_entropy, vocab, 32, hidden, head, (token, weight), jnp.float32(0.1))[0]

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    """256 times the logits of one chunk would be 134 MB; the program grows by less than a hundredth of it."""
    small, large = temp_bytes(32, 4096), temp_bytes(32 * 256, 4096)
    assert large - small < 0.01 * 4 * 32 * 256 * 4096
