"""Decoding: one prefill a prompt, then jitted loops that write n completions a prompt until all have ended.

The next token comes from Σ_i w_i log π_i over one or more models: one model with weight 1 is ordinary sampling;
teacher and base with weights λ and 1−λ decode from the extrapolated target π_B(π_T/π_B)^λ without training
(*forecast*, docs/theory.md). The n completions of a prompt may each have weights of their own, so a whole grid of λ
shares one prompt cache.

`decode` is one program with a cache of the whole budget. `generate` writes the same in segments: the cache grows with
the completions, and rows that have ended leave the batch. The host reads three numbers after each segment and nothing
in between. A row's random numbers are its own, so where it is computed does not change what it says.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from listopd_jax.models.decoder import Decoder
from listopd_jax.ops.head import take_token
from listopd_jax.parallel.compiler import ROLLOUT, BackendJit
from listopd_jax.parallel.rules import constrain, context_mesh
from listopd_jax.rollout.sampling import categorical, mixed_logprobs, row_keys
from listopd_jax.rollout.state import (
    Prompts,
    Rollout,
    Rows,
    State,
    alive,
    can_shrink,
    fitting,
    grow,
    put_back,
    shrink,
)

LEAST_ROWS = 8  # fewer cost hardly less, and each shape is one more program to compile
LEAST_PARAMETERS = 1_000_000  # a smaller model's steps cost less than those programs
LEAST_CAPACITY = 64  # tokens; a shorter cache is not worth a program


class Settings(NamedTuple):
    """The static options of a rollout."""

    max_tokens: int  # at least 1
    vocab: int
    eos: int
    pad: int
    greedy: bool = False


def completion_mask(lengths: Int[Array, "*s"], size: int) -> Bool[Array, "*s T"]:
    """True at the first `lengths` of `size` positions: every completion token and its EOS, nothing after it."""
    return jnp.arange(size) < lengths[..., None]


# --- one token, one segment, one rollout: traceable ---


def start(
    decoders: Sequence[Decoder],
    weights: Float[Array, "m n"],
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    key: Array,
    temperature: Float[Array, ""],
    budgets: Int[Array, "B n"] | None,
    settings: Settings,
    capacity: int,
) -> tuple[Prompts, State]:
    """Read the prompts and write the first token of every completion; caches for `capacity` tokens."""
    shape, T = (prompts.shape[0], weights.shape[1]), settings.max_tokens
    budgets = jnp.full(shape, T) if budgets is None else jnp.minimum(budgets, T)
    last, caches = zip(*(d.prefill(prompts, prompt_lengths) for d in decoders), strict=True)
    empty = Rollout(
        constrain(jnp.full((*shape, T), settings.pad, jnp.int32), "batch", None, None),
        constrain(jnp.zeros((*shape, T)), "batch", None, None),
        constrain(jnp.zeros(shape, jnp.int32), "batch", None),
    )
    number = constrain(jnp.arange(shape[0] * shape[1]).reshape(shape), "batch", None)
    each = constrain(jnp.broadcast_to(weights.T, (*shape, len(decoders))), "batch", None, None)
    rows = Rows(number, each, budgets, constrain(budgets <= 0, "batch", None), empty)
    hiddens = [jnp.broadcast_to(h[:, None], (*shape, h.shape[-1])) for h in last]
    rows = write(decoders, hiddens, rows, jnp.int32(0), key, temperature, settings)
    own = tuple(d.init_cache(*shape, capacity) for d in decoders)
    return Prompts(prompt_lengths, caches), State(jnp.int32(1), own, rows)


def write(
    decoders: Sequence[Decoder],
    hiddens: Sequence[Float[Array, "B n D"]],
    rows: Rows,
    step: Int[Array, ""],
    key: Array,
    temperature: Float[Array, ""],
    settings: Settings,
) -> Rows:
    """Token `step` of every row that is not done, from the models' states before it."""
    greedy = settings.greedy
    logp = mixed_logprobs(decoders, hiddens, rows.weights, settings.vocab, 1.0 if greedy else temperature)
    chosen = jnp.argmax(logp, -1) if greedy else categorical(row_keys(key, step, rows.number), logp)
    token = jnp.where(rows.done, settings.pad, chosen).astype(jnp.int32)
    tokens, logprobs, lengths = rows.rollout
    rollout = Rollout(
        tokens.at[..., step].set(token),
        logprobs.at[..., step].set(jnp.where(rows.done, 0.0, take_token(logp, token))),
        lengths + ~rows.done,
    )
    done = rows.done | (token == settings.eos) | (rollout.lengths >= rows.budgets)
    return rows._replace(done=done, rollout=rollout)


def proceed(
    decoders: Sequence[Decoder],
    prompts: Prompts,
    state: State,
    key: Array,
    temperature: Float[Array, ""],
    settings: Settings,
    until: int,
    least: int,
) -> State:
    """Write up to `until` tokens a row; stops early once all are done, or a smaller batch would do (`can_shrink`)."""

    def body(state):
        token = jax.lax.dynamic_index_in_dim(
            state.rows.rollout.tokens, state.step - 1, axis=-1, keepdims=False
        )
        read = [
            d.decode_step(shared, prompts.lengths, own, state.step - 1, token)
            for d, shared, own in zip(decoders, prompts.caches, state.caches, strict=True)
        ]
        hiddens, caches = zip(*read, strict=True)
        rows = write(decoders, hiddens, state.rows, state.step, key, temperature, settings)
        return State(state.step + 1, caches, rows)

    def unfinished(state):
        done = state.rows.done
        return (state.step < until) & ~done.all() & ~can_shrink(done, least)

    return jax.lax.while_loop(unfinished, body, state)


