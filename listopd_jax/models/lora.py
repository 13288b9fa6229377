"""Low-rank adapters: drawn, attached to their base, merged into it, several stacked as one.

An adapter is the parameters of type nnx.LoRAParam of a Decoder with `lora`; its base is the others, which are those of
the decoder without it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from listopd_jax.models.config import PROJECTIONS, Lora, ModelConfig
from listopd_jax.models.decoder import Decoder, abstract
from listopd_jax.parallel.compiler import OTHER, backend_options
from listopd_jax.parallel.rules import param_shardings


def abstract_adapter(config: ModelConfig, lora: Lora, dtype=jnp.float32) -> nnx.State:
    """The adapter with shapes for arrays."""
    return nnx.filter_state(abstract(config, param_dtype=jnp.dtype(dtype), lora=lora)[1], nnx.LoRAParam)


def initial_adapter(config: ModelConfig, lora: Lora, seed: int) -> nnx.State:
    """An adapter that changes nothing yet, in float32: A drawn from `seed`, B zero."""

    def make():
        return nnx.state(Decoder(config, rngs=nnx.Rngs(seed), lora=lora), nnx.LoRAParam)

    return _run(make)


def with_adapter(base: nnx.State, trained: nnx.State) -> nnx.State:
    """All parameters of the model that trains: `trained` itself, or `base` with `trained` as its adapter."""
    is_adapter = all(isinstance(param, nnx.LoRAParam) for _, param in nnx.to_flat_state(trained))
    return nnx.merge_state(base, trained) if is_adapter else trained


def merge_adapter(base: nnx.State, trained: nnx.State, lora: Lora | None, dtype="float32") -> nnx.State:
    """`with_adapter` as weights without an adapter, in `dtype`: W + alpha/rank · A B, added in float32."""
    if lora is None:
        return trained
    dtype = jnp.dtype(dtype)
    return _run(lambda base, adapter: _merge(base, adapter, lora, dtype), base, trained)


def _merge(base: nnx.State, adapter: nnx.State, lora: Lora, dtype) -> nnx.State:
    factors = {path: p[...] for path, p in nnx.to_flat_state(adapter)}

    def merge_weight(path: tuple, weight: Array) -> Array:
        a, b = (factors.get((*path[:-1], f"{path[-1]}_lora_{factor}")) for factor in "ab")
        return weight if a is None else weight.astype(jnp.float32) + lora.scale * _product(a, b, weight.shape)

    flat = [
        (path, p.replace(merge_weight(path, p[...]).astype(dtype))) for path, p in nnx.to_flat_state(base)
    ]
    return nnx.from_flat_state(flat)


def _product(a: Float[Array, "L *i r"], b: Float[Array, "L r *o"], shape: tuple[int, ...]) -> Array:
    """A B of every layer, in `shape`."""
    a, b = (x.astype(jnp.float32) for x in (a, b))
    layers, rank = a.shape[0], a.shape[-1]
    # highest: accelerators multiply float32 with fewer bits by default, and these weights stay.
    product = jnp.matmul(a.reshape(layers, -1, rank), b.reshape(layers, rank, -1), precision="highest")
    return product.reshape(shape)


def stack_adapters(config: ModelConfig, adapters: Sequence[tuple[Lora, nnx.State]]) -> tuple[Lora, nnx.State]:
    """One adapter that changes what all of `adapters` change, in float32: of the sum of their ranks, scale 1."""
    rank = sum(lora.rank for lora, _ in adapters)
    targets = tuple(name for name in PROJECTIONS if any(name in lora.targets for lora, _ in adapters))
    combined = Lora(rank, float(rank), targets)
    parts = [(lora, {path: p[...] for path, p in nnx.to_flat_state(state)}) for lora, state in adapters]

    def factor(path: tuple, like: Any) -> Array:
        # Ranks are concatenated: [A₁ A₂] [s₁B₁; s₂B₂] = s₁A₁B₁ + s₂A₂B₂. Axis 0 is the layer.
        axis = -1 if path[-1].endswith("_a") else 1
        pieces = []
        for lora, arrays in parts:
            shape = list(like.shape)
            shape[axis] = lora.rank
            # An adapter without this target contributes zeros.
            piece = arrays.get(path, jnp.zeros(shape, jnp.float32))
            pieces.append(piece * (lora.scale if axis == 1 else 1))
        return jnp.concatenate(pieces, axis)

    flat = nnx.to_flat_state(abstract_adapter(config, combined))
    return combined, nnx.from_flat_state([(path, p.replace(factor(path, p))) for path, p in flat])


def _run(make: Any, *args: Any) -> nnx.State:
    """make(*args) compiled, its results sharded as parameters are."""
    shardings, options = param_shardings(jax.eval_shape(make, *args)), backend_options(OTHER)
    return jax.jit(make, out_shardings=shardings, compiler_options=options)(*args)
