"""Frozen models in 8 bits: the weights of products as integers with a scale per output channel.

Weight-only: a layer's `astype` makes its weight again where it is used, so a decoder reads such parameters as it reads
others, and activations keep their dtype. A library would replace the layers; ours are one stack under a scan. Norms,
embedding and head stay in bfloat16.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from listopd_jax.models.config import PROJECTIONS

INT8 = "int8"  # as a dtype of frozen models
REST = "bfloat16"  # of what stays as it is


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Weights as `values · scale`; of an array it has what a decoder asks of one."""

    values: Any  # int8 [L, …], or […] of one layer; in a tree of shapes or shardings, those
    scale: Any  # float32, of length 1 along the inputs

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights."""
        return self.values.shape

    def __getitem__(self, index: Any) -> "Quantized":
        """Some of the layers: the axes behind the first are never cut."""
        return jax.tree.map(lambda x: x[index], self)

    def astype(self, dtype: Any) -> Float[Array, "..."]:
        """The weights in `dtype`, multiplied in float32."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def quantize(path: tuple, param: nnx.Variable) -> nnx.Variable:
    """The parameter at `path` of a decoder: rounded to nearest if it is a product's weight, else in REST.

    The largest weight of an output channel becomes 127.
    """
    weight = param[...]
    if path[0] != "layers" or path[-1] not in PROJECTIONS:
        return param.replace(weight.astype(REST))
    inputs = (1, 2) if path[-1] == "o" else (1,)
    return param.replace(_rounded(weight.astype(jnp.float32), inputs))


def _rounded(weight: Float[Array, "L *s"], inputs: tuple[int, ...]) -> Quantized:
    # Never 0, so a channel of zeros stays zero instead of NaN.
    scale = jnp.maximum(jnp.abs(weight).max(inputs, keepdims=True), jnp.finfo(jnp.float32).tiny) / 127
    return Quantized(jnp.round(weight / scale).astype(jnp.int8), scale)


def is_quantized(x: Any) -> bool:
    """Of a node of a tree of parameters."""
    return isinstance(x, Quantized)
