"""Frozen models in 8 bits: how far their weights and distributions are from the exact ones, and a run on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from small import small_config, start_from

from listopd_jax.metrics_log import read_metrics
from listopd_jax.models.build import abstract_frozen, cast
from listopd_jax.models.config import PROJECTIONS, ModelConfig
from listopd_jax.models.decoder import Decoder
from listopd_jax.models.hf import load_hf, save_hf
from listopd_jax.models.lora import merge_adapter
from listopd_jax.models.quantized import Quantized, quantize
from listopd_jax.plan.arithmetic import frozen_bytes
from listopd_jax.rollout.decode import generate
from listopd_jax.rollout.scoring import completion_logprobs
from listopd_jax.stages.pipeline import run_stages
from listopd_jax.stages.prepare import job_on_mesh
from listopd_jax.stages.sft import train_sft

SHAPE = ModelConfig(61, 32, 48, 3, 4, 2, 12, tied=False)
PROMPTS, LENGTHS = jnp.arange(12).reshape(2, 6), jnp.array([6, 3])


@pytest.fixture(scope="module")
def model():
    return nnx.split(Decoder(SHAPE, rngs=nnx.Rngs(0)))


@given(seed=st.integers(0, 99), name=st.sampled_from(PROJECTIONS))
def test_a_weight_is_off_by_half_a_step_of_its_channel_at_most(seed, name):
    shape = (2, 4, 3, 5) if name in "qkvo" else (2, 4, 5)
    weight = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    weight[0, ..., 1] = 0  # a channel of zeros stays one
    kept = quantize(("layers", name), nnx.Param(jnp.asarray(weight)))[...]
    step = np.abs(weight).max((1, 2) if name == "o" else 1, keepdims=True) / 127
    assert kept.shape == shape and kept.values.dtype == jnp.int8 and kept.scale.shape == step.shape
    assert (np.abs(kept.astype(jnp.float32) - weight) <= step / 2 + 1e-6).all()


def test_distributions_are_near_the_exact_ones(model):
    graph, params = model
    tokens = jnp.arange(10).reshape(2, 1, 5)

    def logprobs(params):
        return completion_logprobs(nnx.merge(graph, params), PROMPTS, LENGTHS, tokens, 61, 8)[0]

    gap = jnp.abs(jax.jit(logprobs)(params) - jax.jit(logprobs)(cast(params, "int8")))
    assert 0 < gap.max() < 0.03


def test_what_it_writes_is_what_it_scores(model):
    """Decoding and teacher forcing read the same weights."""
    graph, params = model[0], cast(model[1], "int8")
    rollout = generate(
        (graph,),
        (params,),
        jnp.ones((1, 2)),
        PROMPTS,
        LENGTHS,
        jax.random.key(0),
        max_tokens=8,
        vocab=61,
        eos=(),
        pad=0,
    )
    forced = completion_logprobs(nnx.merge(graph, params), PROMPTS, LENGTHS, rollout.tokens, 61, 8)[0]
    np.testing.assert_allclose(rollout.logprobs, forced, atol=1e-4)


def test_only_weights_of_products_are_rounded_and_a_float_leaves_them(model):
    params = cast(model[1], "int8")
    for path, p in nnx.to_flat_state(cast(params, "bfloat16")):
        product = path[0] == "layers" and path[-1] in PROJECTIONS
        assert isinstance(p[...], Quantized) == product
        assert product or p[...].dtype == jnp.bfloat16
    again = cast(params, "int8")
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    dense = merge_adapter(params, params, None)  # no adapter: nothing to merge
    assert dense is params


def test_a_checkpoint_is_rounded_as_it_is_read(model, tmp_path):
    save_hf(tmp_path, SHAPE, model[1])
    read = load_hf(tmp_path, jnp.bfloat16, quantize)[1]
    expected = cast(cast(model[1], "bfloat16"), "int8")
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_planner_counts_their_bytes(dtype):
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_frozen(SHAPE, dtype)))
    scales = 4 * SHAPE.num_layers * (12 * (4 + 2 + 2) + 32 + 48 * 2 + 32) * (dtype == "int8")
    assert whole - scales == pytest.approx(frozen_bytes(SHAPE, dtype), rel=0.02)


def test_a_teacher_that_is_used_as_it_is_is_rounded_at_once(finished_job, tmp_path):
    """Unless it is exported, or its SFT goes on: these are about exact weights."""

    def teacher(fields):
        config = small_config(
            **start_from(finished_job) | {"dtype.frozen": "int8", "train.export": False} | fields
        )
        with job_on_mesh(config, tmp_path / str(len(fields))) as job:
            return nnx.to_flat_state(train_sft(job, "teacher"))

    def rounded(flat):
        return any(isinstance(p[...], Quantized) for _, p in flat)

    assert rounded(teacher({})) and not rounded(teacher({"train.export": True}))


@pytest.mark.slow
def test_a_run_distils_from_rounded_models(tmp_path):
    """The whole student, and an adapter beside its rounded base; samples are scored as they were written."""
    for rank in (0, 2):
        fields = {"dtype.frozen": "int8", "student.lora.rank": rank, "opd.steps": 2, "opd.lambdas": (1.2,)}
        workdir = tmp_path / str(rank)
        run_stages(small_config(**fields), workdir)
        rows = [row for row in read_metrics(workdir) if row["stage"] == "opd"]
        assert len(rows) == 2 and all(np.isfinite(row["loss"]) for row in rows)
        assert all(row["sampler_trainer_gap"] < 1e-3 for row in rows)
        assert rows[0]["log_ratio_variance"] > 0
