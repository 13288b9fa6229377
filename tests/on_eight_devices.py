"""The programs on 8 fake CPU devices against those of one; run by test_parallel.py in a process of its own."""

import dataclasses
import functools
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import pallas as pl

from listopd_jax.config import defaults
from listopd_jax.data.packing import RowShape, pack
from listopd_jax.errors import UserError
from listopd_jax.models import decoder as models_decoder
from listopd_jax.models import hf
from listopd_jax.models.build import cast, initial_params
from listopd_jax.models.config import PROJECTIONS, Lora, ModelConfig
from listopd_jax.models.decoder import Decoder, abstract
from listopd_jax.models.hf import load
from listopd_jax.models.lora import abstract_adapter
from listopd_jax.ops import attention_splash
from listopd_jax.ops.attention import Prompt, causal
from listopd_jax.ops.attention_backends import BACKENDS, causal_attention, decode_attention
from listopd_jax.ops.fused import fused_loss
from listopd_jax.ops.gather_kernel import gather_logprobs
from listopd_jax.ops.grammar import Grammar
from listopd_jax.ops.head import token_logprobs
from listopd_jax.ops.objective import Hyper, Variant
from listopd_jax.ops.opd_loss import Frozen, Models
from listopd_jax.parallel.hosts import global_batch
from listopd_jax.parallel.mesh import AXES, make_mesh, use_mesh
from listopd_jax.parallel.rules import batch_shardings, param_sharding, rollout_shardings, state_shardings
from listopd_jax.plan.traffic import traffic
from listopd_jax.rollout import decode
from listopd_jax.rollout.decode import Rollout, generate
from listopd_jax.rollout.scoring import completion_logprobs
from listopd_jax.train.opd_step import OpdBatch, make_opd_step
from listopd_jax.train.optimizer import TrainState
from listopd_jax.train.sft_step import cross_entropy, make_sft_step

VOCAB, B, P, N, T = 90, 8, 6, 2, 5  # 90 tokens: no tensor axis but 2 divides them
LAYERS = 2
ROWS_BY_TENSOR = ((8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8))  # data, fsdp, tensor
RECORD = optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda grads, state, params: (grads, grads),
)
TX = optax.chain(RECORD, optax.clip_by_global_norm(1.0), optax.scale_by_adam())
"""Adam that keeps the last gradient as the first part of its state."""


def decoder(rows, hidden, num_kv_heads, seed):
    config = ModelConfig(rows, hidden, 2 * hidden, LAYERS, 8, num_kv_heads, 4, tied=seed % 2 == 0)
    graphdef, shapes = abstract(config)
    rng = np.random.default_rng(seed)
    return graphdef, jax.tree.map(lambda x: np.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes)


STUDENT_DEF, STUDENT = decoder(96, 16, 2, seed=0)  # 2 KV heads: fewer than a tensor axis of 4 or 8
_, BASE = decoder(96, 16, 2, seed=2)
STUDENT_CONFIG, LORA = ModelConfig(96, 16, 32, LAYERS, 8, 2, 4, tied=True), Lora(2, 4.0, PROJECTIONS)
TEACHER_DEF, TEACHER = decoder(104, 32, 4, seed=1)  # another width, another padded vocabulary, an untied head
FROZEN, MODELS = Frozen(TEACHER, BASE), Models(STUDENT_DEF, TEACHER_DEF, STUDENT_DEF)
HYPER = jax.tree.map(
    np.float32,
    Hyper(lam=1.3, clip=5.0, kl_to_base=0.1, entropy_bonus=0.1, ppo_clip=0.2, guard_margin=1.1),
)
LR = np.float32(3e-3)


def opd_batch(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, (B, N)).astype(np.int32)
    mask = np.arange(T) < lengths[..., None]
    tokens = np.where(mask, rng.integers(1, VOCAB, mask.shape), 0).astype(np.int32)
    logprobs = np.where(mask, -3 * rng.random(mask.shape), 0).astype(np.float32)
    prompts = rng.integers(VOCAB, size=(B, P)).astype(np.int32)
    return OpdBatch(prompts, rng.integers(1, P + 1, B).astype(np.int32), Rollout(tokens, logprobs, lengths))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4)])
