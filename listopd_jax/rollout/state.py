"""A rollout under way: its parts, and how they move when rows leave or the cache grows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from listopd_jax.models.decoder import KVCache
from listopd_jax.parallel.rules import CACHE, constrain
from listopd_jax.rounding import ceil_div, round_up


class Rollout(NamedTuple):
    """Completions and what the sampler knew of them."""

    tokens: Int[Array, "B n T"]  # pad id after the end
    logprobs: Float[
        Array, "B n T"
    ]  # log-probability under the distribution sampled from (greedy: at temperature 1)
    lengths: Int[Array, "B n"]  # tokens up to and with EOS, or the budget
    steps: Int[Array, "B n"] | None = None  # decode steps that wrote them, after the prefill


def trim(rollout: Rollout, budget: int) -> Rollout:
    """Cut after the longest completion, to quarters of `budget`: few shapes, so few compilations of the update."""
    size = min(budget, round_up(int(rollout.lengths.max()), ceil_div(budget, 4)))
    return rollout._replace(tokens=rollout.tokens[..., :size], logprobs=rollout.logprobs[..., :size])


class Rows(NamedTuple):
    """The state of each completion, which moves with it."""

    number: Int[Array, "B n"]  # its place b·n + j in the result, which also seeds its random numbers
    weights: Float[Array, "B n m"]
    budgets: Int[Array, "B n"]
    done: Bool[Array, "B n"]
    source: Int[Array, "B n"]  # where the next draft continues copying (rollout/draft.py)
    rollout: Rollout
    state: Int[Array, "B n"] | None = None  # in the sampler's grammar, where it has one
    allowed: UInt32[Array, "B n W"] | None = None  # tokens that may come next (decode.Masks)


class Prompts(NamedTuple):
    """The state that the completions of a prompt share."""

    lengths: Int[Array, " B"]
    hint: Int[Array, "B H"]  # what drafts are copied from
    caches: tuple[KVCache, ...]  # of each model


class State(NamedTuple):
    """Completions under way; the last token of each has not been read by any model."""

    caches: tuple[KVCache, ...]  # of each model, of the completions
    rows: Rows


def last_tokens(rows: Rows) -> Int[Array, "B n"]:
    """The last token of each row, which has one."""
    last = jnp.maximum(rows.rollout.lengths - 1, 0)[..., None]
    return jnp.take_along_axis(rows.rollout.tokens, last, axis=-1)[..., 0]


def longest(rows: Rows) -> Int[Array, ""]:
    """Tokens of the longest row that is not done."""
    return jnp.where(rows.done, 0, rows.rollout.lengths).max()


def alive(done: Bool[Array, "B n"]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Prompts with an unfinished completion, and the most of these that one prompt has."""
    left = (~done).sum(1)
    return (left > 0).sum(), left.max()


def fitting(shape: tuple[int, int], prompts: int, completions: int, least: int) -> tuple[int, int]:
    """(B, n), halved as often as the unfinished rows fit: n first, no further once it has `least` rows."""
    B, n = shape
    while B * n > least:
        # Completions first: that leaves the caches of the prompts as they are.
        if n > 1 and completions <= ceil_div(n, 2):
            n = ceil_div(n, 2)
        elif B > 1 and prompts <= ceil_div(B, 2):
            B = ceil_div(B, 2)
        else:
            break
    return B, n


def can_shrink(done: Bool[Array, "B n"], least: int) -> Bool[Array, ""]:
    """Whether `fitting` would give another shape."""
    B, n = done.shape
    if B * n <= least:
        # Known while tracing, so the loop does not even count rows.
        return jnp.bool_(False)
    prompts, completions = alive(done)
    return ((n > 1) & (completions <= ceil_div(n, 2))) | ((B > 1) & (prompts <= ceil_div(B, 2)))


def shrink(prompts: Prompts, state: State, shape: tuple[int, int]) -> tuple[Prompts, State]:
    """The rows that are not done, and as many done ones as fill `shape`; the caches given are freed."""
    B = len(prompts.lengths)
    rows, b, j = _select(state.rows, shape)
    state = State(jax.tree.map(lambda x: _freed(_take_rows(x, b, j), x), state.caches), rows)
    if shape[0] < B:
        caches = jax.tree.map(lambda x: _freed(_take_prompts(x, b), x), prompts.caches)
        prompts = Prompts(prompts.lengths[b], prompts.hint[b], caches)
    return prompts, state


def grow(state: State, capacity: int) -> State:
    """The caches with room for `capacity` tokens per completion; those given are freed one by one."""
    longer = (
        # Keys are stored [..., H, C] and values [..., C, H].
        KVCache(_freed(_pad(c.k, -1, capacity), c.k), _freed(_pad(c.v, -2, capacity), c.v))
        for c in state.caches
    )
    return state._replace(caches=tuple(longer))


def put_back(out: Rollout, rows: Rows) -> Rollout:
    """`out`, of all rows in their places, with what `rows` have written."""
    return _put_back(out, rows.number.reshape(-1), rows.rollout)


@jax.jit(static_argnames="shape")
def _select(rows: Rows, shape: tuple[int, int]) -> tuple[Rows, Array, Array]:
    """Rows (b[i], j[i, k]): unfinished prompts first, in each the unfinished completions first."""
    B, n = rows.done.shape
    b, j = jnp.arange(B), jnp.broadcast_to(jnp.arange(n), (B, n))
    if shape[0] < B:
        # False sorts before True, and the sort is stable: unfinished rows first, in their old order.
        b = jnp.argsort(rows.done.all(1))[: shape[0]]
    if shape[1] < n:
        j = jnp.argsort(rows.done, axis=1)[:, : shape[1]]
    j = j[b]
    return jax.tree.map(lambda x: x[b[:, None], j], rows), b, j


@jax.jit
def _take_rows(x: Array, b: Array, j: Array) -> Array:
    return x[:, b[:, None], j]


@jax.jit
def _take_prompts(x: Array, b: Array) -> Array:
    return x[:, b]


@jax.jit(static_argnames=("axis", "capacity"))
def _pad(x: Array, axis: int, capacity: int) -> Array:
    room = [(0, 0)] * x.ndim
    room[axis] = (0, capacity - x.shape[axis])
    return constrain(jnp.pad(x, room), *CACHE[x.ndim])


@jax.jit(donate_argnames="out")
def _put_back(out: Rollout, number: Array, written: Rollout) -> Rollout:
    def put(full, part):
        # By number, not by position: rows may have been reordered several times.
        flat = full.reshape(-1, *full.shape[2:])
        return flat.at[number].set(part.reshape(-1, *part.shape[2:])).reshape(full.shape)

    return jax.tree.map(put, out, written)


def _freed(new: Array, old: Array) -> Array:
    """`new`, computed from `old`, which is no longer needed: two whole caches never exist together."""
    old.delete()
    return new
