"""Grouped-query attention as one softmax over several parts of keys: the plain XLA reference."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # finite: a masked score must give an exact zero probability and no NaN in any gradient
MOST_BLOCKS, LEAST_BLOCK = 4, 256  # of queries: four compute 5/8 of the scores, small products are slow


class Part(NamedTuple):
    """Some of the keys that the queries [B,n,T,N,H] see, with their values.

    k, v: [B,KV,H,S] and [B,KV,S,H], shared by the n completions, or [B,n,KV,H,S] and [B,n,KV,S,H], each its own: so
        both products of attention read them as they lie, head by head, without a transposed copy.
    mask: bool, broadcastable to [B,n,T,S], which key a query sees; None: all.
    """

    k: Array
    v: Array
    mask: Bool[Array, "#B #n #T S"] | None = None


class Prompt(NamedTuple):
    """Keys and values of prompts, right-padded, shared by all completions of each."""

    k: Float[Array, "B KV H P"]
    v: Float[Array, "B KV P H"]
    lengths: Int[Array, " B"]

    def part(self) -> Part:
        """What every query sees of it: all but the padding."""
        valid = jnp.arange(self.k.shape[-1]) < self.lengths[:, None]
        return Part(self.k, self.v, valid[:, None, None])


def stored(
    k: Float[Array, "B n T KV H"], v: Float[Array, "B n T KV H"]
) -> tuple[Float[Array, "B n KV H T"], Float[Array, "B n KV T H"]]:
    """Keys and values of a layer in the order in which they are stored and read."""
    return k.transpose(0, 1, 3, 4, 2), v.transpose(0, 1, 3, 2, 4)


def attention(q: Float[Array, "B n T N H"], parts: Sequence[Part]) -> Float[Array, "B n T N H"]:
    """Attention of each query to the visible keys of all `parts`; every query must see at least one key.

    The result is that of a softmax over the concatenated keys, but the parts stay apart and only share their maximum
    and their denominator: nothing is copied, shared keys and values are read once for all n·T queries, and nothing is
    repeated over heads or completions. Scores, softmax and accumulation are float32; the result has q's dtype.
    """
    B, n, T, N, H = q.shape
    q = q.reshape(B, n, T, parts[0].k.shape[-3], -1, H).transpose(0, 1, 3, 2, 4, 5)
    tops, totals, outs = zip(*[_partial(q, part) for part in parts], strict=True)
    scales = [jnp.exp(top - functools.reduce(jnp.maximum, tops)) for top in tops]
    out = sum(map(jnp.multiply, scales, outs)) / sum(map(jnp.multiply, scales, totals))
    return out.astype(q.dtype).transpose(0, 1, 3, 2, 4, 5).reshape(B, n, T, N, H)


def causal(
    q: Float[Array, "B n T N H"],
    k: Float[Array, "B n T KV H"],
    v: Float[Array, "B n T KV H"],
    prompt: Prompt | None = None,
) -> Float[Array, "B n T N H"]:
    """Token t of completion (b, i) attends to prompt b, if there is one, and to its own tokens up to t.

    In blocks of queries, each against the keys up to its end: of the masked half of the scores most are not computed.
    """
    T, (k, v) = q.shape[2], stored(k, v)
    size = max(LEAST_BLOCK, -(-T // MOST_BLOCKS))
    outs = []
    for start in range(0, T, size):
        end = min(start + size, T)
        visible = jnp.arange(end) <= jnp.arange(start, end)[:, None]
        own = Part(k[..., :end], v[..., :end, :], visible[None, None])
        outs.append(attention(q[:, :, start:end], [own] if prompt is None else [own, prompt.part()]))
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=2)


def _partial(q: Float[Array, "B n KV T G H"], part: Part) -> tuple[Array, Array, Array]:
    """The maximum m of a part's scores s, Σ exp(s-m) and Σ exp(s-m)·v, float32 [B,n,KV,T,G,1 or H]."""
    if part.v.ndim == 5:
        return _visible(q, part, "bnktgh,bnkhs->bnktgs", "bnktgs,bnksh->bnktgh", heads=2)
    # The rows of all completions are those of one product: one reading of the keys for all of them.
    found = _visible(q.swapaxes(1, 2), part, "bkntgh,bkhs->bkntgs", "bkntgs,bksh->bkntgh", heads=1)
    return tuple(x.swapaxes(1, 2) for x in found)


def _visible(q: Array, part: Part, scores_of: str, mix: str, heads: int) -> tuple[Array, Array, Array]:
    """`_partial` by the two products; the KV heads are axis `heads` of q."""
    scores = jnp.einsum(scores_of, q, part.k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if part.mask is not None:
        scores = jnp.where(jnp.expand_dims(part.mask, (heads, 4)), scores, MASKED)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - top)
    out = jnp.einsum(mix, weights.astype(part.v.dtype), part.v, preferred_element_type=jnp.float32)
    return top, weights.sum(-1, keepdims=True), out
