"""Shared-prefix attention against float64 NumPy on each query's own concatenated keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from listopd_jax.ops.attention import Part, Prompt, attention, causal, stored


def make(rng, B=3, n=2, T=5, S=5, P=7, N=4, KV=2, H=6, dtype=np.float32):
    shapes = [(B, n, T, N, H), (B, n, S, KV, H), (B, n, S, KV, H), (B, P, KV, H), (B, P, KV, H)]
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def prompt_of(k, v, lengths):
    """A prompt from keys and values [B,P,KV,H]."""
    return Prompt(*(x[:, 0] for x in stored(k[:, None], v[:, None])), jnp.asarray(lengths))


def split(q, k, v, mask, prompt_k, prompt_v, lengths):
    """Our attention to own keys, seen by `mask` [T,S], and a prompt."""
    return attention(
        q, [Part(*stored(k, v), mask[None, None]), prompt_of(prompt_k, prompt_v, lengths).part()]
    )


def oracle(q, k, v, mask, prompt_k, prompt_v, lengths):
    """Query by query: gather the visible keys, repeat nothing, one softmax."""
    out = np.zeros(q.shape)
    group = q.shape[3] // k.shape[3]
    for b, i, t, h in np.ndindex(q.shape[:4]):
        g, seen = h // group, mask[t]
        keys = np.concatenate([prompt_k[b, : lengths[b], g], k[b, i, seen, g]]).astype(np.float64)
        values = np.concatenate([prompt_v[b, : lengths[b], g], v[b, i, seen, g]]).astype(np.float64)
        scores = keys @ q[b, i, t, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, i, t, h] = weights @ values / weights.sum()
    return out


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize("step", [None, 0, 3])
def test_shared_prompt_equals_concatenated_keys(heads, step):
    T = 5 if step is None else 1
    arrays = make(np.random.default_rng(0), T=T, S=5, N=heads[0], KV=heads[1])
    mask = np.tril(np.ones((5, 5), bool)) if step is None else (np.arange(5) <= step)[None]
    lengths = np.array([7, 3, 1])
    got = split(*map(jnp.asarray, arrays[:3]), mask, *map(jnp.asarray, arrays[3:]), lengths)
    np.testing.assert_allclose(got, oracle(*arrays[:3], mask, *arrays[3:], lengths), rtol=0, atol=2e-6)


@pytest.mark.parametrize("step", [0, 3])
def test_the_current_token_is_a_part_of_its_own(step):
    """Keys written before, in a cache whose rest is unwritten, and the new key give the same as one longer cache."""
    q, k, v, pk, pv = map(jnp.asarray, make(np.random.default_rng(7), T=1))
    lengths, before = np.array([7, 3, 1]), (np.arange(5) < step)[None, None, None]
    new = Part(*stored(k[:, :, step : step + 1], v[:, :, step : step + 1]))
    got = attention(q, [prompt_of(pk, pv, lengths).part(), Part(*stored(k, v), before), new])
    mask = (np.arange(5) <= step)[None]
    np.testing.assert_allclose(got, oracle(*map(np.asarray, (q, k, v)), mask, pk, pv, lengths), atol=2e-6)


@pytest.mark.parametrize("tokens", [5, 257, 700])
def test_without_prompt_equals_jax_causal_attention(tokens):
    """In one block of queries, and in several of which the last is short."""
    rng = np.random.default_rng(1)
    q, k, v = (
        rng.normal(size=(*x.shape[:2], tokens, *x.shape[3:])).astype(np.float32) for x in make(rng)[:3]
    )
    got = causal(*map(jnp.asarray, (q, k, v)))
    for i in range(q.shape[1]):
        expected = jax.nn.dot_product_attention(q[:, i], k[:, i], v[:, i], is_causal=True)
        np.testing.assert_allclose(got[:, i], expected, rtol=0, atol=2e-6)


def test_gradients_equal_concatenated_softmax():
    q, k, v, pk, pv = map(jnp.asarray, make(np.random.default_rng(2)))
    mask, lengths = jnp.tril(jnp.ones((5, 5), bool)), jnp.array([7, 2, 1])

    def concatenated(q, k, v, pk, pv):
        n, group = q.shape[1], q.shape[3] // k.shape[3]
        keys, values = (
            jnp.concatenate([jnp.repeat(p[:, None], n, 1), own], 2).repeat(group, 3)
            for p, own in ((pk, k), (pv, v))
        )
        seen = jnp.broadcast_to((jnp.arange(7) < lengths[:, None])[:, None], (3, 5, 7))
        seen = jnp.concatenate([seen, jnp.broadcast_to(mask, (3, 5, 5))], -1)
        scores = jnp.einsum("bnthd,bnshd->bnhts", q, keys) / jnp.sqrt(6.0)
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf))
        return jnp.einsum("bnhts,bnshd->bnthd", weights, values)

    def ours(q, k, v, pk, pv):
        return causal(q, k, v, prompt_of(pk, pv, lengths))

    target = jnp.asarray(np.random.default_rng(3).normal(size=q.shape), jnp.float32)
    grads = [
        jax.jit(jax.grad(lambda *a, f=f: (f(*a) * target).sum(), argnums=range(5)))(q, k, v, pk, pv)
        for f in (ours, concatenated)
    ]
    for got, expected in zip(*grads, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype, atol", [(jnp.float32, 2e-6), (jnp.bfloat16, 0.04)])
def test_gradients_over_several_blocks_equal_jax_causal_attention(dtype, atol):
    """In float32; from bfloat16 inputs up to their rounding."""
    rng, shape = np.random.default_rng(8), (1, 2, 300, 4, 8)
    q, k, v, target = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(4))
    k, v = k[..., :2, :], v[..., :2, :]

    def jax_form(q, k, v):
        return jax.nn.dot_product_attention(q[0], k[0], v[0], is_causal=True)[None]

    def gradients(f, *arrays):
        return jax.grad(lambda *a: (f(*a) * target).sum(), argnums=(0, 1, 2))(*arrays)

    cast = [x.astype(dtype) for x in (q, k, v)]
    expected = gradients(jax_form, *(x.astype(jnp.float32) for x in cast))
    for got, exact in zip(gradients(causal, *cast), expected, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, np.float32), exact, rtol=2e-2, atol=atol)


def test_masked_keys_have_no_influence_and_no_nan():
    """Even enormous values behind a mask leave the result and every gradient as they were."""
    q, k, v, pk, pv = make(np.random.default_rng(4))
    mask, lengths = np.tril(np.ones((5, 5), bool)), np.array([3, 3, 3])
    clean = split(q, k, v, mask, pk, pv, lengths)
    pk[:, 3:], pv[:, 3:] = 1e18, -1e18
    np.testing.assert_array_equal(split(q, k, v, mask, pk, pv, lengths), clean)
    grads = jax.grad(lambda *a: split(*a[:3], mask, *a[3:], lengths).sum(), argnums=range(5))(q, k, v, pk, pv)
    assert all(np.isfinite(g).all() for g in grads)
    assert not grads[3][:, 3:].any() and not grads[4][:, 3:].any()


def test_large_scores_do_not_overflow():
    q, k, v, pk, pv = make(np.random.default_rng(5))
    mask, lengths = np.tril(np.ones((5, 5), bool)), np.array([7, 7, 7])
    got = split(q * 1e4, k, v, mask, pk, pv, lengths)
    np.testing.assert_allclose(got, oracle(q * 1e4, k, v, mask, pk, pv, lengths), rtol=0, atol=1e-4)


def test_bfloat16_inputs_accumulate_in_float32():
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in make(np.random.default_rng(6), P=512)]
    mask, lengths = np.tril(np.ones((5, 5), bool)), np.array([512, 300, 1])
    got = split(*arrays[:3], mask, *arrays[3:], lengths)
    exact = oracle(
        *(np.asarray(a, np.float64) for a in arrays[:3]), mask, *map(np.float64, arrays[3:]), lengths
    )
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=2e-2, atol=4e-3)


def test_prompt_scores_are_never_repeated_per_completion():
    """The compiled program holds no array of the size of a prompt KV repeated over completions."""
    B, n, T, P, KV, H = 2, 8, 1, 4096, 2, 64
    q = jax.ShapeDtypeStruct((B, n, T, 2 * KV, H), jnp.float32)
    own = jax.ShapeDtypeStruct((B, n, T, KV, H), jnp.float32)
    prompt = jax.ShapeDtypeStruct((B, P, KV, H), jnp.float32)
    lengths = jax.ShapeDtypeStruct((B,), jnp.int32)
    f = jax.jit(lambda q, k, v, pk, pv, m: causal(q, k, v, prompt_of(pk, pv, m)))
    memory = f.lower(q, own, own, prompt, prompt, lengths).compile().memory_analysis()
    assert memory.temp_size_in_bytes < n * B * P * KV * H * 4
