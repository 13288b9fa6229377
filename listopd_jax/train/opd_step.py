"""One on-policy distillation update on a batch of rollouts: score with teacher and base, loss, gradient, AdamW.

The rollout itself is another program (listopd_jax.rollout.decode). Teacher and base are frozen and scored outside
the gradient; the student's pass is differentiated through the shared prompt. With microbatches the gradient is the
exact gradient of the global loss: every token's weight is known before the first microbatch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from listopd_jax.ops.head import entropy_of, log_distribution, map_positions, pick, token_logprobs
from listopd_jax.ops.objective import (
    Hyper,
    Variant,
    full_vocab_loss,
    position_lambda,
    sampled_loss,
    token_weights,
)
from listopd_jax.rollout.decode import Rollout, completion_mask
from listopd_jax.rollout.scoring import completion_hidden
from listopd_jax.train.accumulate import accumulated_grad
from listopd_jax.train.optimizer import TrainState, apply_gradients


class Models(NamedTuple):
    """Static halves of the three models."""

    student: nnx.GraphDef
    teacher: nnx.GraphDef
    base: nnx.GraphDef


class Frozen(NamedTuple):
    """Parameters that OPD never changes."""

    teacher: Any
    base: Any


class OpdBatch(NamedTuple):
    """Prompts and their n sampled completions."""

    prompts: Int[Array, "B P"]
    prompt_lengths: Int[Array, "B"]
    rollout: Rollout


def make_opd_step(
    models: Models,
    tx: optax.GradientTransformation,
    variant: Variant,
    *,
    vocab: int,
    chunk: int,
    microbatch: int = 0,
    grid: bool = False,
) -> Callable:
    """A jitted step(state, frozen, batch: OpdBatch, hyper: Hyper, lr) → (state, metrics, per_token).

    With `grid`, a step of G independent students (λ, seeds) in one program: everything but `frozen`, which they share,
    has a leading axis G, split along the mesh's `grid`.

    metrics: scalars over completion tokens (loss, advantage_mean, guarded_fraction, ratio_max, clip_fraction,
    reverse_kl, entropy, rollout_gap, grad_norm). per_token: float32 arrays [B, n, T] of advantage, λ, student, teacher
    and base log-probs, 0 after the end.
    """

    def step(state: TrainState, frozen: Frozen, batch: OpdBatch, hyper: Hyper, lr):
        mask = completion_mask(batch.rollout.lengths, batch.rollout.tokens.shape[-1])
        weights = token_weights(mask.astype(jnp.float32), variant.aggregate)

        def loss_of(params, rows):
            part, weights = rows
            kept = weights > 0
            loss, per_token = _losses(models, params, frozen, part, kept, hyper, variant, vocab, chunk)
            per_token = {k: jnp.where(kept, jax.lax.stop_gradient(v), 0.0) for k, v in per_token.items()}
            return (jnp.where(kept, loss, 0.0) * weights).sum(), per_token

        loss, grads, per_token = accumulated_grad(loss_of, state.params, (batch, weights), microbatch)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **summarize(per_token, mask, hyper)}
        return apply_gradients(state, grads, lr, tx), metrics, per_token

    if grid:
        step = jax.vmap(step, in_axes=(0, None, 0, 0, 0), spmd_axis_name="grid")
    return jax.jit(step, donate_argnums=0)


def _losses(models: Models, params, frozen: Frozen, batch: OpdBatch, mask, hyper, variant, vocab, chunk):
    """Per-token loss and quantities [B, n, T] for one microbatch, differentiable in `params`."""
    tokens, rollout = batch.rollout.tokens, batch.rollout.logprobs
    student, teacher, base = (nnx.merge(g, p) for g, p in zip(models, (params, *frozen), strict=True))
    hidden, hidden_t, hidden_b = (
        completion_hidden(d, batch.prompts, batch.prompt_lengths, tokens) for d in (student, teacher, base)
    )
    heads = [d.head_weight() for d in (student, teacher, base)]
    if variant.estimator == "full_vocab":
        return _full_vocab(hidden, hidden_t, hidden_b, heads, tokens, rollout, hyper, variant, vocab, chunk)
    log_s, entropy = token_logprobs(hidden, heads[0], tokens, vocab, chunk)
    log_t, log_b, lam = _frozen_scores(hidden_t, hidden_b, heads[1:], tokens, hyper, variant, vocab, chunk)
    # Zeros after the end: an infinite ratio there would turn the gradient of a masked loss into 0 · inf = NaN.
    log_s, log_t, log_b, rollout = (jnp.where(mask, x, 0.0) for x in (log_s, log_t, log_b, rollout))
    loss, extra = sampled_loss(log_s, entropy, log_t, log_b, rollout, hyper._replace(lam=lam), variant)
    return loss, extra | {
        "lambda": lam,
        "student": log_s,
        "teacher": log_t,
        "base": log_b,
        "entropy": entropy,
        "rollout": rollout,
    }


def _frozen_scores(hidden_t, hidden_b, heads, tokens, hyper: Hyper, variant: Variant, vocab: int, chunk: int):
    """log π_T, log π_B of the sampled tokens and the λ of each position, all [B, n, T], in one pass of both heads."""
    heads = [w.astype(h.dtype) for w, h in zip(heads, (hidden_t, hidden_b), strict=True)]

    def rows(xs):
        *hiddens, token = xs
        teacher, base = (log_distribution(h, w, vocab) for h, w in zip(hiddens, heads, strict=True))
        return pick(teacher, token), pick(base, token), position_lambda(teacher, base, hyper, variant)

    flat = [h.reshape(-1, h.shape[-1]) for h in (hidden_t, hidden_b)]
    scores = map_positions(rows, (*flat, tokens.reshape(-1)), chunk)
    return tuple(x.reshape(tokens.shape) for x in scores)


def _full_vocab(hidden_s, hidden_t, hidden_b, heads, tokens, rollout, hyper, variant, vocab, chunk):
    heads = [w.astype(h.dtype) for w, h in zip(heads, (hidden_s, hidden_t, hidden_b), strict=True)]

    def rows(xs):
        *hiddens, token = xs
        logp = [log_distribution(h, w, vocab) for h, w in zip(hiddens, heads, strict=True)]
        loss, extra = full_vocab_loss(*logp, token, hyper, variant)
        at = dict(zip(("student", "teacher", "base"), (pick(x, token) for x in logp), strict=True))
        return loss, extra | at | {"entropy": entropy_of(logp[0])}

    flat = [x.reshape(-1, x.shape[-1]) for x in (hidden_s, hidden_t, hidden_b)]
    loss, out = map_positions(rows, (*flat, tokens.reshape(-1)), chunk)
    out = {k: v.reshape(tokens.shape) for k, v in out.items()}
    return loss.reshape(tokens.shape), out | {"rollout": rollout}


def summarize(per_token: dict[str, Float[Array, "B n T"]], mask, hyper: Hyper) -> dict[str, Float[Array, ""]]:
    """Scalars over the completion tokens of a batch."""
    count = jnp.maximum(mask.sum(), 1)

    def mean(x):
        return jnp.where(mask, x, 0).sum() / count

    gap = jnp.abs(per_token["student"] - per_token["rollout"])
    return {
        "advantage_mean": mean(per_token["advantage"]),
        "guarded_fraction": mean(per_token["lambda"] != hyper.lam),
        "ratio_max": jnp.where(mask, per_token["ratio"], 0).max(),
        "clip_fraction": mean(per_token["ratio"] >= hyper.clip * (1 - 1e-6)),
        "reverse_kl": mean(per_token["student"] - per_token["teacher"]),
        "entropy": mean(per_token["entropy"]),
        "completion_length": mask.sum() / mask.any(-1).sum(),
        "rollout_gap": jnp.where(mask, gap, 0).max(),
    }
