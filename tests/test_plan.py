"""The planner's arithmetic, its reading of compiled programs and its command, none of which compiles for a TPU."""

import dataclasses
import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs import fashion
from listopd_jax.config import REMATS, defaults, validate
from listopd_jax.errors import UserError
from listopd_jax.models.config import Lora, ModelConfig, lora_params, named_config, num_params
from listopd_jax.models.decoder import abstract
from listopd_jax.plan import arithmetic
from listopd_jax.plan import compile as aot
from listopd_jax.plan import search as planner
from listopd_jax.plan.arithmetic import Layout, Load
from listopd_jax.plan.chips import GIB, SLICES, parse_topology
from listopd_jax.plan.kernels import kernels
from listopd_jax.plan.search import make_plan, search, shape_of, vocabulary
from listopd_jax.plan.traffic import traffic

STUDENT, TEACHER = named_config("qwen3_1_7b"), named_config("qwen3_4b")
EC = Load(prompts=128, rollouts=1, prompt=700, response=225)
ONE = {"data": 1, "fsdp": 1, "tensor": 1}
SMALL = ModelConfig(
    vocab_size=512, hidden_size=128, intermediate_size=384, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=32
)  # fmt: skip


def big(**fields):
    """A config of the 1.7B student and 4B teacher with EC's batch."""
    config = defaults()
    config.student.architecture, config.teacher.architecture = "qwen3_1_7b", "qwen3_4b"
    config.dtype.update(compute="bfloat16", frozen="bfloat16")
    config.remat = "full"
    config.opd.microbatch = config.sft.teacher.microbatch = config.sft.student.microbatch = 8
    config.update_from_flattened_dict(fields)
    return validate(config)


def test_a_step_of_ec_is_the_published_floor():
    """The specification's arithmetic for 1.7B x 4B, which rounds N up: about 3.3e15 FLOP."""
    flops = arithmetic.step_flops(STUDENT, TEACHER, EC, "full")
    assert sum(flops.values()) == pytest.approx(3.3e15, rel=0.1)
    assert flops["teacher"] == pytest.approx(0.95e15, rel=0.1)
    assert flops["base"] == pytest.approx(0.4e15, rel=0.12)
    assert flops["student"] == pytest.approx(1.2e15, rel=0.12)
    assert flops["recomputed"] < flops["student"] / 3  # the fused head is not computed twice
    assert arithmetic.kv_bytes(STUDENT) == 112 * 1024


def test_decoding_moves_what_its_steps_read():
    """Counted step by step, from the arrays that a step meets: weights, prompts' cache, completions' cache so far."""
    load = Load(prompts=6, rollouts=4, prompt=50, response=20)
    params = abstract(SMALL, param_dtype=jnp.bfloat16)[1]
    weights = sum(x.nbytes for x in map(_array, jax.tree.leaves(params)) if x.size > 1000)
    token = SMALL.num_layers * 2 * SMALL.num_kv_heads * SMALL.head_dim * 2
    steps = [weights + token * load.prompts * (load.prompt + load.rollouts * (t + 0.5)) for t in range(20)]
    assert arithmetic.decode_bytes(SMALL, load) == pytest.approx(sum(steps), rel=1e-9)


def _array(x):
    return jnp.zeros(x.shape, x.dtype)


def test_decoding_on_one_h100_is_bound_by_memory_and_takes_a_second():
    phases = arithmetic.costs(STUDENT, TEACHER, EC, Layout(ONE, 8, "full"))
    floor = arithmetic.roofline(phases, parse_topology("h100:1"), ONE)
    decode = floor["phases"]["decode"]
    assert decode["bound_by"] == "hbm" and decode["seconds"] == pytest.approx(1.1, rel=0.1)
    assert floor["phases"]["update"]["bound_by"] == "flops"
    assert floor["step_s"] == pytest.approx(sum(row["seconds"] for row in floor["phases"].values()))


