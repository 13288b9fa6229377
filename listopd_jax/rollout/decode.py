"""Decoding: one prefill per prompt, then jitted loops that write n completions per prompt until all have ended.

The next token comes from Σ_i w_i log π_i over one or more models: one model with weight 1 is ordinary sampling;
teacher and base with weights λ and 1−λ decode from the extrapolated target π_B(π_T/π_B)^λ without training
(*forecast*, docs/theory.md). The n completions of a prompt may each have weights of their own, so a whole grid of λ
shares one prompt cache.

`decode` is one program with a cache of the whole budget. `generate` writes the same in segments: the cache grows with
the completions, and rows that have ended leave the batch. The host reads three numbers after each segment and nothing
in between. A row's random numbers are its own, so where it is computed does not change what it writes.

Completions may be constrained to what a grammar allows: by its tables on the device (`constraint`), or token by token
by masks that the host makes (`masks`). The sampler is then its distribution over what is allowed, renormalised, and
`logprobs` are of that.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from listopd_jax.models.decoder import Decoder
from listopd_jax.ops.grammar import START, Grammar, allowed_tokens, state_after, states
from listopd_jax.ops.guard import Guard
from listopd_jax.ops.head import take_token
from listopd_jax.parallel.compiler import ROLLOUT, BackendJit
from listopd_jax.parallel.rules import constrain, context_mesh, row_multiple
from listopd_jax.rollout.draft import draft
from listopd_jax.rollout.sampling import categorical, head_rows, mixed_logprobs, row_keys, unpacked
from listopd_jax.rollout.state import (
    Prompts,
    Rollout,
    Rows,
    State,
    alive,
    can_shrink,
    fitting,
    grow,
    last_tokens,
    longest,
    put_back,
    shrink,
)
from listopd_jax.rounding import ceil_div, round_up

LEAST_ROWS = 8  # fewer cost hardly less, and each shape is one more program to compile
LEAST_PARAMETERS = 1_000_000  # a smaller model's steps cost less than those programs
PASS_TOKENS = 1024  # that an accelerator computes while it reads the weights
CPU_PASS_TOKENS = 64  # that cost little more than one per row (benchmarks/RESULTS.md)
LEAST_DRAFT = 3
ROOM_MULTIPLE = 16  # tokens; XLA's GPU backend pads, by a copy, what its products read at odd widths
LEAST_CAPACITY = 64  # tokens; a shorter cache is not worth a program

Masks = Callable[[Int[np.ndarray, " R"], Int[np.ndarray, " R"] | None], UInt32[np.ndarray, "R W"]]
"""(number of each row, its last token; None: it has none) → what it may write next, 32 tokens to a word.

Called for every row before its first token, and for those that are not done after each token, while there are any.
"""


class Settings(NamedTuple):
    """The static options of a rollout."""

    max_tokens: int  # at least 1
    vocab: int
    eos: tuple[int, ...]  # each of these ids ends a completion
    pad: int
    greedy: bool = False
    draft_tokens: int = 0  # most that are drafted per row and step (`draft_size`); 0: none
    pass_tokens: int = PASS_TOKENS  # that a device should read in a step, drafts included (`draft_size`)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """All that decides the next token, except the tokens before it.

    graphs, params: static half and parameters of each of m models. weights [m, n]: of the models in the mixture that
    completion j of a prompt is from. temperature: a scalar. guard: lowers the first of two weights (ops/guard.py).
    constraint: what completions are constrained to, where there is no guard.
    """

    graphs: tuple[nnx.GraphDef, ...] = dataclasses.field(metadata={"static": True})
    params: tuple[Any, ...]
    weights: Any  # these are arrays, or what stands for one where the program is lowered or sharded
    key: Any
    temperature: Any
    settings: Settings = dataclasses.field(metadata={"static": True})
    guard: Guard | None = None  # of a mixture of teacher and base
    constraint: Grammar | None = None

    @property
    def grammar(self) -> Grammar | None:
        """The grammar that the rows' states belong to."""
        return self.constraint if self.guard is None else self.guard.grammar

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
    hint: Int[Array, "B H"],
    capacity: int,
    allowed: UInt32[Array, "B n W"] | None = None,
) -> tuple[Prompts, State]:
    """Read the prompts and write the first token of every completion; caches for `capacity` tokens."""
    decoders, rows = sampler.decoders, _unwritten(sampler, len(prompts), budgets, allowed)
    shape = rows.done.shape
    last, caches = zip(*(d.prefill(prompts, prompt_lengths) for d in decoders), strict=True)
    # The last state of a prompt predicts the first token of all its completions.
    hiddens = [jnp.broadcast_to(h[:, None, None], (*shape, 1, h.shape[-1])) for h in last]
    rows = sample_tokens(sampler, hiddens, rows, jnp.zeros((*shape, 0), jnp.int32))
    own = tuple(d.init_cache(*shape, capacity) for d in decoders)
    return Prompts(prompt_lengths, hint, caches), State(own, rows)


