"""The planner's GPU: kernels read from HLO against counts by hand; programs compiled for an H100 that is not there."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from benchmarks.presets import paper
from listopd_jax.config import defaults, validate
from listopd_jax.errors import UserError
from listopd_jax.parallel.compiler import MEMORY_FRACTION
from listopd_jax.parallel.mesh import make_mesh
from listopd_jax.plan import compile as aot
from listopd_jax.plan import gpu, modelled
from listopd_jax.plan import search as planner
from listopd_jax.plan.arithmetic import Load
from listopd_jax.plan.chips import CHIPS, RATES, Rates, parse_topology
from listopd_jax.plan.kernels import kernels
from listopd_jax.rollout.decode import cache_sizes

needs_plugin = pytest.mark.skipif(not gpu.can_compile(), reason=f"needs XLA's compiler for GPUs: {gpu.EXTRA}")
H100 = parse_topology("h100:1")

CALL = """custom_call_target="__cublas$gemm", metadata={op_name="jit(f)/x/dot"}, """
CALL += """backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}"""
HLO = """HloModule m

%slice (p0: f32[4,8,16], p1: s32[]) -> f32[1,8,16] {
  %p0 = f32[4,8,16]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %take = f32[1,8,16]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,16}
}

%product (q0: bf16[4,16,32], q1: bf16[8,16], q2: s32[]) -> (bf16[8,32], s8[1024]) {
  %q0 = bf16[4,16,32]{2,1,0} parameter(0)
  %q2 = s32[] parameter(2)
  %none = s32[] constant(0)
  %layer = bf16[1,16,32]{2,1,0} dynamic-slice(%q0, %q2, %none, %none), dynamic_slice_sizes={1,16,32}
  %weight = bf16[16,32]{1,0} bitcast(%layer)
  %q1 = bf16[8,16]{1,0} parameter(1)
  ROOT %call = (bf16[8,32]{1,0}, s8[1024]{0}) custom-call(%q1, %weight), CALL
}

%write (r0: f32[4,8], r1: f32[1,8], r2: s32[]) -> f32[4,8] {
  %r0 = f32[4,8]{1,0} parameter(0)
  %r1 = f32[1,8]{1,0} parameter(1)
  %r2 = s32[] parameter(2)
  %start = s32[] constant(0)
  %twice = f32[1,8]{1,0} add(%r1, %r1)
  ROOT %put = f32[4,8]{1,0} dynamic-update-slice(%r0, %twice, %r2, %start)
}