def test_flops_of_a_prompt_agree_with_xla():
    """XLA's count is right for one layer (a scan's body is counted once); it computes attention without causality."""
    load, dims = Load(4, 1, 256, 1), dataclasses.replace(SMALL, qk_norm=False)
    graph, params = abstract(dims)
    tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32)
    lengths = jax.ShapeDtypeStruct((4,), jnp.int32)
    run = jax.jit(lambda p, t, n: nnx.merge(graph, p).prefill(t, n))
    counted = run.lower(params, tokens, lengths).compile().cost_analysis()["flops"]
    square = arithmetic.attention_flops(dims, 4 * 256 * 256) - arithmetic.attention_flops(
        dims, 4 * 256 * 257 / 2
    )
    assert counted == pytest.approx(arithmetic.prompt_flops(dims, load) + square, rel=0.1)


@pytest.mark.parametrize("name", ["qwen3_1_7b", "qwen3_32b", "llama3_2_1b"])
def test_layer_weights_are_those_of_the_model(name):
    c = named_config(name)
    layers = abstract(c)[1]["layers"]
    matrices = sum(x.size for x in jax.tree.leaves(layers) if x.ndim > 2)
    assert arithmetic.layer_weights(c) == matrices


def test_less_stored_is_more_computed():
    full, attention, dots, none = (arithmetic.recomputed_flops(STUDENT, EC, remat) for remat in REMATS)
    once = arithmetic.forward_flops(STUDENT, EC) - arithmetic.head_flops(STUDENT, EC)
    assert full == once > attention > dots == none > 0
    assert full - attention == pytest.approx(dots)  # the mixture of values has the FLOPs of the scores


def test_a_policy_that_amounts_to_another_is_not_searched():
    """Fused attention has no result to store: on a TPU 'attention' is 'full', on a CPU it is not."""
    config = defaults()
    config.remat = "attention"
    for topology, remat in (("v5e:2x4", "full"), ("cpu:1", "attention")):
        topology = parse_topology(topology)
        assert planner.layout_of(config, topology).remat == remat
        assert ("attention" in {c.remat for c in planner.candidates(config, topology)}) == (
            remat == "attention"
        )


def test_devices_share_the_work_and_split_weights_shrink():
    def cost(sizes):
        return arithmetic.costs(STUDENT, TEACHER, EC, Layout(ONE | sizes, 8, "full"))

    whole, split = cost({}), cost({"fsdp": 4, "tensor": 2})
    for phase in whole:
        assert split[phase].flops == pytest.approx(whole[phase].flops / 8)
    assert not any(whole["update"].arriving.values())
    assert split["update"].arriving["fsdp"] > 0 and split["update"].arriving["tensor"] > 0
    assert split["decode"].arriving["fsdp"] == 0  # gathered once, before decoding
    assert split["decode"].arriving["tensor"] > 0


def test_layers_that_are_computed_again_send_their_activations_again():
    """What a layer leaves to store is not the sum over the tensor axis, unless its products are stored."""

    def sent(remat):
        layout = Layout(ONE | {"tensor": 8}, 8, remat)
        return arithmetic.costs(STUDENT, TEACHER, EC, layout)["update"].arriving["tensor"]

    full, attention, dots, none = map(sent, REMATS)
    assert full == attention == 1.5 * dots == 1.5 * none > 0


def test_kv_heads_are_copied_when_tensor_has_more():
    assert arithmetic.kv_bytes(STUDENT, 8) == arithmetic.kv_bytes(STUDENT) / 8
    assert arithmetic.kv_bytes(STUDENT, 16) == arithmetic.kv_bytes(STUDENT, 8)


def test_estimated_weights_are_bytes_a_parameter():
    memory = arithmetic.memory_estimate(STUDENT, TEACHER, EC, Layout(ONE | {"fsdp": 8}, 8, "full"))
    assert memory["parameters"] + memory["optimizer"] == 12 * num_params(STUDENT) / 8
    assert memory["teacher"] == 2 * num_params(TEACHER) / 8