def _unwritten(
    sampler: Sampler, B: int, budgets: Int[Array, "B n"] | None, allowed: UInt32[Array, "B n W"] | None
) -> Rows:
    """The n completions of each of B prompts before their first token."""
    m, n = sampler.weights.shape
    T, pad = sampler.settings.max_tokens, sampler.settings.pad
    budgets = jnp.full((B, n), T) if budgets is None else jnp.minimum(budgets, T)
    none = constrain(jnp.zeros((B, n), jnp.int32), "batch", None)
    empty = Rollout(
        constrain(jnp.full((B, n, T), pad, jnp.int32), "batch", None, None),
        constrain(jnp.zeros((B, n, T)), "batch", None, None),
        none,
        none,
    )
    number = constrain(jnp.arange(B * n).reshape(B, n), "batch", None)
    weights = constrain(jnp.broadcast_to(sampler.weights.T, (B, n, m)), "batch", None, None)
    state = None if sampler.grammar is None else constrain(jnp.full((B, n), START), "batch", None)
    done = constrain(budgets <= 0, "batch", None)
    return Rows(number, weights, budgets, done, none, empty, state, allowed)


def sample_tokens(
    sampler: Sampler, hiddens: Sequence[Float[Array, "B n S _"]], rows: Rows, drafted: Int[Array, "B n S-1"]
) -> Rows:
    """Write the next tokens of every row that is not done: one, and one more for each draft that it confirms.

    `hiddens` are the models' states before `drafted` and after each of its tokens. Each position is sampled from the
    model's own distribution there, with the random number that belongs to row and position; it is kept if all tokens
    before it were drafted as they were sampled. So a row writes what it writes without drafts, and a drafted token is
    confirmed with the model's probability of it, the most that any exact scheme reaches.
    """
    settings, greedy = sampler.settings, sampler.settings.greedy
    # A greedy token is logged with its probability at temperature 1.
    temperature = 1.0 if greedy else sampler.temperature
    state = None if rows.state is None else _states(sampler.grammar, rows.state, drafted)
    logp = mixed_logprobs(
        sampler.decoders, hiddens, rows.weights[:, :, None], settings.vocab, temperature, sampler.guard, state,
        _allowed(sampler, rows, state),
    )  # fmt: skip
    # A random number belongs to a row and a place in its text. Neither drafts nor batch shapes change what is drawn.
    place = rows.rollout.lengths[..., None] + jnp.arange(logp.shape[2])
    keys = None if greedy else row_keys(sampler.key, place, rows.number[..., None])
    drawn = jnp.argmax(logp, -1) if greedy else categorical(keys, logp, head_rows(sampler.decoders))
    tokens = drawn.astype(jnp.int32)
    count = _num_kept(rows, tokens, drafted, settings.eos)
    if state is not None:
        after = state_after(sampler.grammar, state, tokens, count)
        rows = rows._replace(state=jnp.where(count > 0, after, rows.state))
    return _written(rows, tokens, take_token(logp, tokens), count, settings)


def _states(
    grammar: Grammar, state: Int[Array, "B n"], drafted: Int[Array, "B n D"]
) -> Int[Array, "B n D+1"]:
    """The grammar's state before and after each drafted token."""
    return states(grammar, state, jnp.pad(drafted, [(0, 0), (0, 0), (0, 1)]))


def _allowed(
    sampler: Sampler, rows: Rows, state: Int[Array, "B n S"] | None
) -> Bool[Array, "B n S V"] | None:
    """The tokens allowed at each position; None where all are."""
    if sampler.constraint is not None:
        return allowed_tokens(sampler.constraint, state)
    return None if rows.allowed is None else unpacked(rows.allowed, sampler.settings.vocab)[:, :, None]


def _num_kept(
    rows: Rows, tokens: Int[Array, "B n S"], drafted: Int[Array, "B n S-1"], eos: tuple[int, ...]
) -> Int[Array, "B n"]:
    """How many of `tokens` are kept: up to the first that was not drafted, an EOS, or the budget."""
    continues = (tokens[..., :-1] == drafted) & ~_ends(tokens[..., :-1], eos)
    # The first mismatch voids everything after it.
    count = 1 + jnp.cumprod(continues, axis=-1).sum(-1)
    return jnp.where(rows.done, 0, jnp.minimum(count, rows.budgets - rows.rollout.lengths))


def _ends(tokens: Int[Array, "*s"], eos: tuple[int, ...]) -> Bool[Array, "*s"]:
    """Which tokens end a completion."""
    return jnp.isin(tokens, jnp.array(eos, jnp.int32))


