"""The decoder's passes agree with each other, and neither padding nor remat has any influence."""

import dataclasses
import functools
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from jax.experimental import topologies

from listopd_jax.config import REMATS
from listopd_jax.errors import UserError
from listopd_jax.models import decoder as models_decoder
from listopd_jax.models.config import ModelConfig, RopeScaling, num_params
from listopd_jax.models.decoder import REMAT, Decoder, abstract, cast_once, rms_norm, rope_frequencies
from listopd_jax.models.hf.tensors import BIASES
from listopd_jax.ops import attention_cudnn
from listopd_jax.ops.attention import causal
from listopd_jax.ops.attention_backends import BACKENDS

QWEN = ModelConfig(61, 32, 48, 3, 4, 2, 12, rope_theta=5e6, tied=False)
LLAMA = ModelConfig(
    61, 32, 48, 2, 4, 1, 8, rope_theta=1e4, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16), qk_norm=False
)
QWEN2 = dataclasses.replace(LLAMA, num_kv_heads=2, qkv_bias=True)
SMOLLM3 = dataclasses.replace(LLAMA, num_layers=3, nope_layers=(1, 2))
LENGTHS = np.array([7, 4, 1])
N, T = 2, 5
ROUNDING = (
    1e-5  # of the largest value: what sums of this length differ by if float32 adds them in another order
)


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """These programs run once on toy sizes: compiling them is all the time they take."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(
    scope="module", params=[QWEN, LLAMA, QWEN2, SMOLLM3], ids=["qwen3", "llama", "qwen2", "smollm3"]
)
def model(request):
    decoder = Decoder(request.param, rngs=nnx.Rngs(0))
    if request.param.qkv_bias:
        for i, name in enumerate(BIASES):  # at initialisation they are zeros
            bias = getattr(decoder.layers, name)
            bias[...] = jax.random.normal(jax.random.key(i), bias.shape)
    return nnx.split(decoder)


@pytest.fixture(scope="module")
def batch():
    """Ragged right-padded prompts, completions, and the same as N whole sequences per prompt."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 61, (3, 7)).astype(np.int32)
    completions = rng.integers(0, 61, (3, N, T)).astype(np.int32)
    whole = np.zeros((3, N, 7 + T), np.int32)
    for b, length in enumerate(LENGTHS):
        whole[b, :, :length] = prompts[b, :length]
        whole[b, :, length : length + T] = completions[b]
    return prompts, completions, whole.reshape(3 * N, -1)


def weighted(hidden):
    """A scalar that every state enters with its own weight."""
    return (hidden.astype(jnp.float32) * np.cos(np.arange(hidden.size)).reshape(hidden.shape)).sum()


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
def shared(graphdef, params, prompts, completions):
    """States [B, n, 1+T, D] after the prompt and after every completion token, the prompt read once."""
    decoder = nnx.merge(graphdef, params)
    last, kv = decoder.prefill(prompts, LENGTHS)
    last = jnp.broadcast_to(last[:, None, None], (3, N, 1, last.shape[-1]))
    hidden = jnp.concatenate([last, decoder.extend(kv, LENGTHS, completions)], 2)
    return weighted(hidden), hidden


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
def unshared(graphdef, params, whole):
    """The same states from plain whole sequences."""
    hidden = nnx.merge(graphdef, params)(whole, np.repeat(LENGTHS + T, N))
    index = np.repeat(LENGTHS - 1, N)[:, None] + np.arange(T + 1)
    hidden = jnp.take_along_axis(hidden, index[..., None], axis=1).reshape(3, N, T + 1, -1)
    return weighted(hidden), hidden


def assert_close(ours, theirs, rtol):
    """Every leaf within rtol of the leaf's largest absolute value."""
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        atol = rtol * float(np.abs(b).max()) + 1e-7
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