def test_an_adapter_leaves_two_models_and_its_own_state():
    """The base's arrays are the student's too, and those that write."""
    config = big(**{"student.lora.rank": 16, "student.lora.targets": "q_proj,v_proj"})
    layout = planner.layout_of(config, parse_topology("h100:1"))
    own = 28 * 16 * (2048 + 2048 + 2048 + 1024)
    assert layout.trained(STUDENT) == own == lora_params(STUDENT, Lora(16, 1.0, ("q", "v")))
    memory = arithmetic.memory_estimate(STUDENT, TEACHER, EC, layout)
    persistent = [memory[kind] for kind in ("parameters", "optimizer", "teacher", "base", "rollout copy")]
    assert persistent == [4 * own, 8 * own, 2 * num_params(TEACHER), 2 * num_params(STUDENT), 2 * own]
    flops = arithmetic.step_flops(STUDENT, TEACHER, EC, "full", adapted=True)
    assert flops["student"] == 2 * flops["base"]
    split = layout._replace(sizes=ONE | {"fsdp": 8})
    copy = arithmetic.memory_estimate(STUDENT, TEACHER, EC, split)["rollout copy"]
    assert copy == 2 * num_params(STUDENT), "gathered over fsdp it is a copy"


def test_the_cache_has_room_for_the_drafts_of_the_config():
    """As many tokens more for every completion as are drafted at most."""

    def cache(drafts):
        config = fashion.get_config("paper")
        config.rollout.draft_tokens = drafts
        layout = planner.layout_of(config, parse_topology("cpu:1"))
        return arithmetic.memory_estimate(STUDENT, TEACHER, EC, layout)["kv cache"]

    assert cache(8) - cache(0) == EC.prompts * EC.rollouts * 8 * arithmetic.kv_bytes(STUDENT)
    assert cache(-1) == cache(8)


@pytest.mark.parametrize(
    "name", ["v5e", "v5p:3x3x3", "v9:2x2", "h100:12", "h100:", "cpu:0", "cpu:x", "cpu:²", ""]
)
def test_unknown_topologies_are_refused_with_the_known(name):
    with pytest.raises(UserError) as error:
        parse_topology(name)
    assert "--topology" in str(error.value) and "\n" not in str(error.value)


def test_slices_have_their_devices():
    assert parse_topology("v5p:4x8x8").devices == parse_topology("v5e:16x16").devices == 256
    assert all(parse_topology(f"{kind}:{s}").devices >= 1 for kind, shapes in SLICES.items() for s in shapes)


def test_wide_groups_use_more_torus_axes_and_gpu_nodes_end_at_eight():
    v5e, h100 = parse_topology("v5e:16x16"), parse_topology("h100:16")
    assert v5e.arriving(16, 1) == 100e9 and v5e.arriving(256, 1) == 200e9
    assert h100.arriving(8, 1) == 450e9 and h100.arriving(16, 1) == h100.arriving(2, 8) == 50e9


HLO = """HloModule m

%cond (p: (s32[])) -> pred[] {
  %c = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%body (p: (s32[])) -> (s32[]) {
  %ag = f32[8,16]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %w = (s32[]) while(%t), condition=%cond, body=%body
  %ar = (f32[10], bf16[10]) all-reduce(%a, %b), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  %rs = f32[4]{0} reduce-scatter(%d), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %m = f32[8]{0} all-gather(%e), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
  %cp = (f32[6], f32[6], u32[], u32[]) collective-permute-start(%f), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
}
"""


def test_traffic_counts_loops_groups_and_rings():
    """By hand, in fours: 5 gathers of 512 B, one of 32 B, 24 B permuted; in twos: 60 B reduced, 16 B scattered."""
    moved = traffic(HLO, {"data": 2, "fsdp": 4, "tensor": 1})
    assert moved == {"fsdp": 5 * 512 * 3 / 4 + 32 * 3 / 4 + 24, "data": 2 * 60 / 2 + 16}


STARTED = """HloModule m, is_scheduled=true, num_partitions=8

ENTRY %main (a: f32[64,8], b: f32[16]) -> f32[8,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %b = f32[16]{0} parameter(1)
  %rs = ((f32[64,8]{1,0}), f32[8,8]{1,0}) reduce-scatter-start(%a), replica_groups=[1,8]<=[8], to_apply=%add
  %ag = ((f32[64,8], f32[16]), (f32[512,8], f32[128])) all-gather-start(%a, %b), replica_groups=[1,8]<=[8]
  %ar = (f32[64,8], f32[16]) all-reduce-start(%a, %b), replica_groups=[1,8]<=[8], to_apply=%add
}
"""


