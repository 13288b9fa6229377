"""Frozen models in 8 or 4 bits: the weights of products as integers with scales.

In int8 an output channel has one scale, in int4 one for every 32 inputs (llama.cpp's Q4_0 without its 16th value).
Weight-only: a layer's `astype` dequantizes its weight at use, so a decoder reads such parameters like any others, and
activations keep their dtype. Norms, embedding and head stay in bfloat16.

Not through qwix (0.1.8): it sets quantized weights on the modules while it traces them, which flax refuses inside our
scan over layers ("Cannot mutate 'Layer' from different trace level").
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8

from listopd_jax.models.config import PROJECTIONS
from listopd_jax.parallel.compiler import OTHER, BackendJit
from listopd_jax.parallel.rules import PARAMS, constrain

GROUPS = {"int8": None, "int4": 32}  # as dtypes of frozen models: inputs that share a scale, None for all
LARGEST = {"int8": 127, "int4": 7}
REST = "bfloat16"  # of what stays as it is


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Weights as `values · scale`, with the parts of an array's interface that a decoder uses."""

    values: Any  # int8 [L, …], or […] of one layer; in a tree of shapes or shardings, those
    scale: Any  # float32, along the inputs of length 1 or of as many as there are groups
    # The axis, from the end, along which a byte holds two; 0 if none does. Not jnp.int4: before a scan, XLA for GPUs
    # copies the whole stack, to put the contracted axis last (jax 0.10.2). With the copy it is as large as int8.
    pairs: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weights."""
        shape = list(self.values.shape)
        if self.pairs:
            shape[self.pairs] *= 2
        return tuple(shape)

    def __getitem__(self, index: Any) -> "Quantized":
        """Some of the layers: the axes behind the first are never cut."""
        return jax.tree.map(lambda x: x[index], self)

    def astype(self, dtype: Any) -> Float[Array, "..."]:
        """The weights in `dtype`, multiplied in float32."""
        values = _unpack_int4(self.values, self.pairs) if self.pairs else self.values
        return (values.astype(jnp.float32) * _broadcast_scale(self.scale, self.shape)).astype(dtype)


def divides(size: int, dtype: str) -> bool:
    """Whether an axis of `size` inputs can be rounded to `dtype`: only in int4 there are pairs and groups."""
    group = GROUPS[dtype]
    return group is None or (size % 2 == 0 if size < group else size % group == 0)


def quantize(path: tuple, param: nnx.Variable, dtype: str) -> nnx.Variable:
    """The parameter at `path` of a decoder: rounded to nearest in `dtype` if it is a product's weight, else in REST.

    The largest weight of each scale becomes 127 in int8, 7 in int4.
    """
    if path[0] != "layers" or path[-1] not in PROJECTIONS:
        return param.replace(param[...].astype(REST))
    return param.replace(_rounded(param[...], path[-1], dtype))


@functools.partial(BackendJit, options=OTHER, static_argnames=("name", "dtype"))
def _rounded(weight: Float[Array, "L *s"] | Quantized, name: str, dtype: str) -> Quantized:
    # Compiled: a stack of layers in float32, which steps one by one would make, is larger than what is rounded.
    weight, axis = weight.astype(jnp.float32), 2 if name == "o" else 1  # the last of the inputs: `o` has two
    scale = _largest(jnp.abs(weight), axis, dtype) / LARGEST[dtype]
    # Never 0, so zeros stay zero instead of NaN.
    scale = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
    values = jnp.round(weight / _broadcast_scale(scale, weight.shape)).astype(jnp.int8)
    pairs = axis - weight.ndim if dtype == "int4" else 0
    rounded = Quantized(_pack_int4(values, pairs) if pairs else values, scale, pairs)
    return jax.tree.map(lambda x: constrain(x, "layers", *PARAMS[name]), rounded)


def _largest(sizes: Float[Array, "L *s"], axis: int, dtype: str) -> Float[Array, "L *g"]:
    """The largest of the values that share a scale: along the inputs, which end with `axis`."""
    if GROUPS[dtype] is None:
        return sizes.max(tuple(range(1, axis + 1)), keepdims=True)
    group = min(GROUPS[dtype], sizes.shape[axis])
    return sizes.reshape(*sizes.shape[:axis], -1, group, *sizes.shape[axis + 1 :]).max(axis + 1)


def _broadcast_scale(scale: Float[Array, "*g"], shape: tuple[int, ...]) -> Float[Array, "*s"]:
    """The scale of each weight of `shape`, or what is broadcast to that."""
    for axis, (groups, size) in enumerate(zip(scale.shape, shape, strict=True)):
        scale = jnp.repeat(scale, size // groups, axis) if groups > 1 else scale
    return scale


def _pack_int4(values: Int8[Array, "..."], axis: int) -> Int8[Array, "..."]:
    """Numbers of 4 bits, two neighbours along `axis` in a byte: a device's part of that is of its own weights."""
    axis %= values.ndim
    low, high = (jax.lax.slice_in_dim(values, i, None, 2, axis) for i in range(2))
    return low & 15 | high << 4


def _unpack_int4(pairs: Int8[Array, "..."], axis: int) -> Int8[Array, "..."]:
    """The inverse of `_pack_int4`; shifted to the right, a signed number keeps its sign."""
    axis %= pairs.ndim
    both = jnp.stack([pairs << 4 >> 4, pairs >> 4], axis + 1)
    return both.reshape(*pairs.shape[:axis], -1, *pairs.shape[axis + 1 :])


def is_quantized(x: Any) -> bool:
    """Whether a node of a tree of parameters is quantized."""
    return isinstance(x, Quantized)
