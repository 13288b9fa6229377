"""The distribution of the next token, and a draw from it with random numbers that belong to its row."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from listopd_jax.ops.guard import Guard, guarded
from listopd_jax.ops.head import logits_of, slice_vocab
from listopd_jax.parallel.rules import constrain, is_split, shards
from listopd_jax.rounding import ceil_div, round_up

IMPOSSIBLE = -1e30  # finite: a block of impossible tokens alone must have a log-probability and no NaN
MANY_ROWS = 4096  # of a head; to move the logits of fewer between devices costs next to nothing
MOST_UNEVEN = (
    4  # tokens are padded only if the blocks that divide V are more than this many times fewer than √V
)


def mixed_logprobs(
    decoders: Sequence,
    hiddens: Sequence,
    weights: Float[Array, "B n #S m"],
    vocab: int,
    temperature,
    guard: Guard | None = None,
    state: Int[Array, "B n S"] | None = None,
    allowed: Bool[Array, "B n #S vocab"] | None = None,
) -> Float[Array, "B n S _"]:
    """log softmax(Σ_i w_i log π_i / temperature) for hidden states [B, n, S, D_i] of m decoders.

    Logits stand in for log π_i: they differ by a constant per row, which the softmax drops. With a guard the models are
    teacher and base, λ and 1 − λ their weights; `state` is of its grammar. What is not `allowed` has no probability,
    and the rest is renormalised. Over devices that share the vocabulary the result has all `head_rows`, of which those
    from `vocab` on are not tokens and have no probability either.
    """
    logits = [logits_of(h, d.head_weight()) for h, d in zip(hiddens, decoders, strict=True)]
    # Devices share a head's rows evenly; cut to the tokens, logits would be moved, and gathered for the draw. A guard
    # compares distributions over tokens alone, so under one they are cut all the same.
    width = head_rows(decoders) if is_split("vocab") and guard is None else vocab
    logits = [z if z.shape[-1] == width else slice_vocab(z, width) for z in logits]
    if guard is None:
        mixed = sum(weights[..., i, None] * z for i, z in enumerate(logits))
    else:
        mixed = guarded(*map(jax.nn.log_softmax, logits), weights[..., 0], guard, state).target
    # Last, since a guard compares the distributions at temperature 1.
    return jax.nn.log_softmax(_possible(mixed / temperature, vocab, allowed))


def head_rows(decoders: Sequence) -> int:
    """The rows that the heads of all `decoders` have: their tokens, and what pads them."""
    return min(d.head_weight().shape[0] for d in decoders)


def _possible(
    logits: Float[Array, "B n S V"], vocab: int, allowed: Bool[Array, "B n #S vocab"] | None
) -> Float[Array, "B n S V"]:
    """`logits`, IMPOSSIBLE from `vocab` on and where a token is not allowed."""
    beyond = logits.shape[-1] - vocab
    if allowed is not None:
        allowed = jnp.pad(allowed, [(0, 0)] * 3 + [(0, beyond)])
    elif beyond:
        allowed = jnp.arange(logits.shape[-1]) < vocab
    return logits if allowed is None else jnp.where(allowed, logits, IMPOSSIBLE)


def unpacked(bits: UInt32[Array, "*s W"], vocab: int) -> Bool[Array, "*s V"]:
    """The mask of `vocab` tokens that is packed 32 to a word, the first token in the lowest bit."""
    each = (bits[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return each.reshape(*bits.shape[:-1], -1)[..., :vocab] != 0


def row_keys(key: Array, place: Int[Array, "*#s"], rows: Int[Array, "*#s"]) -> Array:
    """A key for each row at a place in its text, by the row's own number: where the row is computed does not matter."""
    place, rows = jnp.broadcast_arrays(place, rows)
    of_place = jax.vmap(jax.random.fold_in, (None, 0))(key, place.reshape(-1))
    return jax.vmap(jax.random.fold_in)(of_place, rows.reshape(-1)).reshape(rows.shape)


def categorical(keys: Array, logp: Float[Array, "*s V"], rows: int = 0) -> Int[Array, "*s"]:
    """One draw per row of log-probabilities, row r with keys[r], in two exact stages: a block of tokens, then a token.

    A block is drawn by its total probability and a token by its share in the block, both by the Gumbel maximum. That
    takes about 2·√V random numbers per row where one maximum over all tokens takes V, which on a CPU cost more than a
    small model's decoding step. Tokens and draws are the same with and without the impossible tokens that pad them to
    `rows` (0: none do).
    """
    width = block_width(rows or logp.shape[-1])
    blocks = _blocks(logp, width)
    first, second = jax.vmap(jax.random.split, out_axes=1)(keys.reshape(-1))
    block = jax.vmap(jax.random.categorical)(first, jax.nn.logsumexp(blocks, -1))
    token = block * width + jax.vmap(jax.random.categorical)(second, _block_of(blocks, block))
    return token.reshape(keys.shape)


def block_width(rows: int) -> int:
    """Tokens of a block, about √rows, so that both stages of a draw take about as many numbers.

    A power of two where rows are few, or where that gives a multiple of four blocks, for devices to share. Else the
    number of blocks is the largest power of two up to √rows that divides them; or, where that is far below √rows, one
    near it, the last blocks padded. So with many rows each device has whole blocks.
    """
    near = 1 << (rows - 1).bit_length() // 2
    if rows < MANY_ROWS or rows % near == 0 and rows // near % 4 == 0:
        return near
    even = 1 << ((rows - 1).bit_length() + 1) // 2
    blocks = math.gcd(rows, even)
    return ceil_div(rows, even if even > MOST_UNEVEN * blocks else blocks)


def _blocks(logp: Float[Array, "*s V"], width: int) -> Float[Array, "R N W"]:
    """The rows of `logp`, flat, in blocks of `width`, equally many on each device; impossible tokens fill the last."""
    V = logp.shape[-1]
    N = round_up(ceil_div(V, width), shards("vocab"))
    missing = [(0, 0)] * (logp.ndim - 1) + [(0, N * width - V)]
    whole = jnp.pad(logp, missing, constant_values=IMPOSSIBLE)
    return constrain(whole.reshape(-1, N, width), "batch", "vocab", None)


def _block_of(blocks: Float[Array, "R N W"], block: Int[Array, " R"]) -> Float[Array, "R W"]:
    if is_split("vocab"):  # a sum, not a gather: only one block per row is sent
        return jnp.where((jnp.arange(blocks.shape[1]) == block[:, None])[..., None], blocks, 0).sum(1)
    return jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
