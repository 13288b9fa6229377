"""Grouped-query attention as one softmax over several parts of keys: the plain XLA reference."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from listopd_jax.rounding import ceil_div

MASKED = -1e30  # finite: a masked score must give an exact zero probability and no NaN in any gradient
SAVED = "attention"  # the name of what the forward pass leaves for the backward pass
MOST_BLOCKS, LEAST_BLOCK = 4, 128  # of queries: four compute 5/8 of the scores, small products are slow


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
        """The part that every query sees: all but the padding."""
        valid = jnp.arange(self.k.shape[-1]) < self.lengths[:, None]
        return Part(self.k, self.v, valid[:, None, None])


def stored(
    k: Float[Array, "B n T KV H"], v: Float[Array, "B n T KV H"]
) -> tuple[Float[Array, "B n KV H T"], Float[Array, "B n KV T H"]]:
    """Keys and values of a layer in the order in which they are stored and read."""
    return k.transpose(0, 1, 3, 4, 2), v.transpose(0, 1, 3, 2, 4)


@jax.custom_vjp
def attention(q: Float[Array, "B n T N H"], parts: Sequence[Part]) -> Float[Array, "B n T N H"]:
    """Attention of each query to the visible keys of all `parts`; every query must see at least one key.

    The result is that of a softmax over the concatenated keys, but the parts stay apart and only share their maximum
    and their denominator: nothing is copied, shared keys and values are read once for all n·T queries, and nothing is
    repeated over heads or completions. Scores, softmax and accumulation are float32; the result has q's dtype.

    The backward pass starts from the result and each query's log Σ exp(score), named SAVED for remat policies: it
    computes scores and probabilities again, but no maximum, no sum and no mixture of values. There is no forward-mode
    derivative.
    """
    return _forward(q, parts)[0]


def _forward(q: Array, parts: Sequence[Part]) -> tuple[Array, tuple]:
    grouped = _by_kv_head(q, parts)
    tops, totals, outs = zip(*[_partial(grouped, part) for part in parts], strict=True)
    top = functools.reduce(jnp.maximum, tops)
    # As FlashAttention merges blocks: the sums of each part are rescaled to the common maximum.
    scales = [jnp.exp(t - top) for t in tops]
    total = sum(map(jnp.multiply, scales, totals))
    out = (sum(map(jnp.multiply, scales, outs)) / total).astype(q.dtype)
    lse, out = checkpoint_name(top + jnp.log(total), SAVED), checkpoint_name(_by_query(out), SAVED)
    return out, (q, parts, out, lse)


def _backward(residuals: tuple, d_out: Float[Array, "B n T N H"]) -> tuple[Array, Sequence[Part]]:
    """For each part P = exp(S - lse), dP = dO·Vᵀ and dS = P·(dP - Σ_h dO·O); from these dQ, dK, dV."""
    q, parts, out, lse = residuals
    grouped, d_out, out = (_by_kv_head(x, parts) for x in (q, d_out, out))
    # Σ_h dO·O equals Σ P·dP over the keys of all parts, so no part needs to see the others (FlashAttention-2).
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    d_q, d_parts = zip(*[_d_partial(grouped, part, lse, d_out, delta) for part in parts], strict=True)
    return _by_query(sum(d_q).astype(q.dtype)), type(parts)(d_parts)


attention.defvjp(_forward, _backward)


def causal(
    q: Float[Array, "B n T N H"],
    k: Float[Array, "B n T KV H"],
    v: Float[Array, "B n T KV H"],
    prompt: Prompt | None = None,
    starts: Int[Array, "B T"] | None = None,
) -> Float[Array, "B n T N H"]:
    """Token t of completion (b, i) attends to prompt b, if there is one, and to its own tokens up to t.

    Where several sequences share a row (n = 1, no prompt), `starts` is the place at which the sequence of each token
    begins, and a token attends to none before it.

    In blocks of queries, each against the keys up to its end: of the masked half of the scores most are not computed.
    """
    T, (k, v) = q.shape[2], stored(k, v)
    size = max(LEAST_BLOCK, ceil_div(T, MOST_BLOCKS))
    outs = []
    for start in range(0, T, size):
        end = min(start + size, T)
        visible = jnp.arange(end) <= jnp.arange(start, end)[:, None]
        own = Part(k[..., :end], v[..., :end, :], visible[None, None])
        if starts is not None:
            own = own._replace(mask=own.mask & (jnp.arange(end) >= starts[:, None, start:end, None]))
        outs.append(attention(q[:, :, start:end], [own] if prompt is None else [own, prompt.part()]))
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=2)


def _partial(q: Float[Array, "B n KV T G H"], part: Part) -> tuple[Array, Array, Array]:
    """The maximum m of a part's scores s, Σ exp(s-m) and Σ exp(s-m)·v, float32 [B,n,KV,T,G,1 or H]."""
    scores = _scores(q, part)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    # Probabilities meet the values in the values' dtype, as in fused kernels; their sum stays float32.
    out = _product("Rs,Ksh->Rh", part, weights.astype(part.v.dtype), part.v)
    return tuple(_swapped(part, x) for x in (top, weights.sum(-1, keepdims=True), out))


