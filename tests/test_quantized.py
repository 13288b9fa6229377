"""Frozen models in 8 and 4 bits: how far their weights and distributions are from the exact ones, and a run on them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from small import small_config, start_from

from benchmarks import quantized as measured
from listopd_jax.errors import UserError
from listopd_jax.metrics_log import read_metrics
from listopd_jax.models.build import abstract_frozen, cast, initial_params
from listopd_jax.models.config import PROJECTIONS, ModelConfig
from listopd_jax.models.decoder import Decoder
from listopd_jax.models.hf import load_hf, save_hf
from listopd_jax.models.lora import merge_adapter
from listopd_jax.models.quantized import Quantized, quantize
from listopd_jax.ops.opd_loss import Frozen
from listopd_jax.plan.arithmetic import frozen_bytes
from listopd_jax.records import RESULTS, read_results
from listopd_jax.rollout.decode import generate
from listopd_jax.rollout.scoring import completion_logprobs
from listopd_jax.stages.job import base_of
from listopd_jax.stages.opd import first_batch, opd_runs, train_opd
from listopd_jax.stages.pipeline import distillation, run_stages
from listopd_jax.stages.prepare import job_on_mesh
from listopd_jax.stages.sft import train_sft
from listopd_jax.train.preflight import answer_logprobs, check_rounding

SHAPE = ModelConfig(61, 32, 64, 3, 4, 2, 12, tied=False)
DTYPES = {"int8": (127, None), "int4": (7, 32)}  # the largest number, and inputs that share a scale
PROMPTS, LENGTHS = jnp.arange(12).reshape(2, 6), jnp.array([6, 3])


@pytest.fixture(scope="module")
def model():
    return nnx.split(Decoder(SHAPE, rngs=nnx.Rngs(0)))


def steps_of(weight, axis, dtype):
    """The oracle, in float64: the step of each weight, a share of the largest that has the same."""
    largest, group = DTYPES[dtype]
    sizes = np.abs(weight.astype(np.float64))
    if group is None:
        return np.broadcast_to(sizes.max(tuple(range(1, axis + 1)), keepdims=True) / largest, weight.shape)
    parts = np.split(sizes, range(group, weight.shape[axis], group), axis)
    return np.concatenate([x * 0 + x.max(axis, keepdims=True) for x in parts], axis) / largest


@given(
    seed=st.integers(0, 99),
    name=st.sampled_from(PROJECTIONS),
    dtype=st.sampled_from(list(DTYPES)),
    inputs=st.sampled_from([6, 32, 64]),
)
def test_a_weight_is_off_by_half_a_step_of_what_shares_its_scale(seed, name, dtype, inputs):
    shapes = {"o": (2, 3, inputs, 5)} | dict.fromkeys("qkv", (2, inputs, 3, 5))
    weight = np.random.default_rng(seed).normal(size=shapes.get(name, (2, inputs, 5))).astype(np.float32)
    weight[0, ..., 1] = 0  # a channel of zeros stays one
    kept = quantize(("layers", name), nnx.Param(jnp.asarray(weight)), dtype)[...]
    exact, step = (
        np.asarray(kept.astype(jnp.float32), np.float64),
        steps_of(weight, 2 if name == "o" else 1, dtype),
    )
    assert kept.shape == weight.shape and kept.values.dtype == jnp.int8
    assert kept.values.nbytes == weight.size // (2 if dtype == "int4" else 1)
    assert (np.abs(exact - weight) <= step / 2 + 1e-6).all()
    counts = exact / np.maximum(step, 1e-30)
    np.testing.assert_allclose(counts, np.rint(counts), atol=1e-4)
    assert np.abs(counts).max() < DTYPES[dtype][0] + 0.1


def test_distributions_are_near_the_exact_ones(model):
    graph, params = model
    tokens = jnp.arange(10).reshape(2, 1, 5)

    def logprobs(params):
        return completion_logprobs(nnx.merge(graph, params), PROMPTS, LENGTHS, tokens, 61, 8)[0]

    gap = jnp.abs(jax.jit(logprobs)(params) - jax.jit(logprobs)(cast(params, "int8")))
    assert 0 < gap.max() < 0.03


def test_log_probabilities_of_a_trained_model_are_near_the_exact_ones(finished_job, tmp_path):
    """Of the tokens of right answers, in nats."""
    with job_on_mesh(small_config(**start_from(finished_job)), tmp_path) as job:
        batch, vocab = first_batch(job), job.codec.vocab
        params = initial_params(job.models["teacher"], job.shapes["teacher"], seed=0, dtype="float32")
        kept = {dtype: cast(params, dtype) for dtype in ("float32", *DTYPES)}
        seen = {d: answer_logprobs(job.graphs["teacher"], p, batch, vocab, 64) for d, p in kept.items()}
    gaps = {dtype: np.abs(seen[dtype] - seen["float32"]) for dtype in DTYPES}
    assert 0 < gaps["int8"].mean() < 0.03 and gaps["int8"].max() < 0.15
    assert gaps["int8"].mean() < gaps["int4"].mean() < 0.3 and gaps["int4"].max() < 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_it_writes_is_what_it_scores(model, dtype):
    """Decoding and teacher forcing read the same weights."""
    graph, params = model[0], cast(model[1], dtype)
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_weights_of_products_are_rounded_and_a_float_leaves_them(model, dtype):
    params = cast(model[1], dtype)
    for path, p in nnx.to_flat_state(cast(params, "bfloat16")):
        product = path[0] == "layers" and path[-1] in PROJECTIONS
        assert isinstance(p[...], Quantized) == product
        assert product or p[...].dtype == jnp.bfloat16
    again = cast(params, dtype)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    dense = merge_adapter(params, params, None)  # no adapter: nothing to merge
    assert dense is params


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_is_rounded_as_it_is_read(model, tmp_path, dtype):
    save_hf(tmp_path, SHAPE, model[1])
    read = load_hf(tmp_path, jnp.bfloat16, functools.partial(quantize, dtype=dtype))[1]
    expected = cast(cast(model[1], "bfloat16"), dtype)
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_the_planner_counts_their_bytes(dtype):
    shape = ModelConfig(61, 64, 96, 3, 4, 2, 32, tied=False)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_frozen(shape, dtype)))
    # A scale per channel it neglects, one for 32 weights not.
    scales = 4 * shape.num_layers * (32 * (4 + 2 + 2) + 64 + 96 * 2 + 64) * (dtype == "int8")
    assert whole - scales == pytest.approx(frozen_bytes(shape, dtype), rel=0.02)
    weights = shape.num_layers * 64 * (32 * 12 + 96 * 3)
    assert dtype != "int4" or frozen_bytes(shape, dtype) == pytest.approx(
        weights * (1 / 2 + 4 / 32) + 2 * 2 * 61 * 64, rel=0.02
    )


def test_inputs_that_groups_do_not_divide_are_named():
    config, even = small_config(**{"dtype.frozen": "int4"}), ModelConfig(61, 64, 96, 3, 4, 2, 16)
    check_rounding(config, {"teacher": even})
    odd = dataclasses.replace(even, intermediate_size=80)
    with pytest.raises(UserError) as e:
        check_rounding(config, {"student": even, "teacher": odd})
    assert str(e.value).startswith(
        "dtype.frozen=int4: intermediate_size=80 of the teacher must be a multiple of 32"
    )
    assert str(e.value).endswith("set dtype.frozen=int8") and "\n" not in str(e.value)
    check_rounding(small_config(**{"dtype.frozen": "int8"}), {"teacher": odd})


@pytest.mark.parametrize("name", ["int3", "int", "Int4"])
def test_an_unknown_dtype_is_one_line(name):
    with pytest.raises(UserError, match=rf"dtype.frozen={name!r} is unknown.*int4"):
        small_config(**{"dtype.frozen": name})


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


def test_the_measurement_is_of_tokens_and_needs_something_to_read():
    exact, near = np.array([-1.0, -2.0, -3.0, -4.0]), np.array([-1.5, -2.0, -2.9, -4.0])
    found = measured.error(near, exact)
    assert found["mean"] == pytest.approx(0.15) and found["max"] == pytest.approx(0.5)
    assert found["nll_change"] == pytest.approx(0.1)
    with pytest.raises(UserError, match="--weights: needs --reviews"):
        measured.parse(["--weights=FOLDER"])


def rounded_run(job, **fields):
    """The config of a short run on rounded models that `job` trained."""
    fields = {"opd.steps": 2, "opd.lambdas": (1.2,)} | fields
    return small_config(**start_from(job) | fields)


def check_steps(workdir):
    """Both steps learnt something, and samples are scored as they were written."""
    rows = [row for row in read_metrics(workdir) if row["stage"] == "opd"]
    assert len(rows) == 2 and all(np.isfinite(row["loss"]) for row in rows)
    assert all(row["sampler_trainer_gap"] < 1e-3 for row in rows)
    assert rows[0]["log_ratio_variance"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "dtype"), [(0, "int4"), (2, "int8")])
def test_a_student_distils_from_rounded_models(rank, dtype, finished_job, tmp_path):
    """The whole student, and an adapter on top of its rounded base."""
    config = rounded_run(finished_job, **{"dtype.frozen": dtype, "student.lora.rank": rank})
    with job_on_mesh(config, tmp_path) as job:
        models = {role: cast(train_sft(job, role), dtype) for role in job.models}
        shared = distillation(job, Frozen(models["teacher"], base_of(models)), None)
        train_opd(job, shared, opd_runs(job, 1.2, seed=0)[-1])
    check_steps(tmp_path)


@pytest.mark.slow
def test_a_whole_run_on_rounded_models_has_every_record(finished_job, tmp_path):
    """Evaluated, calibrated, forecast and, by an adapter, distilled."""
    run_stages(rounded_run(finished_job, **{"dtype.frozen": "int4", "student.lora.rank": 2}), tmp_path)
    check_steps(tmp_path)
    stages = [record.stage for record in read_results(tmp_path / RESULTS)]
    assert stages.count("forecast") == 2 and {"sft_teacher", "sft_student", "opd"} < set(stages)