def test_of_a_collective_that_is_started_the_results_arrive():
    """Operands stand before them in its shape. By hand: 7 x 256 B scattered; 7/8 of 16,896 B; 2 x 7/8 of 2,112 B."""
    expected = [7 * 256, 7 / 8 * (16384 + 512), 2 * 7 / 8 * (2048 + 64)]
    assert traffic(STARTED, {"data": 1, "fsdp": 8, "tensor": 1}) == {"fsdp": sum(expected)}
    assert [k.written for k in kernels(STARTED) if k.kind == "collective"] == expected


def test_one_device_has_no_traffic():
    text = (
        "ENTRY %main () -> f32[2] {\n  %ar = f32[2] all-reduce(%a), replica_groups={{0}}, to_apply=%add\n}\n"
    )
    assert traffic(text, ONE) == {}


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ("Qwen/Qwen3-1.7B", "qwen3_1_7b"),
        ("Qwen/Qwen3-32B", "qwen3_32b"),
        ("meta-llama/Llama-3.2-1B-Instruct", "llama3_2_1b"),
    ],
)  # fmt: skip
def test_hub_ids_have_shapes_without_their_files(weights, name):
    config = defaults()
    config.student.weights = weights
    assert shape_of(config.student, 0) == named_config(name)


def test_unknown_hub_ids_are_refused():
    config = defaults()
    config.student.weights = config.tokenizer.path = "nobody/none-7B"
    with pytest.raises(UserError, match="none-7B"):
        shape_of(config.student, 0)
    with pytest.raises(UserError, match=r"tokenizer\.path"):
        vocabulary(config)


def test_an_estimate_says_so_and_too_little_memory_does_not_fit():
    plan = make_plan(big(attention="xla"), parse_topology("h100:1"), EC, compile_it=False)
    assert plan["memory_source"].startswith("estimate") and plan["bytes_compiled"] is None
    assert not plan["fits"] and plan["peak_gib"] > plan["hbm_gib"]
    assert make_plan(big(**{"parallel.fsdp": 8, "parallel.data": 1}), parse_topology("h100:8"), EC, False)[
        "fits"
    ]


def test_a_plan_has_the_attention_of_its_devices():
    """Not of the host it runs on; and a kernel that stores no scores needs less memory."""
    plans = {
        name: make_plan(big(), parse_topology(name), EC, False) for name in ("v5p:2x2x1", "h100:1", "cpu:4")
    }
    assert {plan["attention"] for plan in plans.values()} == {"splash", "cudnn", "xla"}
    plain = make_plan(big(attention="xla"), parse_topology("h100:1"), EC, False)
    assert plans["h100:1"]["peak_gib"] < plain["peak_gib"]
    with pytest.raises(UserError, match="needs a TPU, not a gpu"):
        make_plan(big(attention="splash"), parse_topology("h100:1"), EC, False)


def test_the_search_is_no_slower_than_any_layout_that_fits():
    config, topology = big(), parse_topology("v5p:2x2x1")
    best = search(config, topology, EC, compiles=0)
    assert best["fits"] and best["tried"]["by_arithmetic"] > 20
    for fsdp, tensor in ((4, 1), (2, 2), (1, 4)):
        sizes = {"parallel.data": 1, "parallel.fsdp": fsdp, "parallel.tensor": tensor}
        other = make_plan(big(**sizes), topology, EC, False)
        assert best["step_s_floor"] <= other["step_s_floor"] * 1.01


def test_the_search_learns_from_a_compiler_that_needs_more(monkeypatch):
    """A compiler that needs four times the estimated working memory: the second layout it is given fits."""

    def compiled(config, topology, load, compile_it):
        plan = make_plan(config, topology, load, False)
        if compile_it:
            persistent = sum(plan["memory_gib"][k] for k in ("parameters", "optimizer", "teacher", "base"))
            peak = persistent + 4 * (plan["peak_gib"] - persistent)
            plan |= {"peak_gib": peak, "fits": peak <= plan["hbm_gib"], "bytes_compiled": {}}
        return plan

    monkeypatch.setattr(planner, "make_plan", compiled)
    monkeypatch.setattr(planner, "with_largest_sft", lambda config, _: config)
    best = search(big(), parse_topology("v5e:4x4"), EC, compiles=3)
    first, second = best["tried"]["compiled"]
    assert not first["fits"] and second["fits"] and best["fits"]
    assert second["step_s_floor"] >= first["step_s_floor"]


