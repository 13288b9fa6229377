"""The fused backends of causal attention against the reference; kernels by interpreter, or compiled for a TPU."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding

from listopd_jax.errors import UserError
from listopd_jax.ops import attention, attention_cudnn, attention_splash
from listopd_jax.ops.attention import Prompt
from listopd_jax.ops.attention_backends import causal_attention, resolve
from listopd_jax.parallel.mesh import make_mesh, use_mesh
from listopd_jax.parallel.rules import spec

OURS = {
    "splash": functools.partial(attention_splash.causal, interpret=True),
    "cudnn": functools.partial(attention_cudnn.causal, implementation="xla"),
}


def make(B, n, T, P, N, KV, H):
    """q, k, v, and a prompt's k and v in stored order; float32."""
    rng = np.random.default_rng(0)
    shapes = [(B, n, T, N, H), (B, n, T, KV, H), (B, n, T, KV, H), (B, KV, H, P), (B, KV, P, H)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(backend, arrays, lengths):
    """The result and the gradient of a weighted sum of it with respect to every array."""

    def loss(q, k, v, *prompt):
        out = backend(q, k, v, Prompt(*prompt, lengths) if prompt else None)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    (_, out), gradients = jax.value_and_grad(loss, argnums=range(len(arrays)), has_aux=True)(*arrays)
    return out, gradients


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize(
    ("sizes", "lengths"),
    [
        ((3, 3, 7, 20, 4, 2, 12), (20, 1, 11)),  # GQA, three completions in one block
        ((2, 1, 140, 150, 2, 1, 8), (150, 9)),  # MQA, one completion, more than one block
        ((2, 1, 9, None, 2, 2, 8), None),  # whole sequences
    ],
    ids=["n=3", "n=1", "whole"],
)
def test_fused_backends_equal_the_reference_in_value_and_gradient(backend, sizes, lengths):
    B, n, T, P, *heads = sizes
    arrays = make(B, n, T, P or 1, *heads)[: 5 if P else 3]
    lengths = lengths and jnp.array(lengths)
    expected = value_and_gradients(attention.causal, arrays, lengths)
    for ours, theirs in zip(
        *map(jax.tree.leaves, (value_and_gradients(OURS[backend], arrays, lengths), expected)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6)


@pytest.mark.parametrize("backend", [attention.causal, *OURS.values()], ids=["xla", *OURS])
def test_sequences_that_share_a_row_are_as_if_alone(backend):
    """In value and gradient, in a row of odd length and more than one block; the second row holds one sequence."""
    arrays, T = make(2, 1, 141, 1, 4, 2, 12)[:3], 141
    starts = jnp.array([[0] * 60 + [60] * 75 + [135] * 6, [0] * T])

    def alone(q, k, v, _):
        parts = [
            attention.causal(q[:1, :, a:b], k[:1, :, a:b], v[:1, :, a:b])
            for a, b in ((0, 60), (60, 135), (135, T))
        ]
        return jnp.concatenate([jnp.concatenate(parts, 2), attention.causal(q[1:], k[1:], v[1:])])

    found = value_and_gradients(lambda q, k, v, _: backend(q, k, v, starts=starts), arrays, None)
    expected = value_and_gradients(alone, arrays, None)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6)


def test_completions_see_the_prompt_and_their_own_past():
    """Against the definition, entry by entry, in any blocks."""
    prompt, tokens, rows = 4, 3, 8  # two completions and two rows of padding
    mask = attention_splash.CompletionsMask(prompt, tokens, rows)
    expected = np.zeros((rows, prompt + rows), bool)
    for row, column in np.ndindex(expected.shape):
        own = column - prompt
        expected[row, column] = own < 0 or (own // tokens == row // tokens and own <= row)
    np.testing.assert_array_equal(mask[:, :], expected)
    np.testing.assert_array_equal(mask[2:5, 3:9], expected[2:5, 3:9])
    assert mask.shape == expected.shape and expected.any(1).all()


@pytest.mark.parametrize("length", [1, 128, 129, 700, 2048])
def test_padding_is_less_than_a_block(length):
    whole = attention_splash.round_up_to_blocks(length)
    assert 0 <= whole - length < 256 and whole % 128 == 0
    assert length <= 128 or whole % 256 == 0


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install listopd_jax[tpu]"
)
@pytest.mark.parametrize("passes", ["prefill", "gradient of extend"])
def test_splash_compiles_for_four_tpus_without_an_array_of_scores(passes, monkeypatch):
    """Over rows and heads; XLA's own backend stores B·N·P·P float32 scores of a prefill of 2048 tokens."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    sizes = {"data": 1, "fsdp": 2, "tensor": 2}
    mesh = make_mesh(sizes, topologies.get_topology_desc("v5e:2x2", "tpu").devices)
    B, n, T, P, N, KV, H = (
        (4, 1, 2048, 0, 16, 8, 128) if passes == "prefill" else (4, 4, 225, 2048, 16, 8, 128)
    )

    def array(axes, *shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(axes, shape, mesh)))

    rows = functools.partial(array, ("batch", None, None, "heads", None), B, n, T)
    stored = functools.partial(array, ("batch", "kv_heads", None, None), B, KV)
    lengths = array(("batch",), B, dtype=jnp.int32)

    def prefill(q, k, v):
        return causal_attention("splash", q, k, v)

    @functools.partial(jax.grad, argnums=range(5))
    def gradient(q, k, v, prompt_k, prompt_v, lengths):
        out = causal_attention("splash", q, k, v, Prompt(prompt_k, prompt_v, lengths))
        return (out.astype(jnp.float32) ** 2).sum()

    own = rows(N, H), rows(KV, H), rows(KV, H)
    with use_mesh(mesh):
        if passes == "prefill":
            lowered = jax.jit(prefill).lower(*own)
        else:
            lowered = jax.jit(gradient).lower(*own, stored(H, P), stored(P, H), lengths)
        compiled = lowered.compile()
    scores = 4 * B * N * (n * T) * (P + T) // mesh.size
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 20
    assert "splash_mha" in compiled.as_text()


@pytest.mark.parametrize(
    ("platform", "dtype", "backend"),
    [
        ("tpu", "float32", "splash"),
        ("tpu", "bfloat16", "splash"),
        ("gpu", "bfloat16", "cudnn"),
        ("gpu", "float32", "xla"),
        ("cpu", "bfloat16", "xla"),
    ],
)
def test_auto_is_the_best_backend_of_a_device(platform, dtype, backend):
    assert resolve("auto", platform, dtype) == backend
    assert resolve(backend, platform, dtype) == backend
    assert resolve("xla", platform, dtype) == "xla"


@pytest.mark.parametrize(
    ("backend", "platform", "dtype", "said"),
    [
        ("splash", "cpu", "bfloat16", "needs a TPU, not a cpu"),
        ("splash", "gpu", "bfloat16", "needs a TPU, not a gpu"),
        ("cudnn", "tpu", "bfloat16", "needs a GPU, not a tpu"),
        ("cudnn", "gpu", "float32", "needs dtype.compute='bfloat16'"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_in_one_line(backend, platform, dtype, said):
    with pytest.raises(UserError, match=said) as error:
        resolve(backend, platform, dtype)
    assert "\n" not in str(error.value) and "attention=" in str(error.value)
