"""The checksum of a tree of arrays: one changed bit, one swap, another order always show; the mesh never does."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from listopd_jax.train.checksum import checksum

DTYPES = ("float32", "bfloat16", "int32", "uint8")


def tree(dtype):
    rng = np.random.default_rng(0)
    return {
        "a": jnp.asarray(rng.normal(size=(3, 5)) * 9, dtype),
        "b": jnp.asarray(rng.normal(size=8) * 9, dtype),
    }


def words(x):
    return np.array(x).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(0, 14), st.integers(0, 31))
def test_a_flipped_bit_shows(dtype, place, bit):
    old = tree(dtype)
    changed = words(old["a"])
    changed.flat[place] ^= np.array(1 << bit % (8 * changed.itemsize), changed.dtype)
    new = old | {"a": jnp.asarray(changed.view(np.dtype(old["a"].dtype)))}
    assert checksum(new) != checksum(old)
    assert checksum(tree(dtype)) == checksum(old)


def test_values_in_another_place_show():
    x = jnp.arange(12.0)
    assert checksum(x) != checksum(x[::-1])
    assert checksum(x.reshape(3, 4)) != checksum(x.reshape(3, 4).at[0, 1].set(2.0).at[0, 2].set(1.0))
    assert checksum([x, x + 1]) != checksum([x + 1, x])


def test_no_float_is_taken_for_another():
    """Zeros of both signs, NaNs of two payloads and the smallest subnormal are five things."""
    odd = np.array([0, 0x80000000, 0x7FC00000, 0x7FC00001, 1], np.uint32).view(np.float32)
    assert len({checksum(jnp.asarray(odd[i : i + 1])) for i in range(5)}) == 5


@pytest.mark.parametrize("x", [jnp.array([True, False]), jnp.int32(3), jnp.zeros((0, 4)), {}])
def test_any_shape_has_one(x):
    assert 0 <= checksum(x) < 2**32


def test_random_arrays_do_not_collide():
    sums = {checksum(jax.random.normal(jax.random.key(i), (7,))) for i in range(300)}
    assert len(sums) == 300


MESHES = """
import os
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
import jax, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from listopd_jax.train.checksum import checksum
x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
for shape in ((8, 1), (4, 2), (2, 4)):
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = Mesh(np.array(jax.devices()).reshape(shape), ("a", "b"), axis_types=(kind,) * 2)
        for spec in (P("a", "b"), P(None, "a"), P(("a", "b")), P()):
            print(checksum({"x": jax.device_put(x, NamedSharding(mesh, spec))}))
"""


def test_the_mesh_does_not_matter():
    done = subprocess.run([sys.executable, "-c", MESHES], capture_output=True, text=True, check=False)
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    assert done.stdout.split() == [str(checksum({"x": jnp.asarray(x)}))] * 24, done.stderr[-2000:]
