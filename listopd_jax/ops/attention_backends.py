"""Which backend computes attention on which device: one place that knows them all."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from listopd_jax.errors import UserError
from listopd_jax.ops import attention, attention_cudnn, attention_splash, decode_kernel
from listopd_jax.ops.attention import Part, Prompt, stored
from listopd_jax.parallel.rules import CACHE, spec

BACKENDS = {
    "xla": attention.causal,
    "cudnn": attention_cudnn.causal,
    "splash": attention_splash.causal,
}


def resolve(backend: str, platform: str, dtype: str) -> str:
    """The backend that config field `attention` asks for, on devices of `platform` (cpu, gpu or tpu).

    auto: splash on TPUs, cudnn on GPUs in 16 bit, which cuDNN needs, else xla. UserError if `backend` cannot run there.
    """
    best = "splash" if platform == "tpu" else "cudnn" if platform == "gpu" and dtype == "bfloat16" else "xla"
    if backend == "splash" and platform != "tpu":
        raise UserError(f"attention='splash' needs a TPU, not a {platform}; set attention='auto'")
    if backend == "cudnn" and platform != "gpu":
        raise UserError(f"attention='cudnn' needs a GPU, not a {platform}; set attention='auto'")
    if backend == "cudnn" and dtype != "bfloat16":
        raise UserError(
            f"attention='cudnn' needs dtype.compute='bfloat16', not {dtype!r}; set one of the two"
        )
    return best if backend == "auto" else backend


def causal_attention(
    backend: str,
    q: Float[Array, "B n T N H"],
    k: Float[Array, "B n T KV H"],
    v: Float[Array, "B n T KV H"],
    prompt: Prompt | None = None,
    starts: Int[Array, "B T"] | None = None,
) -> Float[Array, "B n T N H"]:
    """`listopd_jax.ops.attention.causal` in one of BACKENDS."""
    mesh = jax.sharding.get_abstract_mesh()
    arrays = (q, k, v, prompt, starts)
    if backend == "xla" or mesh.empty:
        return BACKENDS[backend](*arrays)
    # A kernel is opaque to the partitioner: each device runs its own on its rows and heads.
    specs = tuple(_specs(x, mesh, "kv_heads" if i else "heads") for i, x in enumerate(arrays))
    run = jax.shard_map(BACKENDS[backend], mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    return run(*arrays)


Stacks = tuple[Array, Array]
"""Keys and values of all layers, as a KVCache of models/decoder.py has them."""


def decode_attention(
    backend: str, prompt: Stacks, lengths: Int[Array, " B"], cache: Stacks, cached: Int[Array, "#B #n"]
) -> tuple[Any, Callable[[Array, Array, Array, Any], Array]]:
    """How a decode step attends in each layer: (what a scan over the layers passes on, attend(q, k, v, of_layer)).

    q [B,n,S,N,H], k and v [B,n,S,KV,H] are of S new tokens, which see the prompt, the first `cached` tokens of the
    cache, and each other up to themselves. On a TPU ("splash") one kernel reads all of it where it lies; elsewhere, and
    where it does not fit in a TPU's fast memory, it is `listopd_jax.ops.attention.attention`.
    """

    def of_kernel(q, k, v, layer):
        if not decode_kernel.fits(q, prompt[1], cache[1]):
            return of_parts(q, k, v, jax.tree.map(lambda x: x[layer], (prompt, cache)))
        return _decode_kernel(q, k, v, *prompt, *cache, lengths, jnp.broadcast_to(cached, q.shape[:2]), layer)

    def of_parts(q, k, v, stacks):
        (shared, own), S = stacks, q.shape[2]
        # After `cached` there may be keys of drafts that were not confirmed.
        written = jnp.arange(own[0].shape[-1]) < cached[..., None, None]
        # A single new token sees itself and needs no mask.
        causal = None if S == 1 else (jnp.arange(S) <= jnp.arange(S)[:, None])[None, None]
        # Three parts of one softmax: the prompt, the cache, and the new tokens, which are not in the cache yet.
        new = Part(*stored(k, v), causal)
        return attention.attention(q, [Prompt(*shared, lengths).part(), Part(*own, written), new])

    if backend == "splash":
        return jnp.arange(len(prompt[0])), of_kernel
    return (prompt, cache), of_parts


def _decode_kernel(*arrays: Array) -> Array:
    """`decode_kernel.decode_attention`, on each device for its rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return decode_kernel.decode_attention(*arrays)
    rows = [("batch", None, None, heads, None) for heads in ("heads", "kv_heads", "kv_heads")]
    axes = [*rows, CACHE[5], CACHE[5], CACHE[6], CACHE[6], ("batch",), ("batch", None), ()]
    specs = tuple(spec(names, x.shape, mesh) for names, x in zip(axes, arrays, strict=True))
    run = jax.shard_map(
        decode_kernel.decode_attention, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False
    )
    return run(*arrays)


def _specs(x: Array | Prompt | None, mesh, heads: str) -> PartitionSpec | Prompt | None:
    if x is None:
        return None
    if isinstance(x, Prompt):
        kv = spec(("batch", heads, None, None), x.v.shape, mesh)
        return Prompt(kv, kv, spec(("batch",), x.lengths.shape, mesh))
    axes = ("batch", None, None, heads, None) if x.ndim == 5 else ("batch", None)
    return spec(axes, x.shape, mesh)