def test_shared_prefix_equals_whole_sequences(model, batch):
    prompts, completions, whole = batch
    (_, ours), our_grads = shared(*model, prompts, completions)
    (_, plain), plain_grads = unshared(*model, whole)
    assert_close(ours, plain, 1e-5)
    assert_close(our_grads, plain_grads, 1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_decode_steps_equal_extend(model, batch, size):
    """Token by token, and in blocks, before each of which rows hold different numbers of tokens."""
    prompts, completions, _ = batch
    graphdef, params = model
    (_, expected), _ = shared(graphdef, params, prompts, completions)
    _, kv = jax.jit(lambda p: nnx.merge(graphdef, p).prefill(prompts, LENGTHS))(params)
    step = jax.jit(lambda p, cache, t, x: nnx.merge(graphdef, p).decode_step(kv, LENGTHS, cache, t, x))
    cache = nnx.merge(graphdef, params).init_cache(3, N, T + 2)  # the unused rest must not be seen
    behind = np.zeros((3, N), int) if size == 1 else np.random.default_rng(0).integers(0, size, (3, N))
    for t in range(0, T, size):
        cached = np.maximum(t - behind, 0)
        place = cached[..., None] + np.arange(size)
        block = np.minimum(place, T - 1)
        read = np.take_along_axis(np.asarray(completions), block, -1)
        hidden, cache = step(params, cache, jnp.int32(t) if size == 1 else cached, read)
        after = np.take_along_axis(np.asarray(expected), block[..., None] + 1, 2)
        np.testing.assert_allclose(hidden[place < T], after[place < T], atol=1e-5, err_msg=f"step {t}")


def test_prompts_read_in_blocks_are_those_read_at_once(model, batch, monkeypatch):
    """Rows and tokens do not know of each other's block; one row is the least."""
    graphdef, params = model
    read = lambda p: nnx.merge(graphdef, p).prefill(batch[0], LENGTHS)  # noqa: E731
    whole = jax.jit(read)(params)
    monkeypatch.setattr(models_decoder, "BLOCK", 7)
    program = jax.jit(lambda p: read(p)).lower(params)
    assert program.as_text().count("stablehlo.while") == 2  # rows inside layers
    assert_close(program.compile()(params), whole, ROUNDING)


def compiled_decode_step(config, B, n, P, C, dtype, sharding=None):
    """The optimised program of one decode step whose cache is donated, for n completions of B prompts."""
    graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype))

    def start(params):
        decoder = nnx.merge(graphdef, params)
        _, prompt = decoder.prefill(jnp.zeros((B, P), jnp.int32), jnp.ones(B, jnp.int32))
        return params, prompt, jnp.ones(B, jnp.int32), decoder.init_cache(B, n, C), jnp.int32(0), tokens

    tokens = jnp.zeros((B, n, 1), jnp.int32)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(start, params)
    )
    step = jax.jit(lambda p, *rest: nnx.merge(graphdef, p).decode_step(*rest), donate_argnums=3)
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        return step.lower(*shapes).compile(), shapes[3]
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


