"""From hidden states to log-probabilities over the tokens that exist, a chunk of positions at a time.

Only completion positions meet the head, and logits of at most `chunk` positions exist at one time, forward or
backward. `vocab` is the tokenizer's size: models pad their vocabulary differently (151,936 against 152,064 for
Qwen), so every distribution here is over the first `vocab` rows of the head, for student, teacher and base alike.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from listopd_jax.parallel.rules import constrain_logits, from_chunks, is_split, to_chunks


def logits_of(hidden: Float[Array, "*s D"], head: Float[Array, "V D"]) -> Float[Array, "*s V"]:
    """hidden·headᵀ in hidden's dtype, float32 accumulation and output."""
    logits = jnp.einsum(
        "...d,vd->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    return constrain_logits(logits)


def slice_vocab(logits: Float[Array, "*s V"], vocab: int) -> Float[Array, "*s vocab"]:
    """Logits of the tokens that exist. The head itself is not cut: it would be copied for every chunk and token."""
    return constrain_logits(logits[..., :vocab])


def log_distribution(
    hidden: Float[Array, "*s D"], head: Float[Array, "V D"], vocab: int
) -> Float[Array, "*s vocab"]:
    """log softmax of hidden·headᵀ over the first `vocab` tokens; float32 accumulation and output."""
    return jax.nn.log_softmax(slice_vocab(logits_of(hidden, head), vocab))


def take_token(logp: Float[Array, "*s V"], tokens: Int[Array, "*s"]) -> Float[Array, "*s"]:
    """The entry of each row of `logp` that `tokens` names."""
    if is_split("vocab"):  # a gather would first collect the whole rows on every device
        return _only_token(logp, tokens).sum(-1)
    return _gathered(logp, tokens)


@jax.custom_jvp
def _gathered(logp: Float[Array, "*s V"], tokens: Int[Array, "*s"]) -> Float[Array, "*s"]:
    return jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0]


@_gathered.defjvp
def _gathered_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    """The gradient is a selection, which is computed with what follows; a gather's is a scatter, a pass of its own."""
    return _gathered(*primals), _only_token(tangents[0], primals[1]).sum(-1)


def _only_token(x: Float[Array, "*s V"], tokens: Int[Array, "*s"]) -> Float[Array, "*s V"]:
    # A comparison with an iota fuses into what reads it; no one-hot array is stored.
    return jnp.where(jnp.arange(x.shape[-1]) == tokens[..., None], x, 0)


def entropy_of(logp: Float[Array, "*s V"]) -> Float[Array, "*s"]:
    """Entropy in nats of each row of log-probabilities."""
    return -(jnp.exp(logp) * logp).sum(-1)


def map_positions(f: Callable[..., Any], arrays: Any, chunk: int) -> Any:
    """`f` over the leading axis N of every array in `arrays`, `chunk` rows at a time, recomputed in the backward pass.

    Over many devices, `chunk` rows of each device that holds rows.
    `f(rows)` maps a pytree of [chunk, …] to a pytree of [chunk, …]; the result has leading axis N.
    """
    n = jax.tree.leaves(arrays)[0].shape[0]
    out = jax.lax.map(jax.checkpoint(f), jax.tree.map(lambda x: to_chunks(x, chunk), arrays))
    return jax.tree.map(lambda x: from_chunks(x, n), out)


def token_logprobs(
    hidden: Float[Array, "*s D"], head: Float[Array, "V D"], tokens: Int[Array, "*s"], vocab: int, chunk: int
) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """log π(token) and the entropy of π at each position, float32, differentiable."""

    head = head.astype(hidden.dtype)  # once, not in every chunk

    def rows(xs):
        logp = log_distribution(xs[0], head, vocab)
        return take_token(logp, xs[1]), entropy_of(logp)

    flat = (hidden.reshape(-1, hidden.shape[-1]), tokens.reshape(-1))
    logprob, entropy = map_positions(rows, flat, chunk)
    return logprob.reshape(tokens.shape), entropy.reshape(tokens.shape)
