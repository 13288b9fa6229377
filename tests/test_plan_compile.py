"""The planner against compilers and a running program: each in a process of its own, as devices are fixed at start."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

import pytest

from benchmarks.presets import paper
from listopd_jax.config import validate
from listopd_jax.models.config import ModelConfig
from listopd_jax.parallel.mesh import AXES, make_mesh
from listopd_jax.plan import compile as aot
from listopd_jax.plan.__main__ import set_environment
from listopd_jax.plan.chips import parse_topology
from listopd_jax.plan.hlo import parse
from listopd_jax.plan.kernels import kernels

HERE = pathlib.Path(__file__).parent
TINY = (
    "--config=configs/fashion.py:tiny", "--json", "--config.task.max_prompt=64", "--config.task.max_response=16",
    "--config.opd.batch_size=8", "--config.parallel.data=2", "--config.parallel.fsdp=2", "--config.parallel.tensor=2",
)  # fmt: skip
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install listopd_jax[tpu]"
)


def planned(*flags):
    """The plan that the command prints, and its exit code."""
    argv = [sys.executable, "-m", "listopd_jax.plan", *flags]
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=900, env=env)
    assert done.stdout, done.stderr
    return json.loads(done.stdout), done.returncode


@pytest.mark.parametrize("topology", ["cpu:8", pytest.param("v5e:2x4", marks=needs_libtpu)])
def test_the_real_programs_compile_for_eight_devices(topology):
    plan, code = planned(*TINY, f"--topology={topology}")
    assert code == 0 and plan["fits"] and plan["memory_source"].startswith("compiled for")
    assert plan["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert plan["peaks_gib"].keys() == {"sft teacher", "sft student", "evaluation", "rollout", "update"}
    assert plan["peak_gib"] == max(plan["peaks_gib"].values())
    moved = plan["bytes_compiled"]["update"]
    assert {"fsdp", "tensor"} <= set("+".join(moved).split("+"))


@needs_libtpu
def test_a_mesh_axis_may_take_a_part_of_a_slices_axis():
    """4 x 2 of a row of 8 chips, and 2 x 8 of 4 x 4: jax refuses to split an axis of the slice unless it is told to."""
    for name, sizes in (("v5e:2x4", (2, 2, 2)), ("v5e:4x4", (1, 2, 8))):
        topology = parse_topology(name)
        with mock.patch.dict(os.environ):
            set_environment(topology)
            mesh = make_mesh(dict(zip(AXES, sizes, strict=True)), aot.devices_of(topology))
        assert mesh.devices.shape == sizes and len({d.id for d in mesh.devices.flat}) == mesh.size


@pytest.mark.slow
@needs_libtpu
def test_what_does_not_fit_is_refused_before_anyone_pays():
    plan, code = planned(
        "--config=configs/fashion.py:tiny", "--json", "--topology=v5e:1x1", "--config.opd.batch_size=4096"
    )
    assert code == 1 and not plan["fits"] and plan["peak_gib"] > plan["hbm_gib"]


@pytest.mark.slow
def test_predicted_memory_is_the_measured():
    """Peak resident memory of the rollout and the update on a CPU is within 10 % of what the compiler said."""
    if not pathlib.Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux: the peak of a process is reset through /proc/self/clear_refs")
    argv = [sys.executable, str(HERE / "measure_plan_memory.py")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    for phase, (measured, predicted) in json.loads(done.stdout.splitlines()[-1]).items():
        assert predicted == pytest.approx(measured, rel=0.1), phase


def small_decoder():
    """A student of 4 layers for a slice of four chips, whose stacks are larger than a chip's fast memory."""
    config = paper()
    config.tokenizer.update(path="", vocab_size=900)
    config.task.update(max_prompt=2048, max_response=64)
    config.parallel.update(data=1, tensor=4)
    config.rollout.draft_tokens, config.opd.batch_size = 0, 32
    student = ModelConfig(1024, 512, 1024, 4, 8, 4, 128, tied=True)
    return validate(config), dict.fromkeys(("teacher", "student"), student)


@needs_libtpu
def test_decoding_on_a_tpu_copies_no_layer_and_gathers_no_logits():
    """What a step moves within a chip's memory is less than one weight of a layer, and far less than its keys;
    between chips, sums of states.

    What is fetched from there into the fast memory, S(1), is no copy.
    """
    topology, (config, shapes) = parse_topology("v5p:2x2x1"), small_decoder()
    with mock.patch.dict(os.environ):
        set_environment(topology)
        mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 4}, aot.devices_of(topology))
    _, (segment,) = aot.rollout_programs(config, shapes, 900, mesh, [64])
    places = {i.name: i.shape for body in parse(segment.text).values() for i in body.values()}
    steps = [k for k in kernels(segment.text, turns=64) if k.runs > 1]  # all else is once per segment
    weight, keys = 512 * 128 * 2, 32 * 2048 * 128 * 2
    readers = [k for k in steps if k.read >= keys]
    # One kernel, whose operands are the stacks: the keys and values of four layers.
    assert len(readers) == 1 and readers[0].read >= 4 * 2 * keys
    copied = [k for k in steps if k.kind == "copy" and "S(1)" not in places[k.name].partition("}")[0]]
    assert copied and max(k.written for k in copied) < weight
    sent = [k for k in steps if k.kind == "collective"]
    logits = 32 * 1024 * 4 * 3 / 4  # what a chip would receive of them
    assert sent and max(k.written for k in sent) < 0.6 * logits