def test_fused_attention_is_that_of_one_device(sizes, monkeypatch):
    """A kernel runs on each device's rows and heads: here by interpreter."""
    ours = functools.partial(attention_splash.causal, interpret=True)
    monkeypatch.setitem(BACKENDS, "splash", ours)
    rng = np.random.default_rng(0)
    shapes = ((4, 2, 3, 8, 8), (4, 2, 3, 4, 8), (4, 2, 3, 4, 8), (4, 4, 8, 5), (4, 4, 5, 8))
    q, k, v, *prompt = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    prompt = Prompt(*prompt, np.array([5, 1, 3, 2], np.int32))
    with use_mesh(mesh_of(*sizes)):
        split = jax.jit(functools.partial(causal_attention, "splash"))(q, k, v, prompt)
    np.testing.assert_allclose(split, causal(q, k, v, prompt), rtol=0, atol=2e-6)
    rows, starts = (
        [x[:, :1] for x in (q, k, v)],
        np.array([[0, 0, 2], [0, 1, 1], [0, 0, 0], [0, 1, 2]], np.int32),
    )
    with use_mesh(mesh_of(*sizes)):
        split = jax.jit(functools.partial(causal_attention, "splash"))(*rows, starts=starts)
    np.testing.assert_allclose(split, causal(*rows, starts=starts), rtol=0, atol=2e-6)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4)])
def test_the_decode_kernel_is_that_of_one_device(sizes, monkeypatch):
    """On each device for its rows and heads, taken out of the stacks of all layers: here by interpreter."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    rng = np.random.default_rng(0)
    shapes = (
        (4, 2, 3, 8, 8), (4, 2, 3, 4, 8), (4, 2, 3, 4, 8), (2, 4, 4, 8, 5), (2, 4, 4, 5, 8), (2, 4, 2, 4, 8, 9),
        (2, 4, 2, 4, 9, 8),
    )  # fmt: skip
    q, k, v, *stacks = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    lengths, cached = np.array([5, 1, 3, 2], np.int32), rng.integers(0, 6, (4, 2)).astype(np.int32)

    def attended(backend):
        per_layer, attend = decode_attention(backend, stacks[:2], lengths, stacks[2:], cached)
        return jax.lax.scan(lambda _, x: (_, attend(q, k, v, x)), None, per_layer)[1]

    with use_mesh(mesh_of(*sizes)):
        split = jax.jit(lambda: attended("splash"))()
    np.testing.assert_allclose(split, attended("xla"), rtol=0, atol=2e-6)


def sft_batch(batch):
    answers = {"answer": batch.rollout.tokens[:, 0], "answer_length": batch.rollout.lengths[:, 0]}
    return {"prompt": batch.prompts, "prompt_length": batch.prompt_lengths} | answers


def mesh_of(*sizes):
    return make_mesh(dict(zip(AXES, sizes, strict=True)))


def put(tree, shardings, mesh):
    return jax.device_put(tree, None if mesh is None else shardings(tree, mesh))


def start_of(params):
    """The state of `init_state`, made on the host: on each mesh, each of its operations would be compiled anew."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(TX.init, params))
    return TrainState(jax.tree.map(np.copy, params), zeros, None)


def three_steps(mesh, step, arguments, start=STUDENT):
    """State and metrics after three steps from `start`, and the compiled program."""
    state = put(start_of(start), state_shardings, mesh)
    program = step.lower(state, *arguments, LR).compile()
    for _ in range(3):
        state, metrics, *_ = program(state, *arguments, LR)
    return jax.tree.map(np.asarray, (state, metrics)), program.as_text()


@functools.cache
def opd_step(microbatch):
    return make_opd_step(MODELS, TX, Variant(guard="teacher"), vocab=VOCAB, chunk=7, microbatch=microbatch)


def opd(mesh, microbatch=8):
    batch = put(opd_batch(3), batch_shardings, mesh)
    return three_steps(mesh, opd_step(microbatch), (put(FROZEN, state_shardings, mesh), batch, HYPER))


def sft(mesh):
    step = make_sft_step(STUDENT_DEF, TX, VOCAB, chunk=7, microbatch=8)
    return three_steps(mesh, step, (put(sft_batch(opd_batch(3)), batch_shardings, mesh),))


OPTIONS = {"max_tokens": 6, "vocab": VOCAB, "eos": (1,), "pad": 0}