@pytest.mark.parametrize(("teacher_gib", "chosen"), [(10, (16, 4)), (60, (16, 1))])
def test_the_microbatch_of_each_sft_is_the_largest_that_fits(monkeypatch, teacher_gib, chosen):
    """A compiler for which a list takes 4 GiB in the teacher's SFT and 10 in the student's, on top of the teacher."""
    taken = {"teacher": 4, "student": 10}

    def compile_sft(config, shapes, vocab, mesh, role):
        needed = config.sft[role].microbatch * taken[role] * GIB
        if needed > 100 * GIB:
            raise aot.TooLarge(role, needed)
        return types.SimpleNamespace(peak=needed)

    monkeypatch.setattr(aot, "devices_of", lambda topology: jax.devices())
    monkeypatch.setattr(aot, "state_memory", lambda *_: {"teacher": teacher_gib * GIB})
    monkeypatch.setattr(aot, "compile_sft", compile_sft)
    config = big(**{"sft.teacher.batch_size": 32, "opd.microbatch": 64})
    found = planner.with_largest_sft(config, parse_topology("h100:1"))
    assert (found.sft.teacher.microbatch, found.sft.student.microbatch) == chosen
    assert found.opd.to_dict() == config.opd.to_dict()
    monkeypatch.setattr(aot, "devices_of", lambda topology: None)
    assert planner.with_largest_sft(config, parse_topology("h100:1")) == config


def command(*flags, timeout=300):
    """The planner's command in a process of its own."""
    argv = [sys.executable, "-m", "listopd_jax.plan", *flags]
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    return subprocess.run(argv, capture_output=True, text=True, timeout=timeout, env=env)


@pytest.mark.slow
def test_the_command_answers_scripts_and_exits_1_when_it_does_not_fit():
    flags = ("--config=configs/fashion.py:paper", "--topology=h100:1", "--compiles=0", "--json")
    flags += ("--config.attention=xla",)
    done = command(*flags)
    plan = json.loads(done.stdout)
    assert done.returncode == 1 and plan["fits"] is False
    assert {
        "hbm_gib",
        "peak_gib",
        "step_s_floor",
        "flops",
        "bytes",
        "mesh",
        "microbatch",
        "remat",
        "attention",
        "bound_by",
    } <= set(plan)
    assert plan["flops"] == pytest.approx(3.3e15, rel=0.1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--topology=v5q:2x2x2",), "v5p:2x2x2"),
        (("--topology=h100:8", "--tokens=many"), "--tokens"),
        (("--topology=h100:1", "--tokens=700,1", "--kernels=3"), "--tokens"),
        (("--topology=h100:8", "--serach"), "search"),
        (("--topology=h100:8", "--config.parallel.fsdp=3", "--config.parallel.data=1"), "parallel"),
        ((), "--topology"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(flags, said):
    done = command("--config=configs/fashion.py:paper", "--compiles=0", *flags)
    assert done.returncode == 2 and said in done.stderr
    assert done.stderr.startswith("error:") and len(done.stderr.strip().splitlines()) == 1


def test_a_teacher_is_evaluated_trained_or_not_and_as_it_is_kept_if_it_stays_as_given():
    """In float32 after its SFT or for its export; integers and the compute dtype are decoded without a copy."""
    config, shape = fashion.get_config("paper"), ModelConfig(1000, 64, 128, 2, 4, 2, 16)
    kept = {d: arithmetic.frozen_bytes(shape, d) for d in ("bfloat16", "int8", "int4")}
    assert planner.evaluated_teacher(config, shape, kept["bfloat16"]) == 4 * num_params(shape)
    config.sft.teacher.update(steps=0, epochs=0.0)
    assert "evaluation" in planner._builds(config)
    assert planner.evaluated_teacher(config, shape, kept["bfloat16"]) == 4 * num_params(shape)
    config.train.export = False
    for dtype in kept:
        config.dtype.frozen = dtype
        assert planner.evaluated_teacher(config, shape, kept[dtype]) == 0
    config.dtype.compute = "float32"
    assert planner.evaluated_teacher(config, shape, kept["int8"]) == 0
    config.dtype.frozen = "bfloat16"
    assert planner.evaluated_teacher(config, shape, kept["bfloat16"]) == kept["bfloat16"]
