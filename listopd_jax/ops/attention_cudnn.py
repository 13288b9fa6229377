"""Causal attention on GPUs by cuDNN's fused kernel, through jax's public API."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from listopd_jax.ops.attention import Prompt


def causal(
    q: Float[Array, "B n T N H"],
    k: Float[Array, "B n T KV H"],
    v: Float[Array, "B n T KV H"],
    prompt: Prompt | None = None,
    starts: Int[Array, "B T"] | None = None,
    *,
    implementation: str = "cudnn",
) -> Float[Array, "B n T N H"]:
    """`listopd_jax.ops.attention.causal` by jax.nn.dot_product_attention, with its derivatives.

    Each completion is a row of its own: the prompt's keys and values are repeated for its n completions, but nothing
    else of the prompt is. cuDNN wants 16 bit; even lengths and a head dimension that 8 divides are given to it by
    padding. Tests run the same function on a CPU with implementation='xla'; benchmarks.gpu.correct checks it on a GPU.
    """
    B, n, T, N, H = q.shape
    q, k, v = (_padded(x.reshape(B * n, *x.shape[2:])) for x in (q, k, v))
    mask = None
    if prompt is not None:
        past = prompt.k.transpose(0, 3, 1, 2), prompt.v.transpose(0, 2, 1, 3)
        past_k, past_v = (_padded(jnp.repeat(x, n, 0)) for x in past)
        mask = _visible(jnp.repeat(prompt.lengths, n), past_k.shape[1], q.shape[1])
        k, v = jnp.concatenate([past_k, k], 1), jnp.concatenate([past_v, v], 1)
    if starts is not None:
        starts = jnp.pad(starts, ((0, 0), (0, T % 2)))
        mask = (starts[:, :, None] == starts[:, None, :])[:, None]
    # The scale is that of H before padding: zeros in a head change no score.
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=H**-0.5, is_causal=prompt is None, implementation=implementation
    )
    return out[:, :T, :, :H].reshape(B, n, T, N, H)


def _visible(lengths: Int[Array, " R"], slots: int, tokens: int) -> Bool[Array, "R 1 T S"]:
    """The slots of the prompt below its length and the own tokens that are not after the query."""
    past = jnp.arange(slots) < lengths[:, None, None, None]
    own = jnp.tril(jnp.ones((tokens, tokens), bool))
    rows = (len(lengths), 1, tokens)
    return jnp.concatenate([jnp.broadcast_to(x, (*rows, x.shape[-1])) for x in (past, own)], -1)


def _padded(x: Float[Array, "R S X H"]) -> Float[Array, "R even X multiple"]:
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, -x.shape[3] % 8)))
