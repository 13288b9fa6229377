"""Decoding: one prefill per prompt, then jitted loops that write n completions per prompt until all have ended.

The next token comes from Σ_i w_i log π_i over one or more models: one model with weight 1 is ordinary sampling;
teacher and base with weights λ and 1−λ decode from the extrapolated target π_B(π_T/π_B)^λ without training
(*forecast*, docs/theory.md). The n completions of a prompt may each have weights of their own, so a whole grid of λ
shares one prompt cache.

`decode` is one program with a cache of the whole budget. `generate` writes the same in segments: the cache grows with
the completions, and rows that have ended leave the batch. The host reads three numbers after each segment and nothing
in between. A row's random numbers are its own, so where it is computed does not change what it says.
"""

import dataclasses
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
    eos: tuple[int, ...]  # each of these ids ends a completion
    pad: int
    greedy: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """All that decides the next token, but for the tokens before it.

    graphs, params: static half and parameters of each of m models. weights [m, n]: of the models in the mixture that
    completion j of a prompt is from. temperature: a scalar.
    """

    graphs: tuple[nnx.GraphDef, ...] = dataclasses.field(metadata={"static": True})
    params: tuple[Any, ...]
    weights: Any  # these are arrays, or what stands for one where the program is lowered or sharded
    key: Any
    temperature: Any
    settings: Settings = dataclasses.field(metadata={"static": True})

    @property
    def decoders(self) -> list[Decoder]:
        """The models."""
        return list(map(nnx.merge, self.graphs, self.params))


def completion_mask(lengths: Int[Array, "*s"], size: int) -> Bool[Array, "*s T"]:
    """True at the first `lengths` of `size` positions: every completion token and its EOS, nothing after it."""
    return jnp.arange(size) < lengths[..., None]


# --- one token, one segment, one rollout: traceable ---


def prefill(
    sampler: Sampler,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    budgets: Int[Array, "B n"] | None,
    capacity: int,
) -> tuple[Prompts, State]:
    """Read the prompts and write the first token of every completion; caches for `capacity` tokens."""
    decoders, rows = sampler.decoders, _unwritten(sampler, len(prompts), budgets)
    shape = rows.done.shape
    last, caches = zip(*(d.prefill(prompts, prompt_lengths) for d in decoders), strict=True)
    hiddens = [jnp.broadcast_to(h[:, None], (*shape, h.shape[-1])) for h in last]
    rows = sample_token(sampler, hiddens, rows, jnp.int32(0))
    own = tuple(d.init_cache(*shape, capacity) for d in decoders)
    return Prompts(prompt_lengths, caches), State(jnp.int32(1), own, rows)


def _unwritten(sampler: Sampler, B: int, budgets: Int[Array, "B n"] | None) -> Rows:
    """The n completions of each of B prompts before their first token."""
    m, n = sampler.weights.shape
    T, pad = sampler.settings.max_tokens, sampler.settings.pad
    budgets = jnp.full((B, n), T) if budgets is None else jnp.minimum(budgets, T)
    empty = Rollout(
        constrain(jnp.full((B, n, T), pad, jnp.int32), "batch", None, None),
        constrain(jnp.zeros((B, n, T)), "batch", None, None),
        constrain(jnp.zeros((B, n), jnp.int32), "batch", None),
    )
    number = constrain(jnp.arange(B * n).reshape(B, n), "batch", None)
    weights = constrain(jnp.broadcast_to(sampler.weights.T, (B, n, m)), "batch", None, None)
    return Rows(number, weights, budgets, constrain(budgets <= 0, "batch", None), empty)


def sample_token(
    sampler: Sampler, hiddens: Sequence[Float[Array, "B n _"]], rows: Rows, step: Int[Array, ""]
) -> Rows:
    """Write token `step` of every row that is not done, from the models' states [B, n, D] before it."""
    settings, greedy = sampler.settings, sampler.settings.greedy
    temperature = 1.0 if greedy else sampler.temperature
    logp = mixed_logprobs(sampler.decoders, hiddens, rows.weights, settings.vocab, temperature)
    keys = None if greedy else row_keys(sampler.key, step, rows.number)
    chosen = jnp.argmax(logp, -1) if greedy else categorical(keys, logp)
    token = jnp.where(rows.done, settings.pad, chosen).astype(jnp.int32)
    tokens, logprobs, lengths = rows.rollout
    rollout = Rollout(
        tokens.at[..., step].set(token),
        logprobs.at[..., step].set(jnp.where(rows.done, 0.0, take_token(logp, token))),
        lengths + ~rows.done,
    )
    done = rows.done | jnp.isin(token, jnp.array(settings.eos, jnp.int32)) | (rollout.lengths >= rows.budgets)
    return rows._replace(done=done, rollout=rollout)