def written(mesh):
    """What the student writes, and the compiled programs: of the first token, and of the others."""
    texts = []

    def ahead(function, static):
        """`function`, compiled for each call, with its argument number `static`; a jit would not give its program."""

        def call(*arguments):
            program = function.lower(*arguments).compile()
            texts.append(program.as_text())
            return program(*arguments[:static], *arguments[static + 1 :])

        return call

    batch = put(opd_batch(3), batch_shardings, mesh)
    models = (STUDENT_DEF,), (put(STUDENT, rollout_shardings, mesh),), jnp.ones((1, N))
    first, others = ahead(decode.first_segment, 5), ahead(decode.segment, 3)
    with mock.patch.multiple(decode, first_segment=first, segment=others):
        rollout = jax.tree.map(np.asarray, generate(*models, *batch[:2], jax.random.key(1), **OPTIONS))
    assert len(texts) == 2
    return rollout, "".join(texts)


@pytest.fixture(scope="module")
def alone():
    """Each program on one device, without a mesh."""
    return opd(None)[0], sft(None)[0], written(None)[0]


def assert_close(ours, theirs, tolerance=2e-5):
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        scale = max(np.abs(b).max(), 1e-3)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


# --- what the compiled programs send ---


def collectives(program, kind):
    """Shapes of the results of every collective of a kind."""
    lines = re.findall(rf"= (\([^)]*\)|\S+) {kind}(?:-start)?\(", program)
    shapes = (re.findall(r"\w+\[([\d,]*)\]", line) for line in lines)
    return [tuple(map(int, s.split(","))) if s else () for found in shapes for s in found]


def check_traffic(program, fsdp, tensor, updates):
    """Weights are gathered a layer at a time, or the table; logits and stacked weights never."""
    gathers, reduces = (collectives(program, kind) for kind in ("all-gather", "all-reduce"))
    table = max(math.prod(p.shape) for p in (TEACHER["embed"], STUDENT["embed"]))  # of all, the largest
    assert max(map(math.prod, gathers), default=0) <= table / tensor
    stacks = {x.shape for model in (STUDENT, TEACHER) for x in jax.tree.leaves(model) if x.shape[0] == LAYERS}
    assert not stacks & set(gathers)
    if tensor > 1:
        assert not [s for s in gathers if max(s, default=0) >= VOCAB]
        assert reduces
    layerwise = [s for s in gathers if len(s) > 2 and s[0] == 1]
    assert bool(layerwise) == (fsdp > 1 and updates)
    if fsdp == tensor == 1:
        assert not gathers
    if updates:
        assert reduces


@pytest.mark.parametrize("sizes", [s for s in ROWS_BY_TENSOR if s != (2, 4, 1)], ids=str)
def test_opd_step_is_that_of_one_device(alone, sizes):
    """On one of the meshes in microbatches, which take rows of every device. (2, 4, 1) is SFT's and the adapter's."""
    mesh = mesh_of(*sizes)
    with use_mesh(mesh):
        (state, metrics), program = opd(mesh, microbatch=2 if sizes == (1, 2, 4) else 8)
    assert_close((state, metrics), alone[0])
    assert np.abs(state.params["embed"][...] - STUDENT["embed"][...]).max() > 1e-3
    check_traffic(program, *sizes[1:], updates=True)


@pytest.mark.parametrize("sizes", ROWS_BY_TENSOR[1::2], ids=str)  # the layers and the head are those of OPD
def test_sft_step_is_that_of_one_device(alone, sizes):
    mesh = mesh_of(*sizes)
    with use_mesh(mesh):
        ours, program = sft(mesh)
    assert_close(ours, alone[1])
    check_traffic(program, *sizes[1:], updates=True)


def test_packed_sft_step_is_that_of_one_device_unpacked(alone):
    """8 lists in 8 rows of two and empty ones: rows are a multiple of the devices."""
    batch = {name: np.asarray(x) for name, x in sft_batch(opd_batch(3)).items()}
    packed = pack(batch, RowShape(2 * (P + T), 2 * T, 8, 8))
    mesh, step = mesh_of(2, 2, 2), make_sft_step(STUDENT_DEF, TX, VOCAB, chunk=7, microbatch=8)
    with use_mesh(mesh):
        ours, _ = three_steps(mesh, step, (global_batch(packed, len(packed["row"])),))
    assert_close(ours, alone[1])