%layers (a: (s32[])) -> (s32[]) {
  %a = (s32[], f32[4,8,16]{2,1,0}, bf16[4,16,32]{2,1,0}, bf16[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%a), index=0
  %stack = f32[4,8,16]{2,1,0} get-tuple-element(%a), index=1
  %weights = bf16[4,16,32]{2,1,0} get-tuple-element(%a), index=2
  %x = bf16[8,16]{1,0} get-tuple-element(%a), index=3
  %fetched = f32[1,8,16]{2,1,0} fusion(%stack, %i), kind=kLoop, calls=%slice
  ROOT %gemm = (bf16[8,32]{1,0}, s8[1024]{0}) fusion(%weights, %x, %i), kind=kCustom, calls=%product
}

%going (b: (s32[])) -> pred[] {
  %b = (s32[]) parameter(0)
  ROOT %lt = pred[] constant(true)
}

%tokens (c: (s32[])) -> (s32[]) {
  %c = (s32[]) parameter(0)
  %loop = (s32[]) while(%c), condition=%going, body=%layers, backend_config={"known_trip_count":{"n":"4"}}
  %cache = f32[4,8]{1,0} get-tuple-element(%c), index=1
  %new = f32[1,8]{1,0} get-tuple-element(%c), index=2
  %at = s32[] get-tuple-element(%c), index=0
  ROOT %written = f32[4,8]{1,0} fusion(%cache, %new, %at), kind=kLoop, calls=%write
}

ENTRY %main (d: (s32[])) -> (s32[]) {
  %d = (s32[]) parameter(0)
  ROOT %decode = (s32[]) while(%d), condition=%going, body=%tokens
}
""".replace("CALL", CALL)


def test_kernels_count_slices_updates_and_loops():
    """By hand, for 10 tokens of 4 layers: a copied slice of 8x16 floats, a product with a weight read in place."""
    found = {k.name: k for k in kernels(HLO, turns=10)}
    assert found.keys() == {"fetched", "gemm", "written"}
    assert found["fetched"][1:] == ("copy", "", 40, 0, 4 + 512, 512)
    product = (
        "product",
        "jit(f)/x/dot",
        40,
        2 * 8 * 32 * 16,
        4 + 2 * 16 * 32 + 2 * 8 * 16,
        2 * 8 * 32,
    )
    assert found["gemm"][1:] == product
    assert found["written"][1:] == ("other", "", 10, 0, 4 + 32, 32)


def test_a_kernel_takes_the_slower_of_its_two_resources_and_its_launch():
    rates = Rates(product=1e6, attention=1.0, bandwidth=1e9, launch=1e-3, link=1.0)
    kernel = next(k for k in kernels(HLO, turns=10) if k.kind == "product")
    assert kernel.seconds(rates) == pytest.approx(40 * (1e-3 + 8192 / 1e6))
    assert kernel.seconds(rates._replace(product=1e12)) == pytest.approx(40 * (1e-3 + 1796 / 1e9))


def test_a_job_takes_its_share_of_the_card():
    assert CHIPS["h100"].hbm_gib == pytest.approx(float(MEMORY_FRACTION) * 79.18, rel=1e-3)


@pytest.mark.parametrize(
    ("response", "turns"),
    [(225, [(128, 128), (256, 96)]), (512, [(128, 128), (256, 128), (384, 128), (512, 127)]), (1, [])],
)
def test_every_token_but_the_first_is_decoded_in_one_segment(response, turns):
    config = defaults()
    assert modelled.turns_of(config, Load(8, 1, 100, response)) == turns
    assert sum(count for _, count in turns) == response - 1


def test_without_the_compiler_there_is_an_estimate_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(gpu, "can_compile", lambda: False)
    config = validate(defaults())
    plan = planner.make_plan(config, H100, Load(8, 1, 100, 50), compile_it=True)
    assert plan["bytes_compiled"] is None and gpu.EXTRA in plan["memory_source"]
    assert "\n" not in plan["memory_source"]
    with pytest.raises(UserError, match="plan-gpu"):
        planner.model(config, H100, Load(8, 1, 100, 50), top=1)
    with pytest.raises(UserError, match="--kernels"):
        planner.model(config, parse_topology("v5p:2x2x1"), Load(8, 1, 100, 50), top=1)


TINY = (
    "--config=configs/fashion.py:tiny", "--json", "--kernels=3", "--config.task.max_prompt=64",
    "--config.task.max_response=16", "--config.opd.batch_size=16", "--tokens=50,9", "--config.dtype.compute=bfloat16",
)  # fmt: skip


@needs_plugin
@pytest.mark.parametrize(
    ("topology", "mesh"),
    [("h100:1", {}), ("h100:8", {"data": 2, "fsdp": 2, "tensor": 2}), ("h100:16", {"data": 16})],
)
def test_the_command_compiles_for_gpus_that_are_not_there(topology, mesh):
    sizes = [f"--config.parallel.{axis}={size}" for axis, size in mesh.items()]
    argv = [sys.executable, "-m", "listopd_jax.plan", *TINY, f"--topology={topology}", *sizes]
    env = {
        k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    }
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600, env=env)
    plan = json.loads(done.stdout)
    assert done.returncode == 0 and plan["memory_source"] == "compiled for NVIDIA H100 80GB HBM3", done.stderr
    assert plan["attention"] == "cudnn" and plan["modelled"]["widths"] == [64, 12]
    for phase in ("prefill", "decode", "update"):
        row = plan["modelled"][phase]
        assert row["seconds"] == pytest.approx(sum(row["seconds_by_kind"].values()))
        assert len(row["top"]) == 3 and row["memory_gib"]["temporaries"] > 0
    assert (plan["modelled"]["update"]["seconds_by_kind"].get("collective", 0) > 0) == bool(mesh)


@pytest.fixture
def optimised():
    """Programs as a user gets them: the suite's own are compiled quickly (conftest.py)."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@needs_plugin
@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax 0.10 has no working dynamic-slice fusion: it copies"
)
def test_decoding_copies_nothing_out_of_its_stacks(monkeypatch, optimised):
    """Of the bytes that a step of EC's student moves, under 2 % are copies; with XLA's defaults most of them are."""
    config = paper()
    config.task.update(max_prompt=704, max_response=256)
    mesh = make_mesh(planner.layout_of(config, H100).sizes, aot.devices_of(H100))

    def copied(drafts: int) -> float:
        """Share of a step's bytes."""
        config.rollout.draft_tokens = drafts
        shapes, vocab, sizes = planner.shapes_of(config), planner.vocabulary(config), cache_sizes(256, drafts)
        _, (first,) = aot.rollout_programs(validate(config), shapes, vocab, mesh, sizes[:1])
        sizes = [(k.kind, k.runs * (k.read + k.written)) for k in kernels(first.text)]
        return sum(size for kind, size in sizes if kind == "copy") / sum(size for _, size in sizes)

    assert copied(0) < 0.02 and copied(8) < 0.02
    monkeypatch.setattr(aot, "ROLLOUT", {})
    assert copied(0) > 0.5


@needs_plugin
def test_the_update_computes_no_attention_twice():
    """What cuDNN leaves for its backward pass is stored where `remat` says so, and recomputed where it does not."""
    config = paper()
    config.task.update(max_prompt=64, max_response=64)
    mesh = make_mesh(planner.layout_of(config, H100).sizes, aot.devices_of(H100))

    def recomputed(remat: str) -> bool:
        config.remat = remat
        update = aot.compile_update(
            validate(config), planner.shapes_of(config), planner.vocabulary(config), mesh
        )
        return "rematted_computation/dot_product_attention_fwd" in update.text

    assert recomputed("full") and not recomputed("attention") and not recomputed("dots")


@needs_plugin
def test_the_model_is_near_the_measured_step(optimised):
    """Of benchmarks/results, within 10 %: the rates were fitted to that card, the kernels were not.

    Decoding is that of h100_plain.json: the model counts no draft as confirmed.
    """
    results = pathlib.Path(__file__).parents[1] / "benchmarks/results"
    measured, plain = (json.loads((results / f"{name}.json").read_text()) for name in ("h100", "h100_plain"))
    config = paper()
    config.opd.microbatch, config.remat = measured["microbatch"], measured["remat"]
    load = Load(**measured["load"])
    found = planner.model(validate(config), H100, load, top=0)
    for phase, of in {"prefill": measured, "decode": plain, "update": measured}.items():
        assert found[phase]["seconds"] == pytest.approx(of[f"{phase}_s"], rel=0.1), phase
    memory = found["update"]["memory_gib"]
    assert sum(memory.values()) == pytest.approx(measured["peak_gib"], rel=0.05)
    assert RATES.keys() == {"h100"}


@needs_plugin
def test_the_papers_job_fits_one_card_at_every_stage(optimised):
    plan = planner.make_plan(validate(paper()), H100, Load(128, 1, 700, 225), compile_it=True)
    assert plan["fits"] and max(plan["peaks_gib"].values()) <= 72