def _d_partial(q: Array, part: Part, lse: Array, d_out: Array, delta: Array) -> tuple[Array, Part]:
    """A part's share of d(queries) [B,n,KV,T,G,H], float32, and the gradient of its keys and values."""
    lse, d_out, delta, rows = (_swapped(part, x) for x in (lse, d_out, delta, q))
    weights = jnp.exp(_scores(q, part) - lse)
    d_weights = _product("Rh,Ksh->Rs", part, d_out, part.v)
    d_scores = (weights * (d_weights - delta) * q.shape[-1] ** -0.5).astype(q.dtype)
    d_v = _product("Rs,Rh->Ksh", part, weights.astype(d_out.dtype), d_out)
    d_k = _product("Rh,Rs->Khs", part, rows, d_scores)
    d_q = _swapped(part, _product("Rs,Khs->Rh", part, d_scores, part.k))
    # The mask is not differentiated: its gradient is None.
    return d_q, Part(d_k.astype(part.k.dtype), d_v.astype(part.v.dtype))


def _scores(q: Float[Array, "B n KV T G H"], part: Part) -> Array:
    """q·k/√H [B,n,KV,T,G,S] in the part's order of rows, MASKED where a query does not see a key."""
    scores = _product("Rh,Khs->Rs", part, _swapped(part, q), part.k) * q.shape[-1] ** -0.5
    if part.mask is None:
        return scores
    return jnp.where(jnp.expand_dims(part.mask, (1 if _shared(part) else 2, 4)), scores, MASKED)


def _product(letters: str, part: Part, *arrays: Array) -> Array:
    """An einsum of rows R and keys K, float32; the rows of completions that share keys are those of one product."""
    rows, keys = ("bkntg", "bk") if _shared(part) else ("bnktg", "bnk")
    letters = letters.replace("R", rows).replace("K", keys)
    return jnp.einsum(letters, *arrays, preferred_element_type=jnp.float32)


def _shared(part: Part) -> bool:
    return part.v.ndim == 4


def _swapped(part: Part, x: Array) -> Array:
    """Rows [B,n,KV,…] in the order in which the part is multiplied, [B,KV,n,…] if it is shared; or back."""
    return x.swapaxes(1, 2) if _shared(part) else x


def _by_kv_head(x: Float[Array, "B n T N H"], parts: Sequence[Part]) -> Float[Array, "B n KV T G H"]:
    # Query heads g·G to (g+1)·G − 1 share KV head g, as in the published checkpoints.
    B, n, T, _, H = x.shape
    return x.reshape(B, n, T, parts[0].k.shape[-3], -1, H).transpose(0, 1, 3, 2, 4, 5)


def _by_query(x: Float[Array, "B n KV T G H"]) -> Float[Array, "B n T N H"]:
    B, n, KV, T, G, H = x.shape
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, n, T, KV * G, H)