def test_a_decode_step_copies_no_cache():
    """The compiled step makes no transposed copy of a layer's keys or values; it updates the cache in place."""
    B, P = 2, 96
    config = dataclasses.replace(QWEN, head_dim=32)
    compiled, _ = compiled_decode_step(config, B, 4, P, 64, jnp.float32)
    layer = B * config.num_kv_heads * config.head_dim * P  # the smaller of a layer's keys: the prompt's
    made = re.findall(r"= f32\[([\d,]+)\]\S* (copy|transpose|dynamic-update-slice)\(", compiled.as_text())
    large = [name for shape, name in made if math.prod(map(int, shape.split(","))) >= layer]
    assert large == ["dynamic-update-slice"] * 2


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install listopd_jax[tpu]"
)
def test_a_decode_step_on_a_tpu_has_no_room_for_a_layer_of_the_cache(monkeypatch):
    """Its temporary memory is less than one layer's keys: they are read where they lie."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    device = topologies.get_topology_desc("v5e:2x2", "tpu").devices[0]
    config, place = dataclasses.replace(QWEN, head_dim=128), jax.sharding.SingleDeviceSharding(device)
    compiled, cache = compiled_decode_step(config, 8, 16, 512, 1024, jnp.bfloat16, place)
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * math.prod(cache.k.shape[1:])


def test_padding_has_no_influence(model, batch):
    """Other tokens in the padding, or more of it, leave every valid state and every gradient as they were."""
    prompts, completions, _ = batch
    padding = np.arange(7) >= LENGTHS[:, None]
    changed = np.where(padding, (prompts + 17) % 61, prompts)
    longer = np.concatenate([prompts, np.full((3, 4), 60, np.int32)], 1)
    (_, hidden), grads = shared(*model, prompts, completions)
    for other in (changed, longer):
        (_, again), other_grads = shared(*model, other, completions)
        assert_close(again, hidden, ROUNDING)
        assert_close(other_grads, grads, ROUNDING)


def test_padding_is_zero_and_gradients_finite(model):
    """Whatever stands in the padding, tokens outside the vocabulary included."""
    graphdef, params = model
    tokens, lengths = np.full((2, 5), -1, np.int32), np.array([5, 1])
    tokens[0], tokens[1, 0] = 3, 9999

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def grad(p):
        hidden = nnx.merge(graphdef, p)(tokens, lengths)
        return (hidden**2).sum(), hidden

    grads, hidden = grad(params)
    assert not hidden[1, 1:].any() and hidden[0].any() and np.isfinite(hidden).all()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("remat", ["full", "attention", "dots"])
def test_remat_changes_no_gradient(batch, remat):
    graphdef, params = nnx.split(Decoder(QWEN, rngs=nnx.Rngs(0)))
    recomputing, _ = abstract(QWEN, remat=remat)
    _, expected = shared(graphdef, params, *batch[:2])
    assert_close(shared(recomputing, params, *batch[:2])[1], expected, 1e-5)


def test_remat_policies_store_less():
    """The stored residuals of a deep model grow from policy to policy."""
    config = dataclasses.replace(QWEN, num_layers=8)
    tokens = jax.ShapeDtypeStruct((8, 32), jnp.int32)
    lengths = jax.ShapeDtypeStruct((8,), jnp.int32)

    def temporaries(remat):
        graphdef, params = abstract(config, remat=remat)
        grad = jax.jit(jax.grad(lambda p, t, n: (nnx.merge(graphdef, p)(t, n) ** 2).sum()))
        return grad.lower(params, tokens, lengths).compile().memory_analysis().temp_size_in_bytes

    full, attention, dots, none = map(temporaries, REMATS)
    assert full < attention < dots < none


@pytest.mark.parametrize("remat, count", [("full", 0), ("attention", 2), ("dots", 2)])
def test_what_attention_leaves_is_stored_where_the_policy_says_so(remat, count, capsys):
    """The mixed values and the log of the softmax's denominator."""
    x = jnp.ones((1, 2, 5, 4, 8))
    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(causal, policy=REMAT[remat]), x, x, x)
    assert capsys.readouterr().out.count("named 'attention'") == count


def test_unknown_remat_is_refused():
    with pytest.raises(UserError, match="remat: 'ful' is not a policy"):
        Decoder(QWEN, rngs=nnx.Rngs(0), remat="ful")


def test_the_attention_backend_changes_no_gradient(batch, monkeypatch):
    """The fused backend for GPUs, by XLA on a CPU, in prefill and extend."""
    monkeypatch.setitem(BACKENDS, "cudnn", functools.partial(attention_cudnn.causal, implementation="xla"))
    graphdef, params = nnx.split(Decoder(QWEN, rngs=nnx.Rngs(0)))
    fused, _ = abstract(QWEN, attention="cudnn")
    (_, states), gradients = shared(fused, params, *batch[:2])
    (_, expected), expected_gradients = shared(graphdef, params, *batch[:2])
    assert_close(states, expected, 1e-5)
    assert_close(gradients, expected_gradients, 1e-5)


def test_unknown_form_of_attention_is_refused():
    with pytest.raises(UserError, match="attention: 'flash' is not a backend"):
        Decoder(QWEN, rngs=nnx.Rngs(0), attention="flash")