def _written(rows: Rows, tokens, logprobs, count: Int[Array, "B n"], settings: Settings) -> Rows:
    """`rows` with the first `count` of `tokens` [B, n, S] and their log-probabilities."""
    old = rows.rollout
    # Every row writes its own number of tokens at its own place: selected position by position, without a scatter.
    place = jnp.arange(settings.max_tokens) - old.lengths[..., None]
    at, new = jnp.clip(place, 0, tokens.shape[-1] - 1), (place >= 0) & (place < count[..., None])

    def put(row, x):
        return jnp.where(new, jnp.take_along_axis(x, at, axis=-1), row)

    lengths = old.lengths + count
    last = jnp.take_along_axis(tokens, jnp.maximum(count - 1, 0)[..., None], axis=-1)[..., 0]
    rollout = Rollout(put(old.tokens, tokens), put(old.logprobs, logprobs), lengths, old.steps)
    done = rows.done | _ends(last, settings.eos) | (lengths >= rows.budgets)
    return rows._replace(done=done, source=rows.source + count, rollout=rollout)


def decode_until(sampler: Sampler, prompts: Prompts, state: State, least: int) -> State:
    """Write tokens until all rows are done, the cache has no room for a step, or a smaller batch would do.

    One token, where the host says what may come next.
    """
    size = draft_size(sampler.settings, state.rows.done.size)
    if state.rows.allowed is not None:
        return decode_step(sampler, prompts, state, size)
    room = state.caches[0].capacity - size  # of the tokens written the last is not yet cached

    def unfinished(state):
        done = state.rows.done
        return (longest(state.rows) <= room) & ~done.all() & ~can_shrink(done, least)

    return jax.lax.while_loop(unfinished, lambda s: decode_step(sampler, prompts, s, size), state)


def pass_tokens(platform: str) -> int:
    """Tokens that a pass on such a device should read at most, for `Settings.pass_tokens`."""
    return CPU_PASS_TOKENS if platform == "cpu" else PASS_TOKENS


def draft_size(settings: Settings, rows: int) -> int:
    """Tokens to draft for each of `rows`, at most `draft_tokens`: about as many as make `pass_tokens` per device.

    Beyond that a drafted token costs what a sampled one does, and the later ones are often rejected.
    """
    enough = settings.pass_tokens * row_multiple() // rows - 1
    return min(settings.draft_tokens, max(LEAST_DRAFT, enough))


def decode_step(sampler: Sampler, prompts: Prompts, state: State, size: int) -> State:
    """One pass of every model over the last token of each row and `size` drafts of the next, and what it confirms."""
    rows = state.rows
    lengths, steps = rows.rollout.lengths, rows.rollout.steps + ~rows.done
    last = last_tokens(rows)[..., None]
    drafted, source = draft(prompts.hint, rows.rollout.tokens, lengths, rows.source, size)
    # Without drafts all rows that are not done have the same length, and one place in the cache is written.
    cached = jnp.maximum(lengths - 1, 0) if size else longest(rows) - 1
    # The last token was sampled, but no model has read it yet: it comes before its drafts.
    read = [
        d.decode_step(shared, prompts.lengths, own, cached, jnp.concatenate([last, drafted], axis=-1))
        for d, shared, own in zip(sampler.decoders, prompts.caches, state.caches, strict=True)
    ]
    hiddens, caches = zip(*read, strict=True)
    rows = rows._replace(source=source, rollout=rows.rollout._replace(steps=steps))
    return State(caches, sample_tokens(sampler, hiddens, rows, drafted))


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
    hint: Int[Array, "#B H"] | None = None,
    guard: Guard | None = None,
    constraint: Grammar | None = None,
    **settings: Any,
) -> Rollout:
    """Write n completions for each prompt; stops early once every row has ended or spent its budget.

    `settings` (static): those of Settings. `budgets` (default `max_tokens`) bounds each row. `hint`: tokens like those
    of an answer, that drafts may be copied from. `guard`, `constraint`: see Sampler. Row (b, j) of the result is a
    completion of prompt b under the mixture weights[:, j], whatever is drafted.
    """
    sampler = Sampler(graphs, params, weights, key, temperature, Settings(**settings), guard, constraint)
    room = sampler.settings.max_tokens + sampler.settings.draft_tokens
    shared, state = prefill(
        sampler, prompts, prompt_lengths, budgets, _hints(hint, len(prompts)), capacity=room
    )
    return decode_until(sampler, shared, state, least=state.rows.done.size).rows.rollout


def _hints(hint: Int[Array, "#B H"] | None, B: int) -> Int[Array, "B H"]:
    """A hint for each of B prompts; of no tokens if there is none."""
    hint = jnp.zeros((1, 0), jnp.int32) if hint is None else jnp.asarray(hint, jnp.int32)
    return jnp.broadcast_to(hint, (B, hint.shape[-1]))


