"""Attention of a decode step on a TPU: a Pallas kernel that reads each key and value once, for all queries of its head.

XLA's form (`ops.attention.attention`) makes three parts of the keys, for prompt, cache and new tokens, and of each
part two products of a few query rows per head, at 34 to 42 % of the bandwidth of a v5p, with many small
programs between them (docs/planner.md). Here the stacks of all layers stay where they are: the kernel takes the rows
of its layer itself. There is no gradient.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from listopd_jax.rounding import round_up

# Of keys and values in fast memory at one time, twice. A block has an overhead of about 0.35 µs.
BLOCK_BYTES = 4 * 2**20
# What `fits` may count; the compiler needs about two thirds of it. Per core a v4 has 16 MiB, a v5p 64, v5e and v6e 128.
FAST_BYTES = 24 * 2**20
SUBLANES, LANES = 8, 128  # of a tile
MASKED = -1e30  # as in ops/attention.py


def fits(q: Float[Array, "B n S N H"], prompt_v: Array, cache_v: Array) -> bool:
    """Whether a block's keys and values, its scores and what comes of them fit in fast memory."""
    _, n, S, N, H = q.shape
    tokens = _tokens(prompt_v, cache_v)
    rows = round_up(n * S * (N // prompt_v.shape[2]), SUBLANES)
    kept = 2 * max(BLOCK_BYTES, _bytes(tokens, H, q.dtype))
    # Scores and exponentials in float32, and these in the values' dtype; one product with values per part.
    scores = rows * tokens * (4 + 4 + q.dtype.itemsize)
    mixed = rows * round_up(H, LANES) * 4 * (n + 2)
    return kept + scores + mixed <= FAST_BYTES


def decode_attention(
    q: Float[Array, "B n S N H"],
    k: Float[Array, "B n S KV H"],
    v: Float[Array, "B n S KV H"],
    prompt_k: Float[Array, "L B KV H P"],
    prompt_v: Float[Array, "L B KV P H"],
    cache_k: Float[Array, "L B n KV H C"],
    cache_v: Float[Array, "L B n KV C H"],
    lengths: Int[Array, " B"],
    cached: Int[Array, "B n"],
    layer: Int[Array, ""],
) -> Float[Array, "B n S N H"]:
    """Attention of S new tokens to `lengths` tokens of the prompt, `cached` of their completion, and each other.

    k, v: of the new tokens, each of which sees those up to itself. Scores, softmax and sums are float32.
    """
    B, n, S, N, H = q.shape
    KV = k.shape[3]
    R = n * S * (N // KV)
    of_head = _bytes(_tokens(prompt_v, cache_v), H, q.dtype)
    heads = _most(KV, BLOCK_BYTES // of_head)
    rows = _most(B, BLOCK_BYTES // (heads * of_head))

    def of_layer(*shape):
        at = (0,) * (len(shape) - 3)  # the axis of completions, where there is one
        return pl.BlockSpec((None, rows, *shape), lambda b, h, layer, *_: (layer[0], b, *at, h, 0, 0))

    def of_step(*shape):
        return pl.BlockSpec((rows, heads, *shape), lambda b, h, *_: (b, h, 0, 0))

    stacks, swapped = zip(*map(_as_laid, (prompt_k, prompt_v, cache_k, cache_v)), strict=True)
    # Queries that share a head of keys, of all completions, are rows of one product.
    grouped = q.reshape(B, n, S, KV, -1, H).transpose(0, 3, 1, 2, 4, 5).reshape(B, KV, R, H)
    new = (x.transpose(0, 3, 1, 2, 4).reshape(B, KV, n * S, H) for x in (k, v))
    out = pl.pallas_call(
        functools.partial(_kernel, tokens=S, group=N // KV, swapped=swapped),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B // rows, KV // heads),
            in_specs=[
                of_step(R, H), *[of_step(n * S, H)] * 2, *(of_layer(heads, *x.shape[3:]) for x in stacks[:2]),
                *(of_layer(n, heads, *x.shape[4:]) for x in stacks[2:]),
            ],
            out_specs=of_step(R, H),
        ),
        out_shape=jax.ShapeDtypeStruct(grouped.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=FAST_BYTES
        ),
    )(
        layer[None], lengths, cached.reshape(-1), grouped, *new, *stacks
    )  # fmt: skip
    return out.reshape(B, KV, n, S, -1, H).transpose(0, 2, 3, 1, 4, 5).reshape(q.shape)


def _tokens(prompt_v: Array, cache_v: Array) -> int:
    """How many tokens the completions of a prompt read: the prompt's, once, and the room for their own."""
    return prompt_v.shape[3] + math.prod(cache_v.shape[2:5:2])


def _bytes(tokens: int, head_dim: int, dtype: jnp.dtype) -> int:
    """Bytes of a head's keys and values in fast memory, which has rows of 128."""
    return 2 * tokens * round_up(head_dim, LANES) * jnp.dtype(dtype).itemsize


def _most(size: int, room: int) -> int:
    """The largest divisor of `size` that is at most `room`, at least 1."""
    return next(d for d in range(size, 0, -1) if size % d == 0 and d <= max(1, room))


def _as_laid(x: Float[Array, "*r X Y"]) -> tuple[Array, bool]:
    """x with its last two axes in the order in which a TPU keeps them, so that nothing is copied, and if they moved.

    Memory has tiles of 8 x 128. The compiler takes the order that needs fewer of them, by default the one written.
    Where no axis is a multiple of 8, as in a cache of an odd budget, it may take a third one, and copies.
    """

    def padded(rows, lanes):
        return round_up(rows, SUBLANES) * round_up(lanes, LANES)

    swapped = padded(*x.shape[:-3:-1]) < padded(*x.shape[-2:])
    return (x.swapaxes(-1, -2) if swapped else x), swapped


def _keys(x: Float[Array, "S H"]) -> Float[Array, "Z H"]:
    """At least a tile: a product with a single key does not compile. No query sees what comes after its own key."""
    return jnp.broadcast_to(x, (SUBLANES, x.shape[1])) if len(x) == 1 else x


def _kernel(
    layer, lengths, cached, q, k, v, prompt_k, prompt_v, cache_k, cache_v, out, *, tokens, group, swapped
):
    """The softmax of each row over all its keys, for every prompt and head of the block."""
    n, first = cache_k.shape[1], pl.program_id(0) * len(q)
    # The axis of each part that is summed over: head_dim of the keys, tokens of the values.
    k_axes, v_axes = ([swapped[i], *[swapped[2 + i]] * n, i == 0] for i in range(2))
    div = jax.lax.div  # of what is not negative; // compiles only where a TPU is attached

    def prompt_row(b, _):
        def own(i):
            return lambda row, column: (
                (div(row, tokens * group) == i) & (column < cached[(first + b) * n + i])
            )

        seen = [
            lambda row, column: column < lengths[first + b],
            *map(own, range(n)),
            # Both are new tokens: of one completion, and the key not after the query.
            lambda row, column: (
                (column <= div(row, group)) & (div(column, tokens) == div(row, tokens * group))
            ),
        ]
        for h in range(q.shape[1]):
            keys = [prompt_k[b, h], *(cache_k[b, i, h] for i in range(n)), _keys(k[b, h])]
            values = [prompt_v[b, h], *(cache_v[b, i, h] for i in range(n)), _keys(v[b, h])]
            scores = map(_scores, [q[b, h]] * len(keys), keys, k_axes, seen)
            out[b, h] = _mixture(list(scores), values, v_axes).astype(out.dtype)
        return _

    jax.lax.fori_loop(0, len(q), prompt_row, 0)


def _scores(q: Float[Array, "R H"], k: Array, axis: int, seen: Callable) -> Float[Array, "R S"]:
    """q·k/√H, MASKED where `seen` says no; `axis` of k is H."""
    scores = _product(q, k, axis) * q.shape[1] ** -0.5
    row, column = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
    return jnp.where(seen(row, column), scores, MASKED)


def _mixture(scores: list[Array], values: list[Array], axes: list[int]) -> Float[Array, "R H"]:
    """Σ softmax(scores)·values over all parts; `axes` of the values are the tokens."""
    top = functools.reduce(jnp.maximum, (s.max(1, keepdims=True) for s in scores))
    weights = [jnp.exp(s - top) for s in scores]
    total = sum(w.sum(1, keepdims=True) for w in weights)
    mixed = (_product(w.astype(x.dtype), x, axis) for w, x, axis in zip(weights, values, axes, strict=True))
    return sum(mixed) / total


def _product(x: Float[Array, "R C"], y: Array, axis: int) -> Float[Array, "R D"]:
    """Sums over axis 1 of x and `axis` of y, float32."""
    return jax.lax.dot_general(x, y, (((1,), (int(axis),)), ((), ())), preferred_element_type=jnp.float32)