def test_bfloat16_compute_is_close_and_leaves_float32_parameters(batch):
    prompts, completions, whole = batch
    graphdef, params = nnx.split(Decoder(QWEN, rngs=nnx.Rngs(0)))
    low, _ = abstract(QWEN, dtype=jnp.bfloat16)
    (_, exact), _ = unshared(graphdef, params, whole)
    states = jax.jit(lambda p: nnx.merge(low, p)(whole, np.repeat(LENGTHS + T, N)))(params)
    rough = np.asarray(states, np.float32).reshape(3, N, -1, 32)[0, :, LENGTHS[0] - 1 :]
    assert states.dtype == jnp.bfloat16
    assert np.abs(rough - exact[0]).max() < 0.03 * np.abs(exact).max()
    _, grads = jax.eval_shape(functools.partial(shared, low), params, prompts, completions)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert jax.eval_shape(lambda p: nnx.merge(low, p).init_cache(1, 1, 1), params).k.dtype == jnp.bfloat16


def test_parameter_count_and_head(model):
    decoder = nnx.merge(*model)
    assert sum(leaf.size for leaf in jax.tree.leaves(model[1])) == num_params(decoder.config)
    assert decoder.head_weight().shape == (61, 32)
    same = np.array_equal(decoder.head_weight(), decoder.embed[...])
    assert same == decoder.config.tied


def test_initial_prediction_is_nearly_uniform():
    """A fresh model's loss is near log V."""
    decoder = Decoder(ModelConfig(512, 64, 192, 12, 4, 2, 16), rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 512, (4, 32))
    hidden = nnx.jit(lambda d, x: d(x, np.full(4, 32)))(decoder, tokens)
    log_probs = scipy.special.log_softmax(hidden @ decoder.head_weight().T, -1)
    loss = -np.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], -1).mean()
    assert abs(float(loss) - np.log(512)) < 1


def test_layers_differ_at_initialisation():
    q = Decoder(QWEN, rngs=nnx.Rngs(0)).layers.q[...]
    assert q.shape[0] == 3 and not np.allclose(q[0], q[1])


def test_norm_is_exact_in_float32_for_bfloat16_input():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)) * 100, jnp.bfloat16)
    y = np.asarray(x, np.float64)
    exact = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)
    got = np.asarray(rms_norm(x, jnp.ones(64), 1e-6), np.float64)
    np.testing.assert_allclose(got, exact, rtol=2**-8)


def test_rope_frequencies_of_qwen3():
    got = rope_frequencies(dataclasses.replace(QWEN, head_dim=128))
    np.testing.assert_allclose(got, 5e6 ** (-np.arange(64) / 64), rtol=1e-6)


def test_states_at_places_are_those_of_whole_sequences(model, batch):
    graphdef, params = model
    tokens, places = batch[2], np.array([[0, 3], [2, 2], [6, 1]] * N)
    decoder = nnx.merge(graphdef, params)
    whole = decoder(tokens, np.full(len(tokens), tokens.shape[1]))
    expected = np.take_along_axis(np.asarray(whole), places[..., None], 1)
    np.testing.assert_allclose(decoder.states_at(tokens, places), expected, rtol=0, atol=ROUNDING)


def test_weights_that_are_cast_once_are_the_same_decoder(batch):
    """The same states; gradients differ by the rounding of their sums. Norms, embedding and head stay in float32."""
    graphdef, params = nnx.split(Decoder(QWEN, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    (_, states), grads = shared(graphdef, params, *batch[:2])
    (_, same), found = shared(graphdef, cast_once(params, jnp.dtype(jnp.bfloat16)), *batch[:2])
    np.testing.assert_array_equal(states, same)
    assert_close(jax.tree.map(lambda g: g.astype(jnp.float32), found), grads, 1e-2)
    for path, leaf in nnx.to_flat_state(found):
        product = path[0] == "layers" and "norm" not in path[-1]
        assert leaf[...].dtype == (jnp.bfloat16 if product else jnp.float32)
