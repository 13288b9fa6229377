"""One supervised step: cross-entropy on the answer's tokens only."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from listopd_jax.ops.objective import token_weights
from listopd_jax.rollout.decode import completion_mask
from listopd_jax.rollout.scoring import completion_logprobs
from listopd_jax.train.accumulate import accumulated_grad
from listopd_jax.train.optimizer import TrainState, apply_gradients


def make_sft_step(
    graphdef: nnx.GraphDef, tx: optax.GradientTransformation, vocab: int, chunk: int, microbatch: int = 0
) -> Callable:
    """A jitted step(state, batch, lr) → (state, metrics); `batch` as in listopd_jax.data.input.

    Metrics are scalars: loss (nats a token), entropy, grad_norm, tokens (answer tokens in the batch).
    """

    def loss_of(params, rows):
        batch, weights = rows
        decoder, answers = nnx.merge(graphdef, params), batch["answer"][:, None]
        logprobs, entropy = completion_logprobs(
            decoder, batch["prompt"], batch["prompt_length"], answers, vocab, chunk
        )
        return -(logprobs * weights).sum(), entropy * weights

    def step(state: TrainState, batch, lr):
        mask = completion_mask(batch["answer_length"][:, None], batch["answer"].shape[-1])
        weights = token_weights(mask.astype(jnp.float32), "token")
        loss, grads, entropy = accumulated_grad(loss_of, state.params, (batch, weights), microbatch)
        metrics = {
            "loss": loss,
            "entropy": entropy.sum(),
            "tokens": mask.sum(),
            "grad_norm": optax.tree.norm(grads),
        }
        return apply_gradients(state, grads, lr, tx), metrics

    return jax.jit(step, donate_argnums=0)