def decode(
    decoders: Sequence[Decoder],
    weights: Float[Array, "m n"],
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    key: Array,
    *,
    temperature: float | Float[Array, ""] = 1.0,
    budgets: Int[Array, "B n"] | None = None,
    **settings: Any,
) -> Rollout:
    """Write n completions for each prompt; stops early once every row has ended or spent its budget.

    `settings` (static): `max_tokens`, `vocab`, `eos`, `pad` and `greedy`. `budgets` (default `max_tokens`) bounds each
    row. Row (b, j) of the result is a completion of prompt b under the mixture weights[:, j].
    """
    settings = Settings(**settings)
    T = settings.max_tokens
    shared, state = start(
        decoders, weights, prompts, prompt_lengths, key, temperature, budgets, settings, capacity=T
    )
    state = proceed(decoders, shared, state, key, temperature, settings, until=T, least=state.rows.done.size)
    return state.rows.rollout


# --- the programs, and the host that runs them ---


@functools.partial(BackendJit, options=ROLLOUT, static_argnames=("graphdefs", "settings", "capacity"))
def first_segment(
    graphdefs, params, weights, prompts, prompt_lengths, key, temperature, budgets, settings, capacity
):
    """`start`, compiled."""
    decoders = _decoders(graphdefs, params)
    return start(decoders, weights, prompts, prompt_lengths, key, temperature, budgets, settings, capacity)


@functools.partial(
    BackendJit, options=ROLLOUT, static_argnames=("graphdefs", "settings", "least"), donate_argnames="state"
)
def segment(
    graphdefs, params, prompts: Prompts, state: State, key, temperature, settings: Settings, least: int
) -> tuple[State, Int[Array, " 3"]]:
    """`proceed` while the cache has room, compiled; and what the host must know: step, and what is `alive`."""
    until = min(settings.max_tokens, state.caches[0].capacity + 1)  # the last token written is not yet cached
    state = proceed(_decoders(graphdefs, params), prompts, state, key, temperature, settings, until, least)
    return state, constrain(jnp.stack([state.step, *alive(state.rows.done)]), None)


def _decoders(graphdefs, params) -> list[Decoder]:
    return [nnx.merge(g, p) for g, p in zip(graphdefs, params, strict=True)]


def capacities(max_tokens: int) -> list[int]:
    """Sizes that the cache of the completions takes in turn: quarters of the budget, none below LEAST_CAPACITY.

    Each is a program to compile; with four, a step reads 1.25 times the keys that there are by the end of the budget.
    """
    part = max(LEAST_CAPACITY, -(-max_tokens // 4))
    return [*range(part, max_tokens, part), max_tokens]


def generate(
    graphdefs: tuple[nnx.GraphDef, ...],
    params: tuple[Any, ...],
    weights: Float[Array, "m n"],
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    key: Array,
    *,
    temperature: float | Float[Array, ""] = 1.0,
    budgets: Int[Array, "B n"] | None = None,
    **settings: Any,
) -> Rollout:
    """What `decode` writes, by few compiled programs in turn, shared by every λ, seed and evaluation.

    After a segment the cache grows if it is full, and the batch is halved, in prompts or in completions a prompt, as
    often as the unfinished rows fit: a row that is done costs its share of each step until then and nothing after.
    Over a mesh rows stay on their devices, and nothing shrinks, nor does it for models so small that the programs
    would cost more to compile than they save. Not traceable: the host looks at lengths.
    """
    settings = Settings(**settings)
    shape = (len(prompts), weights.shape[1])
    shrinks = context_mesh() is None and sum(x.size for x in jax.tree.leaves(params)) >= LEAST_PARAMETERS
    least = LEAST_ROWS if shrinks else shape[0] * shape[1]
    temperature, sizes = jnp.float32(temperature), capacities(settings.max_tokens)
    shared, state = first_segment(
        graphdefs, params, weights, prompts, prompt_lengths, key, temperature, budgets, settings, sizes[0]
    )
    out = None  # rows that have left, once there are any
    while True:
        state, seen = segment(graphdefs, params, shared, state, key, temperature, settings, least)
        step, prompts_left, most = np.asarray(seen).tolist()
        if step == settings.max_tokens or not most:
            return state.rows.rollout if out is None else put_back(out, state.rows)
        smaller = fitting(shape, prompts_left, most, least)
        if smaller != shape:
            out = state.rows.rollout if out is None else put_back(out, state.rows)
            shape, (shared, state) = smaller, shrink(shared, state, smaller)
        if step > (size := state.caches[0].capacity):
            state = grow(state, min(s for s in sizes if s > size))


@functools.partial(jax.jit, static_argnames=("graphdef", "max_tokens", "vocab", "eos", "pad", "greedy"))
def generate_grid(
    graphdef: nnx.GraphDef,
    params: Any,
    weights: Float[Array, "1 n"],
    prompts: Int[Array, "G B P"],
    prompt_lengths: Int[Array, "G B"],
    keys: Array,
    **options: Any,
) -> Rollout:
    """`decode` for G students at once, each with its own prompts and key: Rollout of [G, B, n, …].

    Every leaf of `params` has the leading axis G, split along the mesh's `grid`. A student whose rows have all ended
    waits for the others.
    """

    def one(params, prompts, lengths, key):
        return decode([nnx.merge(graphdef, params)], weights, prompts, lengths, key, **options)

    return jax.vmap(one, spmd_axis_name="grid")(params, prompts, prompt_lengths, keys)