@pytest.mark.parametrize("sizes", [s for s in ROWS_BY_TENSOR if s != (1, 2, 4)], ids=str)
def test_rollout_writes_the_same_tokens(alone, sizes):
    mesh = mesh_of(*sizes)
    with use_mesh(mesh):
        rollout, program = written(mesh)
    np.testing.assert_array_equal(rollout.tokens, alone[2].tokens)
    np.testing.assert_allclose(rollout.logprobs, alone[2].logprobs, atol=1e-5)
    assert len(np.unique(rollout.tokens)) > 10
    check_traffic(program, *sizes[1:], updates=False)
    # Of the logits no part is gathered: at most a number of every row from every device. Nor is any moved, but where a
    # device's part is no whole number of blocks: 12 of 96 rows over 8 devices, in blocks of 8.
    gathers = map(math.prod, collectives(program, "all-gather"))
    assert max(gathers, default=0) <= B * N * sizes[2]
    assert sizes[2] == 8 or not collectives(program, "collective-permute")


def test_drafts_change_no_token_over_devices(alone):
    mesh = mesh_of(2, 2, 2)
    with use_mesh(mesh):
        batch, params = put(opd_batch(3), batch_shardings, mesh), put(STUDENT, rollout_shardings, mesh)
        rollout = generate(
            (STUDENT_DEF,), (params,), jnp.ones((1, N)), *batch[:2], jax.random.key(1), **OPTIONS,
            hint=alone[2].tokens[:, 0], draft_tokens=3,
        )  # fmt: skip
    np.testing.assert_array_equal(rollout.tokens, alone[2].tokens)
    assert np.asarray(rollout.steps).sum() < 0.8 * alone[2].steps.sum()


def test_masks_of_the_host_and_of_a_grammar_let_the_same_through_over_devices():
    """Of tokens 0, 3, 6, … and the end."""
    allowed = (np.arange(VOCAB) % 3 == 0) | (np.arange(VOCAB) == 1)
    bits = np.packbits(np.pad(allowed, (0, -VOCAB % 32)), bitorder="little").view(np.uint32)
    column = jnp.asarray(allowed.astype(np.int32))
    grammar = Grammar(jnp.array([[0, 0], [0, 1]]), column, jnp.zeros((2, 2), bool))
    ways = ({"masks": lambda rows, last: np.tile(bits, (len(rows), 1))}, {"constraint": grammar})

    def wrote(mesh, way):
        batch, params = put(opd_batch(3), batch_shardings, mesh), put(STUDENT, rollout_shardings, mesh)
        models = (STUDENT_DEF,), (params,), jnp.ones((1, N))
        rollout = generate(*models, *batch[:2], jax.random.key(1), **OPTIONS, **way)
        return jax.tree.map(np.asarray, rollout)

    one = wrote(None, ways[0])
    assert allowed[one.tokens].all()
    with use_mesh(mesh := mesh_of(2, 2, 2)):
        for way in ways:
            assert_close(wrote(mesh, way), one)


@pytest.mark.parametrize("sizes", [(2, 4, 1), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_rounded_models_are_those_of_one_device(sizes, dtype):
    """Split like what they were rounded from; 4 devices along the width cut its two groups in two each."""
    graph, exact = decoder(96, 64, 2, seed=3)
    prompts, lengths, rollout = opd_batch(3)[:3]

    def scored(mesh):
        params = cast(put(exact, state_shardings, mesh), dtype)
        score = jax.jit(
            lambda p: completion_logprobs(nnx.merge(graph, p), prompts, lengths, rollout.tokens, VOCAB, 7)
        )
        return params, score(params)[0]

    mesh, alone = mesh_of(*sizes), scored(None)
    with use_mesh(mesh):
        split = scored(mesh)
    for a, b in zip(*map(jax.tree.leaves, (split[0], alone[0])), strict=True):
        np.testing.assert_array_equal(a, b)
    shardings = jax.tree.leaves(state_shardings(split[0], mesh))
    assert all(
        a.sharding.is_equivalent_to(s, a.ndim)
        for a, s in zip(jax.tree.leaves(split[0]), shardings, strict=True)
    )
    np.testing.assert_allclose(split[1], alone[1], atol=1e-4)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 8)], ids=str)
def test_prompts_are_read_in_blocks_where_rows_are_not_split(sizes, monkeypatch):
    monkeypatch.setattr(models_decoder, "BLOCK", P)
    prompts, lengths = opd_batch(3)[:2]

    def read():  # compiled anew each time: the mesh is that of the context
        return jax.jit(lambda params, *batch: nnx.merge(STUDENT_DEF, params).prefill(*batch))

    mesh, expected = mesh_of(*sizes), read()(STUDENT, prompts, lengths)
    arguments = put(STUDENT, rollout_shardings, mesh), *put((prompts, lengths), batch_shardings, mesh)
    with use_mesh(mesh):
        program = read().lower(*arguments).compile()
    assert_close(program(*arguments)[0], expected[0])  # of the cache, copies of heads differ in number
    check_traffic(program.as_text(), *sizes[1:], updates=False)


