"""Which backend computes causal attention on which device: one place that knows all three."""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from listopd_jax.errors import UserError
from listopd_jax.ops import attention, attention_cudnn, attention_splash
from listopd_jax.ops.attention import Prompt
from listopd_jax.parallel.rules import spec

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


def _specs(x: Array | Prompt | None, mesh, heads: str) -> PartitionSpec | Prompt | None:
    if x is None:
        return None
    if isinstance(x, Prompt):
        kv = spec(("batch", heads, None, None), x.v.shape, mesh)
        return Prompt(kv, kv, spec(("batch",), x.lengths.shape, mesh))
    axes = ("batch", None, None, heads, None) if x.ndim == 5 else ("batch", None)
    return spec(axes, x.shape, mesh)
