"""One on-policy distillation update on a batch of rollouts: score with teacher and base, loss, gradient, AdamW.

The rollout itself is another program (listopd_jax.rollout.decode). Teacher and base are frozen and scored outside
the gradient; the student's pass is differentiated through the shared prompt. With microbatches the gradient is the
exact gradient of the global loss: every token's weight is known before the first microbatch.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from listopd_jax.models.decoder import Decoder, cast_once
from listopd_jax.models.lora import with_adapter
from listopd_jax.ops.grammar import START, Grammar, states
from listopd_jax.ops.objective import Hyper, Variant, token_weights
from listopd_jax.ops.opd_loss import Frozen, Models, opd_loss
from listopd_jax.parallel.compiler import UPDATE, backend_options
from listopd_jax.rollout.decode import Rollout, completion_mask
from listopd_jax.rollout.scoring import RowWidth, completion_hidden
from listopd_jax.train.accumulate import accumulated_grad
from listopd_jax.train.optimizer import TrainState, apply_gradients


class OpdBatch(NamedTuple):
    """Prompts, their n sampled completions, and a reward for each, added to the advantage of its tokens.

    With experts, `own_teacher` says whose row it is: 0 the teacher's, i the i-th expert's. Teachers read prompts of
    their own if there are any. `teacher_logprobs` are those of a teacher that is not a model here.
    """

    prompts: Int[Array, "B P"]
    prompt_lengths: Int[Array, " B"]
    rollout: Rollout
    reward: Float[Array, "B n"] | None = None
    own_teacher: Int[Array, " B"] | None = None
    teacher_prompts: Int[Array, "B Q"] | None = None
    teacher_prompt_lengths: Int[Array, " B"] | None = None
    teacher_logprobs: Float[Array, "B n T"] | None = None
    width: RowWidth | None = None  # of a prompt with its completion, where they share a row


def make_opd_step(
    graphs: Models,
    tx: optax.GradientTransformation,
    variant: Variant,
    *,
    vocab: int,
    chunk: int,
    microbatch: int = 0,
    pallas: bool = False,
    grammar: Grammar | None = None,
) -> Callable:
    """A jitted step(state, frozen, batch: OpdBatch, hyper: Hyper, lr) → (state, metrics, per_token).

    `graphs` are the static halves of the models, `frozen` the parameters of teachers and base. The state of a student
    with an adapter (of `lora`) is the adapter alone; its other arrays are the base's. `pallas`,
    `grammar`: see `opd_loss`.

    metrics: scalars over completion tokens (loss, advantage_mean, log_ratio_variance, guarded_fraction, ratio_max,
    clip_fraction, reverse_kl, entropy, sampler_trainer_gap, grad_norm). per_token: float32 arrays [B, n, T] of
    advantage, λ, student, teacher and base log-probs, and flip with Variant.flips, 0 after the end.
    """

    loss_function = functools.partial(
        opd_loss, variant=variant, vocab=vocab, chunk=chunk, pallas=pallas, grammar=grammar
    )

    def step(state: TrainState, frozen: Frozen, batch: OpdBatch, hyper: Hyper, lr):
        mask = completion_mask(batch.rollout.lengths, batch.rollout.tokens.shape[-1])
        weights = token_weights(mask.astype(jnp.float32), variant.aggregate)

        def loss_of(params, rows):
            part, weights = rows
            loss, per_token = _loss(graphs, params, frozen, part, weights, loss_function, hyper)
            # After the end there are numbers of padding tokens, possibly not finite.
            return loss, {k: jnp.where(weights > 0, v, 0.0) for k, v in per_token.items()}

        dtype = nnx.merge(graphs.student, with_adapter(frozen.base, state.params)).dtype
        # Cast once for all microbatches. The float32 parameters stay in `state` and are what AdamW updates.
        params = cast_once(state.params, dtype)
        loss, grads, per_token = accumulated_grad(loss_of, params, (batch, weights), microbatch)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **summarize(per_token, mask, hyper)}
        return apply_gradients(state, grads, lr, tx), metrics, per_token

    # Parameters and moments are updated in place.
    return jax.jit(step, donate_argnums=0, compiler_options=backend_options(UPDATE))


def _loss(graphs: Models, params, frozen: Frozen, batch: OpdBatch, weights, loss_function: Callable, hyper):
    """Weighted loss of one microbatch, differentiable in `params`, and per-token quantities [B, n, T]."""
    hiddens, heads = states_and_heads(graphs, with_adapter(frozen.base, params), frozen, batch)
    states = grammar_states(loss_function.keywords["grammar"], batch.rollout.tokens)
    return loss_at_states(
        hiddens, heads, batch.rollout, states, weights, loss_function, hyper,
        reward=batch.reward, own_teacher=batch.own_teacher, teacher=batch.teacher_logprobs,
    )  # fmt: skip


def loss_at_states(
    hiddens: Models,
    heads: Models,
    rollout: Rollout,
    states: Int[Array, "B n T"] | None,
    weights: Float[Array, "B n T"],
    loss_function: Callable,
    hyper: Hyper,
    *,
    reward: Float[Array, "B n"] | None = None,
    own_teacher: Int[Array, " B"] | None = None,
    teacher: Float[Array, "B n T"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, "B n T"]]]:
    """`loss_function`, i.e. `opd_loss`, of completions with hidden states [B, n, T, D]."""
    tokens = rollout.tokens
    # [B, n, T, …] → [N, …]
    hiddens, states, *rows = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[3:]), (hiddens, states, tokens, rollout.logprobs, weights)
    )
    of_tokens = {"states": states}
    if reward is not None:
        of_tokens["reward"] = jnp.broadcast_to(reward[..., None], tokens.shape).reshape(-1)
    if teacher is not None:
        of_tokens["teacher"] = teacher.reshape(-1)
    if own_teacher is not None:
        of_tokens["own_teacher"] = jnp.broadcast_to(own_teacher[:, None, None], tokens.shape).reshape(-1)
    loss, per_token = loss_function(hiddens, heads, *rows, hyper, **of_tokens)
    return loss, {k: v.reshape(tokens.shape) for k, v in per_token.items()}


def grammar_states(grammar: Grammar | None, tokens: Int[Array, "B n T"]) -> Int[Array, "B n T"] | None:
    """The state in which a grammar meets each token; None without one."""
    return None if grammar is None else states(grammar, jnp.full(tokens.shape[:2], START), tokens)


def states_and_heads(graphs: Models, student, frozen: Frozen, batch: OpdBatch) -> tuple[Models, Models]:
    """The states of each model that predict the completions, and its head; models are static halves and parameters."""
    decoders = _decoders(graphs, student, frozen)
    heads = Models(
        student=_head(decoders.student),
        teacher=_head(decoders.teacher),
        base=_head(decoders.base),
        experts=tuple(map(_head, decoders.experts)),
    )
    return _hiddens(decoders, batch), heads


def _decoders(graphs: Models, student, frozen: Frozen) -> Models:
    """The models of static halves and parameters."""
    teacher = None if graphs.teacher is None else nnx.merge(graphs.teacher, frozen.teacher)
    experts = tuple(map(nnx.merge, graphs.experts, frozen.experts))
    return Models(
        student=nnx.merge(graphs.student, student),
        teacher=teacher,
        base=nnx.merge(graphs.base, frozen.base),
        experts=experts,
    )


def _head(decoder: Decoder | None) -> Float[Array, "V D"] | None:
    return None if decoder is None else decoder.head_weight()


def _hiddens(decoders: Models, batch: OpdBatch) -> Models:
    """The states [B, n, T, D] that predict the completions; teachers read them after prompts of their own, if any."""
    tokens, prompts, width = batch.rollout.tokens, (batch.prompts, batch.prompt_lengths), batch.width
    teacher_prompts, teacher_width = prompts, width
    if batch.teacher_prompts is not None:
        # `width` is of the student's prompts.
        teacher_prompts, teacher_width = (batch.teacher_prompts, batch.teacher_prompt_lengths), None

    def by_teacher(decoder):
        return completion_hidden(decoder, *teacher_prompts, tokens, teacher_width)

    return Models(
        student=completion_hidden(decoders.student, *prompts, tokens, width),
        teacher=None if decoders.teacher is None else by_teacher(decoders.teacher),
        base=completion_hidden(decoders.base, *prompts, tokens, width),
        experts=tuple(map(by_teacher, decoders.experts)),
    )


def summarize(per_token: dict[str, Float[Array, "B n T"]], mask, hyper: Hyper) -> dict[str, Float[Array, ""]]:
    """Scalars over the completion tokens of a batch."""
    count = jnp.maximum(mask.sum(), 1)

    def mean(x):
        return jnp.where(mask, x, 0).sum() / count

    gap = jnp.abs(per_token["student"] - per_token["rollout"])
    log_ratio = per_token["teacher"] - per_token["base"]
    return {
        "advantage_mean": mean(per_token["advantage"]),
        # (λ − 1)² times this is the variance that RIDE (2609.36484) holds responsible for collapse.
        "log_ratio_variance": mean((log_ratio - mean(log_ratio)) ** 2),
        "guarded_fraction": mean(per_token["lambda"] != hyper.lam),
        "ratio_max": jnp.where(mask, per_token["ratio"], 0).max(),
        # A clipped ratio is exp(log c) in float32, which may fall short of c by an ulp.
        "clip_fraction": mean(per_token["ratio"] >= hyper.clip * (1 - 1e-6)),
        "reverse_kl": mean(per_token["student"] - per_token["teacher"]),
        "entropy": mean(per_token["entropy"]),
        "completion_length": mask.sum() / mask.any(-1).sum(),
        "sampler_trainer_gap": jnp.where(mask, gap, 0).max(),
    }
