"""The Pallas kernel of a decode step's attention, by interpreter against float64 NumPy, and compiled for a TPU."""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies

from listopd_jax.ops import decode_kernel
from listopd_jax.ops.attention_backends import decode_attention

LAYERS, LAYER = 3, 1
# B, n, S, KV, G, H, P, C: completions, new tokens, heads, places of prompt and cache.
SIZES = {
    "one token": (4, 1, 1, 2, 2, 16, 24, 8),
    "drafts of three completions": (2, 3, 4, 2, 2, 16, 40, 16),
    "one head": (6, 2, 1, 1, 3, 8, 8, 8),
    "keys lie by head_dim": (2, 2, 2, 2, 1, 128, 72, 40),
    "values lie by token": (1, 2, 3, 1, 2, 64, 128, 256),
}


def shapes(B, n, S, KV, G, H, P, C, layers=LAYERS):
    """Of q, k, v, the stacks of prompt and cache, lengths, cached."""
    new = [(B, n, S, KV * G, H), *[(B, n, S, KV, H)] * 2]
    stacks = [(B, KV, H, P), (B, KV, P, H), (B, n, KV, H, C), (B, n, KV, C, H)]
    return [*new, *((layers, *shape) for shape in stacks)], (B,), (B, n)


def make(sizes, dtype=jnp.float32):
    """Arguments of decode_attention without the layer; what must not be seen is large."""
    rng = np.random.default_rng(0)
    arrays, *_ = shapes(*sizes)
    B, n, S, *_, P, C = sizes
    q, k, v, *stacks = (rng.normal(size=shape) for shape in arrays)
    lengths, cached = rng.integers(1, P + 1, B), rng.integers(0, C - S + 1, (B, n))
    lengths[0], cached[0] = P, 0
    unseen = [np.arange(P) >= lengths[:, None, None], np.arange(C) >= cached[..., None, None]]
    for i, x in enumerate(stacks):
        hidden = np.broadcast_to(unseen[i // 2], (*x.shape[1:-2], P if i < 2 else C))
        hidden = hidden[..., None, :] if i % 2 == 0 else hidden[..., None]
        x[:] = np.where(hidden, 1e4, x)
    return [*(jnp.asarray(x, dtype) for x in (q, k, v, *stacks)), jnp.asarray(lengths), jnp.asarray(cached)]


def exact(q, k, v, prompt_k, prompt_v, cache_k, cache_v, lengths, cached):
    """Query by query, float64."""
    q, k, v, prompt_k, prompt_v, cache_k, cache_v = (
        np.asarray(x, np.float64) for x in (q, k, v, prompt_k, prompt_v, cache_k, cache_v)
    )
    out, group = np.empty(q.shape), q.shape[3] // k.shape[3]
    for b, i, s, head in np.ndindex(q.shape[:4]):
        h, p, c = head // group, int(lengths[b]), int(cached[b, i])
        keys = [prompt_k[LAYER, b, h, :, :p].T, cache_k[LAYER, b, i, h, :, :c].T, k[b, i, : s + 1, h]]
        values = [prompt_v[LAYER, b, h, :p], cache_v[LAYER, b, i, h, :c], v[b, i, : s + 1, h]]
        scores = np.concatenate(keys) @ q[b, i, s, head] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, i, s, head] = weights @ np.concatenate(values) / weights.sum()
    return out


@pytest.fixture
def interpreter(monkeypatch):
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_it_is_the_softmax_over_what_each_token_sees(interpreter, sizes):
    arrays = make(sizes)
    np.testing.assert_allclose(
        decode_kernel.decode_attention(*arrays, jnp.int32(LAYER)), exact(*arrays), atol=2e-6
    )


def test_bfloat16_is_as_close_as_its_digits(interpreter):
    arrays = make(SIZES["drafts of three completions"], jnp.bfloat16)
    out = decode_kernel.decode_attention(*arrays, jnp.int32(LAYER))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), exact(*arrays), atol=0.03)


def test_blocks_of_rows_and_of_heads_change_nothing(interpreter, monkeypatch):
    arrays = make(SIZES["drafts of three completions"])
    for block in (1, 2**17):  # one row and head at a time, and one row
        monkeypatch.setattr(decode_kernel, "BLOCK_BYTES", block)
        out = decode_kernel.decode_attention(*arrays, jnp.int32(LAYER))
        np.testing.assert_allclose(out, exact(*arrays), atol=2e-6)


def attended(backend, q, k, v, prompt_k, prompt_v, cache_k, cache_v, lengths, cached):
    """What `decode_attention` of the backends gives in each layer, as a decode step asks for it."""
    per_layer, attend = decode_attention(backend, (prompt_k, prompt_v), lengths, (cache_k, cache_v), cached)
    return jax.lax.scan(lambda _, x: (_, attend(q, k, v, x)), None, per_layer)[1]


@pytest.mark.parametrize("each", [True, False], ids=["each its own", "one for all"])
def test_a_decode_step_has_the_same_from_both_backends(interpreter, each):
    arrays = make(SIZES["drafts of three completions"])
    arrays[-1] = arrays[-1] if each else jnp.full((1, 1), 3)
    out = attended("splash", *arrays)
    np.testing.assert_allclose(out, attended("xla", *arrays), atol=2e-6)
    assert out.shape[0] == LAYERS


def test_what_does_not_fit_in_fast_memory_is_computed_without_the_kernel(monkeypatch):
    """There is no interpreter here: the kernel would fail."""
    arrays = make(SIZES["one token"])
    assert decode_kernel.fits(arrays[0], arrays[4], arrays[6])
    monkeypatch.setattr(decode_kernel, "FAST_BYTES", 2**10)
    np.testing.assert_allclose(attended("splash", *arrays)[LAYER], exact(*arrays), atol=2e-6)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: the extra 'tpu'"
)
@pytest.mark.parametrize(
    "sizes",
    [
        (128, 1, 1, 2, 2, 128, 704, 64),
        (16, 8, 9, 8, 2, 128, 704, 512),
        (8, 1, 9, 3, 3, 64, 1024, 128),
        (4, 1, 3, 2, 2, 128, 704, 232),
        (2, 1, 7, 4, 2, 96, 130, 64),
        (8, 8, 9, 1, 8, 128, 704, 208),
    ],
    ids=["one token", "drafts", "SmolLM2", "a short cache", "odd heads", "as much as fits"],
)
@pytest.mark.parametrize("slice_", ["v4:2x2x1", "v5e:2x2"])
def test_the_tpu_compiler_takes_it_and_copies_no_stack(sizes, slice_, monkeypatch):
    """A v4 has the least fast memory."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    one = jax.sharding.SingleDeviceSharding(topologies.get_topology_desc(slice_, "tpu").devices[0])
    arrays, lengths, cached = shapes(*sizes, layers=28)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=one) for shape in arrays]
    arguments += [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=one) for shape in (lengths, cached, ())]

    def attend(q, *rest):
        assert decode_kernel.fits(q, rest[3], rest[5])
        return decode_kernel.decode_attention(q, *rest)

    compiled = jax.jit(attend).lower(*arguments).compile()
    least = 2 * min(math.prod(shape) for shape in arrays[3:])
    assert compiled.memory_analysis().temp_size_in_bytes < least