def test_a_cache_that_grows_writes_the_same_tokens(alone, monkeypatch):
    """Over devices too; rows stay where they are, though half of them end at once."""
    monkeypatch.setattr(decode, "LEAST_CAPACITY", 3)
    mesh, shapes, segment = mesh_of(1, 2, 4), [], decode.segment

    def watch(sampler, prompts, state, least):
        shapes.append((*state.caches[0].k.shape[1:3], state.caches[0].capacity))
        return segment(sampler, prompts, state, least)

    monkeypatch.setattr(decode, "segment", watch)
    budgets = np.where(np.arange(B)[:, None] % 2, 6, 1) * np.ones((1, N), np.int32)
    with use_mesh(mesh):
        batch, params = put(opd_batch(3), batch_shardings, mesh), put(STUDENT, rollout_shardings, mesh)
        rollout = generate(
            (STUDENT_DEF,),
            (params,),
            jnp.ones((1, N)),
            *batch[:2],
            jax.random.key(1),
            budgets=budgets,
            **OPTIONS,
        )
    assert shapes == [(B, N, 3), (B, N, 6)]
    np.testing.assert_array_equal(rollout.lengths, np.minimum(budgets, alone[2].lengths))
    np.testing.assert_array_equal(rollout.tokens[1::2], alone[2].tokens[1::2])


def head_traffic(mesh, chunk):
    """What the gradient of a cross-entropy of 64 rows sends, by mesh axis."""
    hidden, head, tokens, weights = (jnp.ones(s) for s in ((64, 8), (VOCAB, 8), (64,), (64,)))
    rows = tokens.astype(int), weights
    shardings = batch_shardings((hidden, rows), mesh)
    grad = jax.grad(lambda h, w, r: fused_loss(cross_entropy, VOCAB, chunk, h, w, r, None)[0], argnums=(0, 1))
    arguments = *jax.device_put((hidden, rows), shardings), head
    with use_mesh(mesh):
        program = jax.jit(lambda h, r, w: grad(h, w, r)).lower(*arguments).compile()
    return traffic(program.as_text(), dict(mesh.shape))


def test_the_heads_gradient_crosses_devices_once_in_however_many_chunks():
    mesh = mesh_of(4, 2, 1)
    once, in_eight = head_traffic(mesh, 8), head_traffic(mesh, 1)
    assert sum(once.values()) > 4 * VOCAB * 8  # it does cross
    assert in_eight["data+fsdp"] < 1.2 * once["data+fsdp"]


@pytest.mark.parametrize("sizes", [(4, 2, 1), (2, 2, 2), (1, 1, 8)], ids=str)
def test_each_device_streams_its_part_of_a_frozen_head(sizes, monkeypatch):
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    mesh, rng = mesh_of(*sizes), np.random.default_rng(0)
    arrays = rng.normal(size=(16, 8)), rng.normal(size=(96, 8)), rng.integers(VOCAB, size=16)
    arrays = [jnp.asarray(x, jnp.int32 if x.ndim == 1 else jnp.float32) for x in arrays]
    with use_mesh(mesh):
        got = jax.jit(gather_logprobs, static_argnums=3)(*arrays, VOCAB)
    np.testing.assert_allclose(got, token_logprobs(*arrays, VOCAB, 16)[0], atol=1e-5)


# --- adapters ---


def adapted(mesh):
    """Three steps of distillation and of SFT of an adapter on top of the frozen base, and the compiled programs."""
    graph = abstract(STUDENT_CONFIG, lora=LORA)[0]
    trained = jax.tree.map(lambda x: np.full(x.shape, 0.1, x.dtype), abstract_adapter(STUDENT_CONFIG, LORA))
    frozen, batch = put(FROZEN, state_shardings, mesh), put(opd_batch(3), batch_shardings, mesh)
    options = {"vocab": VOCAB, "chunk": 7, "microbatch": 8}
    step = make_opd_step(MODELS._replace(student=graph), TX, Variant(), **options)
    opd_result = three_steps(mesh, step, (frozen, batch, HYPER), trained)
    sft_step = make_sft_step(graph, TX, **options)
    answers = put(sft_batch(opd_batch(3)), batch_shardings, mesh)
    by_position = lambda state, batch, frozen, lr: sft_step(state, batch, lr, frozen)  # noqa: E731
    return opd_result, three_steps(mesh, jax.jit(by_position), (answers, frozen.base), trained)