def decode_until(sampler: Sampler, prompts: Prompts, state: State, until: int, least: int) -> State:
    """Write up to `until` tokens per row; stops early once all are done, or a smaller batch would do (`can_shrink`)."""

    def body(state):
        token = jax.lax.dynamic_index_in_dim(
            state.rows.rollout.tokens, state.step - 1, axis=-1, keepdims=False
        )
        read = [
            d.decode_step(shared, prompts.lengths, own, state.step - 1, token)
            for d, shared, own in zip(sampler.decoders, prompts.caches, state.caches, strict=True)
        ]
        hiddens, caches = zip(*read, strict=True)
        return State(state.step + 1, caches, sample_token(sampler, hiddens, state.rows, state.step))

    def unfinished(state):
        done = state.rows.done
        return (state.step < until) & ~done.all() & ~can_shrink(done, least)

    return jax.lax.while_loop(unfinished, body, state)


def decode(
    graphs: tuple[nnx.GraphDef, ...],
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
    """Write n completions for each prompt; stops early once every row has ended or spent its budget.

    `settings` (static): `max_tokens`, `vocab`, `eos`, `pad` and `greedy`. `budgets` (default `max_tokens`) bounds each
    row. Row (b, j) of the result is a completion of prompt b under the mixture weights[:, j].
    """
    sampler = Sampler(graphs, params, weights, key, temperature, Settings(**settings))
    T = sampler.settings.max_tokens
    shared, state = prefill(sampler, prompts, prompt_lengths, budgets, capacity=T)
    state = decode_until(sampler, shared, state, until=T, least=state.rows.done.size)
    return state.rows.rollout


# --- the programs, and the host that runs them ---


@functools.partial(BackendJit, options=ROLLOUT, static_argnames="capacity")
def first_segment(sampler: Sampler, prompts, prompt_lengths, budgets, capacity: int) -> tuple[Prompts, State]:
    """`prefill`, compiled."""
    return prefill(sampler, prompts, prompt_lengths, budgets, capacity)


@functools.partial(BackendJit, options=ROLLOUT, static_argnames="least", donate_argnames="state")
def segment(sampler: Sampler, prompts: Prompts, state: State, least: int) -> tuple[State, Int[Array, " 3"]]:
    """`decode_until` the cache is full, compiled; and what the host must know: step, and what is `alive`."""
    room = state.caches[0].capacity + 1  # the last token written is not yet cached
    until = min(sampler.settings.max_tokens, room)
    state = decode_until(sampler, prompts, state, until, least)
    return state, constrain(jnp.stack([state.step, *alive(state.rows.done)]), None)


def capacities(max_tokens: int) -> list[int]:
    """Sizes that the cache of the completions takes in turn: quarters of the budget, none below LEAST_CAPACITY.

    Each is a program to compile; with four, a step reads 1.25 times the keys that there are by the end of the budget.
    """
    part = max(LEAST_CAPACITY, -(-max_tokens // 4))
    return [*range(part, max_tokens, part), max_tokens]


def generate(
    graphs: tuple[nnx.GraphDef, ...],
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

    After a segment the cache grows if it is full, and the batch is halved, in prompts or in completions per prompt, as
    often as the unfinished rows fit: a row that is done costs its share of each step until then and nothing after.
    Over a mesh rows stay on their devices, and nothing shrinks, nor does it for models so small that the programs
    would cost more to compile than they save. Not traceable: the host looks at lengths.
    """
    sampler = Sampler(graphs, params, weights, key, jnp.float32(temperature), Settings(**settings))
    shape = (len(prompts), weights.shape[1])
    shrinks = context_mesh() is None and sum(x.size for x in jax.tree.leaves(params)) >= LEAST_PARAMETERS
    least = LEAST_ROWS if shrinks else shape[0] * shape[1]
    sizes = capacities(sampler.settings.max_tokens)
    shared, state = first_segment(sampler, prompts, prompt_lengths, budgets, sizes[0])
    out = None  # rows that have left, once there are any
    while True:
        state, seen = segment(sampler, shared, state, least)
        step, prompts_left, most = np.asarray(seen).tolist()
        if step == sizes[-1] or not most:
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
        return decode((graphdef,), (params,), weights, prompts, lengths, key, **options)

    return jax.vmap(one, spmd_axis_name="grid")(params, prompts, prompt_lengths, keys)
