"""OPD without rollouts: the texts are those of the student before training; each step draws new tokens.

The slow part of OPD, writing completions token by token, happens once. At each step every position of the texts gets a
new token, drawn from the student's current distribution there; the text after it stays. So teacher and base, whose
states do not change, are read once. Objective, optimiser, schedules and tokens per step are those of the run that this
stands for.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from listopd_jax.models.lora import with_adapter
from listopd_jax.ops.grammar import Grammar
from listopd_jax.ops.head import log_distribution, map_positions, take_token
from listopd_jax.ops.objective import Hyper, Variant, token_weights
from listopd_jax.ops.opd_loss import Models, opd_loss
from listopd_jax.parallel.compiler import UPDATE, backend_options
from listopd_jax.rollout.decode import Rollout, completion_mask
from listopd_jax.rollout.sampling import categorical
from listopd_jax.rollout.scoring import completion_hidden
from listopd_jax.train.opd_step import OpdBatch, grammar_states, loss_at_states
from listopd_jax.train.optimizer import TrainState, apply_gradients


class Texts(NamedTuple):
    """L prompts with n completions each, and the states [L, n, T, D] of the frozen models that predict their tokens."""

    batch: OpdBatch
    hiddens: Models  # None of the student


class Schedule(NamedTuple):
    """Per step, of N: which of the L prompts it takes, its key, the scalars of the objective, the learning rate."""

    lists: Int[Array, "N B"]
    keys: Array
    hyper: Hyper  # of [N]
    lr: Float[Array, " N"]


def make_fixed_text(
    student: nnx.GraphDef,
    tx: optax.GradientTransformation,
    variant: Variant,
    *,
    vocab: int,
    chunk: int,
    temperature: float = 1.0,
    grammar: Grammar | None = None,
) -> Callable:
    """A jitted trained(params, base, heads: Models, texts: Texts, schedule: Schedule) → params after N steps.

    Args:
      student: its static half. `params` are what trains: all of it, or an adapter on top of the parameters `base`.
      temperature: of the draws. For the others see `opd_loss`. `heads` are those of the frozen models.
    """
    loss_function = functools.partial(opd_loss, variant=variant, vocab=vocab, chunk=chunk, grammar=grammar)
    redrawn = functools.partial(_redrawn, vocab=vocab, chunk=chunk, temperature=temperature)

    def loss(params, base, heads: Models, texts: Texts, at: Schedule):
        batch, decoder = texts.batch, nnx.merge(student, with_adapter(base, params))
        tokens = batch.rollout.tokens
        hidden = completion_hidden(decoder, batch.prompts, batch.prompt_lengths, tokens)
        mask = completion_mask(batch.rollout.lengths, tokens.shape[-1])
        weights, head = token_weights(mask.astype(jnp.float32), variant.aggregate), decoder.head_weight()
        # A draw is not differentiated: the gradient is that of the loss at the tokens drawn.
        rollout = redrawn(batch.rollout, *jax.lax.stop_gradient((hidden, head)), at.keys)
        return loss_at_states(
            texts.hiddens._replace(student=hidden), heads._replace(student=head), rollout,
            grammar_states(grammar, tokens), weights, loss_function, at.hyper, own_teacher=batch.own_teacher,
        )[0]  # fmt: skip

    def trained(params, base, heads: Models, texts: Texts, schedule: Schedule) -> Any:
        def step(state: TrainState, at: Schedule):
            # Texts and hidden states: those of the frozen models were computed once and are only looked up.
            own = jax.tree.map(lambda x: x[at.lists], texts)
            grads = jax.grad(loss)(state.params, base, heads, own, at)
            return apply_gradients(state, grads, at.lr, tx), None

        return jax.lax.scan(step, TrainState(params, tx.init(params)), schedule)[0].params

    return jax.jit(trained, compiler_options=backend_options(UPDATE))


def _redrawn(
    rollout: Rollout,
    hidden: Float[Array, "B n T D"],
    head: Float[Array, "V D"],
    key: Array,
    *,
    vocab: int,
    chunk: int,
    temperature: float,
) -> Rollout:
    """The same positions with a token of each drawn from the student's distribution there, and its log-probability."""

    def draw(rows):
        # softmax(log π/τ) is softmax(logits/τ): the normalizer is one constant, which drops out.
        logp = jax.nn.log_softmax(log_distribution(rows[0], head, vocab) / temperature)
        # One key per position, so the draws do not depend on the chunk.
        tokens = categorical(jax.vmap(jax.random.fold_in, (None, 0))(key, rows[1]), logp)
        return tokens, take_token(logp, tokens)

    flat = hidden.reshape(-1, hidden.shape[-1])
    drawn = map_positions(draw, (flat, jnp.arange(len(flat))), chunk)
    tokens, logprobs = (x.reshape(rollout.tokens.shape) for x in drawn)
    return rollout._replace(tokens=tokens, logprobs=logprobs)