@pytest.fixture(scope="module")
def adapted_alone():
    return [result for result, _ in adapted(None)]


@pytest.mark.parametrize("sizes", [(2, 4, 1), (1, 2, 4)], ids=str)
def test_steps_of_an_adapter_are_those_of_one_device(sizes, adapted_alone):
    mesh = mesh_of(*sizes)
    with use_mesh(mesh):
        results = adapted(mesh)
    for (ours, _), theirs in zip(results, adapted_alone, strict=True):
        assert_close(ours, theirs)


# --- weights ---

TINY = ModelConfig(96, 16, 32, LAYERS, 8, 2, 4, tied=False)


@pytest.fixture
def reads(monkeypatch):
    """Bytes of each slice that is read of a checkpoint."""
    sizes, read = [], load._read_slice

    def counted(*arguments):
        part = read(*arguments)
        sizes.append(part.nbytes)
        return part

    monkeypatch.setattr(load, "_read_slice", counted)
    return sizes


@pytest.fixture
def checkpoint(tmp_path):
    params = nnx.split(Decoder(TINY, rngs=nnx.Rngs(5)))[1]
    hf.save_hf(tmp_path / "model", TINY, params)
    return tmp_path / "model", params


def test_weights_load_into_their_shards(checkpoint, reads):
    folder, params = checkpoint
    mesh = mesh_of(2, 2, 2)
    with use_mesh(mesh):
        _, loaded = hf.load_hf(folder)
    for (path, ours), theirs in zip(nnx.to_flat_state(loaded), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours[...], theirs)
        assert ours[...].sharding.is_equivalent_to(param_sharding(path, theirs, mesh), theirs.ndim)
    assert sum(reads) == sum(x.nbytes for x in jax.tree.leaves(params))  # copies on `data` are not read twice
    assert max(reads) <= 96 * 16 * 4 / 4  # the largest tensor in quarters


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4)], ids=str)
def test_biases_load_into_their_shards_and_are_added_there(tmp_path, sizes):
    config = dataclasses.replace(TINY, qk_norm=False, qkv_bias=True)
    graph, shapes = abstract(config)
    params = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(1).normal(0, 0.3, x.shape), x.dtype), shapes
    )
    hf.save_hf(tmp_path / "model", config, params)
    tokens, lengths = np.arange(24, dtype=np.int32).reshape(8, 3), np.full(8, 3)
    mesh = mesh_of(*sizes)
    with use_mesh(mesh):
        _, loaded = hf.load_hf(tmp_path / "model")
        split = jax.jit(lambda p: nnx.merge(graph, p)(tokens, lengths))(loaded)
    for ours, theirs in zip(*map(jax.tree.leaves, (loaded, params)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(split, nnx.merge(graph, params)(tokens, lengths), atol=2e-5)


def test_a_host_reads_its_part_only(checkpoint, reads, monkeypatch):
    """What make_array_from_callback asks of a process that holds half of the devices."""
    folder, params = checkpoint
    mesh = mesh_of(1, 2, 4)
    half = set(mesh.devices.flat[:4])

    def of_half(shape, sharding, callback):
        for device, index in sharding.devices_indices_map(shape).items():
            if device in half:
                callback(index)
        return jnp.ones(shape)

    monkeypatch.setattr(jax, "make_array_from_callback", of_half)
    with use_mesh(mesh):
        hf.load_hf(folder)
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    assert total / 2 <= sum(reads) < 0.55 * total  # norms are whole on every device


def test_a_damaged_shard_is_told(checkpoint):
    folder, params = checkpoint
    params["layers"]["gate"][...] = params["layers"]["gate"][...].at[1, 3, 2].set(jnp.nan)
    hf.save_hf(folder, TINY, params)
    with use_mesh(mesh_of(1, 2, 4)), pytest.raises(UserError, match=r"layers\.1\.mlp\.gate_proj.*NaN"):
        hf.load_hf(folder)


def test_random_weights_are_made_in_their_shards():
    model, mesh = defaults().student, mesh_of(1, 4, 2)
    expected = initial_params(model, TINY, 7, "float32")
    with use_mesh(mesh):
        made = initial_params(model, TINY, 7, "float32")
    assert_close(made, expected, 1e-6)
    assert made["layers"]["gate"][...].addressable_shards[0].data.shape == (LAYERS, 16 // 4, 32 // 2)
