"""Annotations of shapes are checked in the tests: calls of the package, once for each set of shapes."""

import jax.numpy as jnp
import numpy as np
import pytest
from typechecked import once_per_shapes, shapes_of

from listopd_jax.rollout.decode import completion_mask
from listopd_jax.rollout.sampling import unpacked


def test_a_call_with_other_shapes_is_checked_after_a_good_one():
    words = np.zeros((2, 3), np.uint32)
    assert unpacked(words, 70).shape == unpacked(words, 70).shape == (2, 70)
    for wrong in (np.zeros((2, 3), np.int32), np.zeros((2, 3), np.float32)):  # of another dtype
        with pytest.raises(Exception, match="UInt32"):
            unpacked(wrong, 70)
    assert completion_mask(jnp.array([1, 2]), 3).shape == (2, 3)
    with pytest.raises(Exception, match="Int"):
        completion_mask(jnp.array([1.0, 2.0]), 3)


def test_a_failed_check_is_repeated_and_a_passed_one_is_not():
    calls = []

    def checked(x):
        calls.append(x)
        if x.ndim > 1:
            raise TypeError
        return x

    f = once_per_shapes(lambda x: x, checked)
    for x in (np.zeros(2), np.ones(2), np.zeros(3)):
        f(x)
    assert len(calls) == 2
    for _ in range(2):
        with pytest.raises(TypeError):
            f(np.zeros((1, 1)))
    assert len(calls) == 4


def test_like_arguments_have_shapes_dtypes_structure_and_simple_values_in_common():
    x = np.zeros((2, 3), np.float32)
    same = shapes_of((x, {"a": 1}), {})
    assert same == shapes_of((x + 1, {"a": 1}), {}) == shapes_of((x.copy(), {"a": 1}), {})
    others = [
        (x[:1], {"a": 1}),
        (x.astype(int), {"a": 1}),
        (x, {"a": 2}),
        (x, {"b": 1}),
        (x, None),
        ([x], {"a": 1}),
    ]
    assert same not in {shapes_of(args, {}) for args in others}