# --- the programs, and the host that runs them ---


@functools.partial(BackendJit, options=ROLLOUT, static_argnames="capacity")
def first_segment(
    sampler: Sampler, prompts, prompt_lengths, budgets, hint, capacity: int, allowed=None
) -> tuple[Prompts, State]:
    """`prefill`, compiled."""
    return prefill(sampler, prompts, prompt_lengths, budgets, hint, capacity, allowed)


# The state is donated: the caches are updated in place.
@functools.partial(BackendJit, options=ROLLOUT, static_argnames="least", donate_argnames="state")
def segment(sampler: Sampler, prompts: Prompts, state: State, least: int) -> tuple[State, Int[Array, " 3"]]:
    """`decode_until`, compiled; and what the host must know: the length of the `longest` row, and what is `alive`."""
    state = decode_until(sampler, prompts, state, least)
    return state, constrain(jnp.stack([longest(state.rows), *alive(state.rows.done)]), None)


@jax.jit
def _last(rows: Rows) -> Int[Array, "3 B n"]:
    """The number of each row, whether it is done, and its last token."""
    return jnp.stack([rows.number, rows.done.astype(jnp.int32), last_tokens(rows)])


def _with_masks(state: State, masks: Masks) -> State:
    """Give each unfinished row the mask of what it may write next."""
    number, done, last = np.asarray(_last(state.rows))
    allowed, unfinished = np.zeros(state.rows.allowed.shape, np.uint32), done == 0
    if unfinished.any():
        allowed[unfinished] = masks(number[unfinished], last[unfinished])
    return state._replace(rows=state.rows._replace(allowed=allowed))


def capacities(max_tokens: int, multiple: int = 1) -> list[int]:
    """Sizes that the cache of the completions takes in turn: quarters of the budget, none below LEAST_CAPACITY.

    All but the last are multiples of `multiple`. Each is a program to compile; with four, a step reads 1.25 times the
    keys that there are by the end of the budget.
    """
    part = round_up(max(LEAST_CAPACITY, ceil_div(max_tokens, 4)), multiple)
    return [*range(part, max_tokens, part), max_tokens]


def cache_sizes(max_tokens: int, drafts: int) -> list[int]:
    """`capacities` with room for the drafts of the last step; with drafts, all are multiples of ROOM_MULTIPLE."""
    if not drafts:
        return capacities(max_tokens)
    return capacities(round_up(max_tokens + drafts, ROOM_MULTIPLE), ROOM_MULTIPLE)


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
    hint: Int[Array, "#B H"] | None = None,
    guard: Guard | None = None,
    constraint: Grammar | None = None,
    masks: Masks | None = None,
    **settings: Any,
) -> Rollout:
    """The result of `decode`, by few compiled programs in turn, shared by every λ, seed and evaluation.

    After a segment the cache grows if it is full, and the batch is halved, in prompts or in completions per prompt, as
    often as the unfinished rows fit: a row that is done costs its share of each step until then and nothing after.
    Over a mesh rows stay on their devices, and nothing shrinks, nor does it for models so small that the programs
    would cost more to compile than they save. Not traceable: the host looks at lengths. With `masks` a segment is one
    token, and nothing is drafted.
    """
    options = Settings(**settings | ({} if masks is None else {"draft_tokens": 0}))
    sampler = Sampler(graphs, params, weights, key, jnp.float32(temperature), options, guard, constraint)
    shape, drafts = (len(prompts), weights.shape[1]), options.draft_tokens
    shrinks = context_mesh() is None and sum(x.size for x in jax.tree.leaves(params)) >= LEAST_PARAMETERS
    least = LEAST_ROWS if shrinks else shape[0] * shape[1]
    sizes = cache_sizes(options.max_tokens, drafts)
    first = None if masks is None else masks(np.arange(shape[0] * shape[1]), None).reshape(*shape, -1)
    shared, state = first_segment(
        sampler, prompts, prompt_lengths, budgets, _hints(hint, len(prompts)), sizes[0], first
    )
    out = None  # rows that have left, once there are any
    while True:
        if masks is not None:
            state = _with_masks(state, masks)
        state, seen = segment(sampler, shared, state, least)
        # The only transfer to the host per segment. It waits for the segment to end.
        length, prompts_left, most = np.asarray(seen).tolist()
        if not most:
            return state.rows.rollout if out is None else put_back(out, state.rows)
        # Rows that leave are kept in `out`, each in its place.
        smaller = fitting(shape, prompts_left, most, least)
        if smaller != shape:
            out = state.rows.rollout if out is None else put_back(out, state.rows)
            shape, (shared, state) = smaller, shrink(shared, state, smaller)
        if (needed := length + drafts) > state.caches[0].capacity:
            state = grow(state, min(s for s in sizes if s >= needed))
