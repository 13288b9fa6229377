"""The mesh: its sizes, what it refuses, and the programs on 8 fake devices (in a process of its own)."""

import os
import re
import sys

import ml_collections
import pytest
from jax.sharding import PartitionSpec as P
from processes import run_command

from listopd_jax.config import defaults, validate
from listopd_jax.errors import UserError
from listopd_jax.models.config import ModelConfig
from listopd_jax.parallel.mesh import mesh_sizes
from listopd_jax.parallel.rules import PARAMS, RULES, spec
from listopd_jax.train.preflight import check_mesh

EIGHT = "--xla_force_host_platform_device_count=8"


@pytest.mark.slow
def test_programs_on_eight_devices_are_those_of_one():
    """on_eight_devices.py: steps, rollouts and weights over meshes of data×fsdp×tensor from 8×1×1 to 1×1×8."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {EIGHT}"
    result = run_command(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/on_eight_devices.py"],
        XLA_FLAGS=flags,
        JAX_ENABLE_COMPILATION_CACHE="0",  # nobody else has these programs
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert re.search(r"\b36 passed", result.stdout), result.stdout


def parallel(**sizes):
    return {**defaults().parallel, **sizes}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 4, "tensor": 2}, (1, 4, 2)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 4, 2)),
        ({"data": 8}, (8, 1, 1)),
    ],
)
def test_minus_one_is_what_is_left(sizes, expected):
    assert tuple(mesh_sizes(parallel(**sizes), 8).values()) == expected


@pytest.mark.parametrize("sizes", [{"fsdp": 3}, {"tensor": 16}, {"data": 4}])
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes):
    with pytest.raises(UserError, match=r"^parallel \(.*8 devices; [^\n]*$"):
        mesh_sizes(parallel(**sizes), 8)


SHAPE = ModelConfig(100, 48, 96, 2, 12, 3, 8)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"tensor": 8}, "parallel.tensor=8 must divide num_heads=12 of the teacher"),
        ({"fsdp": 32}, "parallel.fsdp=32 must divide hidden_size=48 of the teacher"),
        ({"data": 3}, "parallel.data*parallel.fsdp=3 must divide opd.batch_size=16"),
        ({"data": 8}, "parallel.data*parallel.fsdp=8 must divide opd.microbatch=4"),
    ],
)
def test_what_a_mesh_does_not_divide_is_named(sizes, says):
    config = defaults()
    config.opd.update(batch_size=16, microbatch=4)
    with pytest.raises(UserError) as e:
        check_mesh(config, {"teacher": SHAPE}, {"data": 1, "fsdp": 1, "tensor": 1} | sizes)
    assert str(e.value).startswith(says) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"fsdp": 0}, "parallel.fsdp=0"),
        ({"fsdp": -1}, "parallel.data, parallel.fsdp: only one"),
        ({"num_processes": -1}, "parallel.num_processes=-1"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields, says):
    config = defaults()
    config.parallel.update(fields)
    with pytest.raises(UserError) as e:
        validate(config)
    assert str(e.value).startswith(says)


def test_an_axis_that_does_not_divide_is_left_whole():
    mesh = ml_collections.FrozenConfigDict({"shape": {"data": 2, "fsdp": 2, "tensor": 4}})
    assert spec(("vocab", "embed"), (96, 16), mesh) == P("tensor", "fsdp")
    assert spec(("vocab", "embed"), (90, 16), mesh) == P(None, "fsdp")
    assert spec(("batch", None), (8, 3), mesh) == P(("data", "fsdp"), None)


def test_every_axis_of_every_parameter_has_a_rule():
    assert {axis for axes in PARAMS.values() for axis in axes} <= RULES.keys()
