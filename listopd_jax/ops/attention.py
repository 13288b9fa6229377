"""Attention of n completions to one shared prompt and to themselves: the plain XLA reference."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # finite: a masked score must give an exact zero probability and no NaN in any gradient


def attention(
    q: Float[Array, "B n T N H"],
    k: Float[Array, "B n S KV H"],
    v: Float[Array, "B n S KV H"],
    mask: Bool[Array, "T S"],
    prompt_k: Float[Array, "B P KV H"] | None = None,
    prompt_v: Float[Array, "B P KV H"] | None = None,
    prompt_lengths: Int[Array, " B"] | None = None,
) -> Float[Array, "B n T N H"]:
    """Grouped-query attention, one softmax over the prompt's keys (below its length) and the own (`mask`).

    Without a prompt this is ordinary masked attention. Every query must see at least one own key. Scores,
    softmax and accumulation are float32; the result has q's dtype.

    The result is that of a softmax over the concatenated keys, but the two parts stay apart and only share
    their maximum and their denominator: the prompt's keys and values are read once for all n·T queries, and
    nothing is repeated over heads or completions.
    """
    B, n, T, N, H = q.shape
    # Batch axes first, so that every product is a plain batched matrix product without a transposed result.
    q = q.reshape(B, n, T, k.shape[3], -1, H).transpose(0, 3, 1, 2, 4, 5)
    scores = _scores("bkntgh,bnskh->bkntgs", q, k)
    scores = jnp.where(mask[:, None], scores, MASKED)
    top = scores.max(-1, keepdims=True)
    if prompt_k is not None:
        prompt_scores = _scores("bkntgh,bpkh->bkntgp", q, prompt_k)
        seen = jnp.arange(prompt_k.shape[1]) < prompt_lengths[:, None]
        prompt_scores = jnp.where(seen[:, None, None, None, None], prompt_scores, MASKED)
        top = jnp.maximum(top, prompt_scores.max(-1, keepdims=True))
    top = jax.lax.stop_gradient(top)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = _mix("bkntgs,bnskh->bkntgh", weights, v)
    if prompt_k is not None:
        weights = jnp.exp(prompt_scores - top)
        total += weights.sum(-1, keepdims=True)
        out += _mix("bkntgp,bpkh->bkntgh", weights, prompt_v)
    return (out / total).astype(q.dtype).transpose(0, 2, 3, 1, 4, 5).reshape(B, n, T, N, H)


def _scores(equation: str, q: Array, k: Array) -> Array:
    return jnp.einsum(equation, q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5


def _mix(equation: str, weights: Array, v: Array) -> Array:
    return jnp.einsum(equation, weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
