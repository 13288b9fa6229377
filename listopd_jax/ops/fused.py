"""A loss over logits that never exist as a whole: value, extras and both gradients in one pass over chunks of rows.

The head's product is the largest array of a language model's loss, [tokens, vocabulary]. Ordinary differentiation
stores it, or computes it twice (8·N·D·V FLOPs). Here the gradient with respect to a chunk's logits is known as soon as
the chunk's loss is, so it is multiplied into d(hidden) and d(head) at once and dropped: 6·N·D·V FLOPs, logits of one
chunk alive at a time, the head's gradient summed in float32 whatever the inputs' dtype.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from listopd_jax.ops.head import logits_of, slice_vocab
from listopd_jax.parallel.rules import constrain, from_chunks, row_multiple, to_chunks

Loss = Callable[[Float[Array, "c vocab"], Any, Any], tuple[Float[Array, ""], Any]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def fused_loss(
    f: Loss,
    vocab: int,
    chunk: int,
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    rows: Any,
    shared: Any,
) -> tuple[Float[Array, ""], Any]:
    """(Σ loss, extras [N, …]) of `f` over the rows of hidden·headᵀ; differentiable in `hidden` and `head` only.

    Args:
      f: (logits [c, vocab] float32, rows [c, …], shared) → (sum of the chunk's losses, extras [c, …]); traceable. The
        last chunk is filled with rows of zeros, whose loss must be 0: give every row a weight.
      vocab: tokens that exist; further rows of the head are padding and get a zero gradient.
      chunk: rows (over many devices: of each that holds rows) whose logits exist at one time.
      rows: pytree of [N, …] constants, cut like `hidden`. shared: pytree of constants that every chunk sees whole.
    """
    head = head.astype(hidden.dtype)

    def one(loss, xs):
        part, extras = f(slice_vocab(logits_of(xs[0], head), vocab), xs[1], shared)
        return loss + part, extras

    loss, extras = jax.lax.scan(one, jnp.float32(0), _chunks((hidden, rows), chunk))
    return loss, _unchunk(extras, len(hidden))


def _forward(f, vocab, chunk, hidden, head, rows, shared):
    cast = head.astype(hidden.dtype)

    def one(carry, xs):
        loss, d_head = carry
        # The slice is differentiated too, which gives padding rows of the head a zero gradient.
        part, pull, extras = jax.vjp(
            lambda z: f(slice_vocab(z, vocab), xs[1], shared), logits_of(xs[0], cast), has_aux=True
        )
        # Products run in the activations' dtype; the head's gradient adds up over chunks in float32.
        d_logits = pull(jnp.ones_like(part))[0].astype(hidden.dtype)
        d_head = constrain(d_head + _products(d_logits, xs[0], len(d_head)), "batch", "vocab", "hidden")
        return (loss + part, d_head), (d_logits @ cast, extras)

    # A sum of its own on every device that holds rows: one reduction over devices at the end, not one per chunk.
    shards = row_multiple() if len(hidden) % row_multiple() == 0 else 1
    zero = constrain(jnp.zeros((shards, *head.shape), jnp.float32), "batch", "vocab", "hidden")
    chunks = _chunks((hidden, rows), chunk)
    (loss, d_head), (d_hidden, extras) = jax.lax.scan(one, (jnp.float32(0), zero), chunks)
    n = len(hidden)
    return (loss, _unchunk(extras, n)), (_unchunk(d_hidden, n), d_head.sum(0).astype(head.dtype))


def _backward(f, vocab, chunk, gradients, cotangents):
    scale, _ = cotangents  # extras are constants
    # The loss is a scalar: both gradients were computed forward and only need its cotangent as a factor.
    d_hidden, d_head = ((scale * g).astype(g.dtype) for g in gradients)
    return d_hidden, d_head, None, None


fused_loss.defvjp(_forward, _backward)


def _products(
    d_logits: Float[Array, "c V"], hidden: Float[Array, "c D"], shards: int
) -> Float[Array, "shards V D"]:
    """d(head) of a chunk's rows, apart for the rows of each device."""
    d_logits, hidden = (x.reshape(shards, -1, x.shape[-1]) for x in (d_logits, hidden))
    return jnp.einsum("scv,scd->svd", d_logits, hidden, preferred_element_type=jnp.float32)


def _chunks(tree: Any, chunk: int) -> Any:
    return jax.tree.map(lambda x: to_chunks(x, chunk), tree)


def _unchunk(tree: Any, n: int) -> Any:
    return jax.tree.map(lambda x: from_chunks(x, n), tree)
