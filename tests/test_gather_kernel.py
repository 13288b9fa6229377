"""The Pallas kernel of frozen models' log-probabilities, run by Pallas's interpreter, against float64 NumPy."""

import functools
import importlib.util
import os
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from listopd_jax.ops.gather_kernel import gather_logprobs
from listopd_jax.plan.__main__ import set_environment
from listopd_jax.plan.chips import parse_topology
from listopd_jax.plan.compile import devices_of


def make(n, width, rows, vocab, dtype=np.float32, scale=1.0):
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(scale * rng.normal(size=(m, width)), dtype) for m in (n, rows))
    return hidden, head, jnp.asarray(rng.integers(vocab, size=n))


def exact(hidden, head, tokens, vocab):
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)[:vocab].T
    logits -= logits.max(-1, keepdims=True)
    return logits[np.arange(len(tokens)), tokens] - np.log(np.exp(logits).sum(-1))


@pytest.fixture
def interpreter(monkeypatch):
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


@pytest.mark.parametrize(
    ("n", "width", "rows", "vocab"),
    [(5, 8, 300, 300), (40, 16, 300, 170), (16, 6200, 300, 257), (520, 4, 128, 7)],
    ids=["one block", "padded vocabulary", "blocks of the head", "blocks of rows"],
)
def test_it_is_the_dense_log_softmax(interpreter, n, width, rows, vocab):
    case = make(n, width, rows, vocab, scale=width**-0.25)
    np.testing.assert_allclose(gather_logprobs(*case, vocab), exact(*case, vocab), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extreme_logits_and_bfloat16(interpreter, dtype):
    case = make(20, 16, 300, 290, dtype, scale=15.0)
    np.testing.assert_allclose(gather_logprobs(*case, 290), exact(*case, 290), rtol=1e-5, atol=2e-3)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: the extra 'tpu'"
)
@pytest.mark.parametrize("width", [2560, 5120])
def test_the_tpu_compiler_takes_it_and_keeps_no_logits(width):
    """The XLA form of the same needs the logits of a chunk, 600 MB and more."""
    n, rows = 1024, 151936
    topology = parse_topology("v5e:2x4")
    with mock.patch.dict(os.environ):
        set_environment(topology)
        one = jax.sharding.SingleDeviceSharding(devices_of(topology)[0])
    shapes = ((n, width), jnp.bfloat16), ((rows, width), jnp.bfloat16), ((n,), jnp.int32)
    arguments = [jax.ShapeDtypeStruct(*x, sharding=one) for x in shapes]
    compiled = jax.jit(gather_logprobs, static_argnums=3).lower(*arguments, 151669).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**22
