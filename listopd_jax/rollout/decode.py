"""Decoding: one prefill a prompt, then a jitted loop that writes n completions a prompt until all have ended.

The next token comes from Σ_i w_i log π_i over one or more models: one model with weight 1 is ordinary sampling;
teacher and base with weights λ and 1−λ decode from the extrapolated target π_B(π_T/π_B)^λ without training
(*forecast*, docs/theory.md). The n completions of a prompt may each have weights of their own, so a whole grid of λ
shares one prompt cache.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from listopd_jax.models.decoder import Decoder
from listopd_jax.ops.head import log_distribution, pick
from listopd_jax.parallel.rules import constrain


class Rollout(NamedTuple):
    """Completions and what the sampler knew of them."""

    tokens: Int[Array, "B n T"]  # pad id after the end
    logprobs: Float[
        Array, "B n T"
    ]  # log-probability under the distribution sampled from (greedy: at temperature 1)
    lengths: Int[Array, "B n"]  # tokens up to and with EOS, or the budget


def completion_mask(lengths: Int[Array, "*s"], size: int) -> Bool[Array, "*s T"]:
    """True at the first `lengths` of `size` positions: every completion token and its EOS, nothing after it."""
    return jnp.arange(size) < lengths[..., None]


def mixed_logprobs(decoders, hiddens, weights, vocab: int, temperature) -> Float[Array, "B n V"]:
    """log softmax(Σ_i w_i log π_i / temperature) for hidden states [B, n, D_i] and weights [m, n]."""
    logps = [log_distribution(h, d.head_weight(), vocab) for d, h in zip(decoders, hiddens, strict=True)]
    if len(logps) == 1:
        return jax.nn.log_softmax(logps[0] * weights[0][:, None] / temperature)
    mixed = sum(w[:, None] * logp for w, logp in zip(weights, logps, strict=True))
    return jax.nn.log_softmax(mixed / temperature)


def decode(
    decoders: Sequence[Decoder],
    weights: Float[Array, "m n"],
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, "B"],
    key: Array,
    *,
    max_tokens: int,
    vocab: int,
    eos: int,
    pad: int,
    temperature: float | Float[Array, ""] = 1.0,
    greedy: bool = False,
    budgets: Int[Array, "B n"] | None = None,
) -> Rollout:
    """Write n completions for each prompt; stops early once every row has ended or spent its budget.

    `max_tokens`, `vocab`, `eos`, `pad` and `greedy` are static. `budgets` (default `max_tokens`) bounds each row.
    Row (b, j) of the result is a completion of prompt b under the mixture weights[:, j].
    """
    shape = (prompts.shape[0], weights.shape[1])
    budgets = jnp.full(shape, max_tokens) if budgets is None else jnp.minimum(budgets, max_tokens)
    prefilled = [d.prefill(prompts, prompt_lengths) for d in decoders]
    prompt_caches = [kv for _, kv in prefilled]
    temperature = 1.0 if greedy else temperature

    def step(carry):
        t, hiddens, caches, rollout, done = carry
        logp = mixed_logprobs(decoders, hiddens, weights, vocab, temperature)
        sampled = jnp.argmax(logp, -1) if greedy else jax.random.categorical(jax.random.fold_in(key, t), logp)
        token = jnp.where(done, pad, sampled).astype(jnp.int32)
        rollout = Rollout(
            rollout.tokens.at[..., t].set(token),
            rollout.logprobs.at[..., t].set(jnp.where(done, 0.0, pick(logp, token))),
            rollout.lengths + ~done,
        )
        done = done | (token == eos) | (rollout.lengths >= budgets)
        moved = [
            d.decode_step(kv, prompt_lengths, cache, t, token)
            for d, kv, cache in zip(decoders, prompt_caches, caches, strict=True)
        ]
        return t + 1, [h for h, _ in moved], [c for _, c in moved], rollout, done

    def unfinished(carry):
        return (carry[0] < max_tokens) & ~carry[-1].all()

    hiddens = [jnp.broadcast_to(h[:, None], (*shape, h.shape[-1])) for h, _ in prefilled]
    empty = Rollout(
        constrain(jnp.full((*shape, max_tokens), pad, jnp.int32), "batch", None, None),
        constrain(jnp.zeros((*shape, max_tokens)), "batch", None, None),
        constrain(jnp.zeros(shape, jnp.int32), "batch", None),
    )
    caches = [d.init_cache(*shape, max_tokens) for d in decoders]
    start = (jnp.int32(0), hiddens, caches, empty, budgets <= 0)
    return jax.lax.while_loop(unfinished, step, start)[3]


@functools.partial(jax.jit, static_argnames=("graphdefs", "max_tokens", "vocab", "eos", "pad", "greedy"))
def generate(
    graphdefs: tuple[nnx.GraphDef, ...],
    params: tuple[Any, ...],
    weights: Float[Array, "m n"],
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, "B"],
    key: Array,
    **options: Any,
) -> Rollout:
    """`decode`, compiled: one program per models, options and shapes, shared by every λ, seed and evaluation."""
    decoders = [nnx.merge(g, p) for g, p in zip(graphdefs, params, strict=True)]
    return decode(decoders, weights, prompts, prompt_lengths, key, **options)


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
    """`generate` for G students at once, each with its own prompts and key: Rollout of [G, B, n, …].

    Every leaf of `params` has the leading axis G, split along the mesh's `grid`. A student whose rows have all ended
    waits for the others.
    """

    def one(params, prompts, lengths, key):
        return decode([nnx.merge(graphdef, params)], weights, prompts, lengths, key, **options)

    return jax.vmap(one, spmd_axis_name="grid")(params, prompts, prompt_lengths, keys)
