"""One supervised step: cross-entropy on the answer's tokens only."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from listopd_jax.models.decoder import cast_once
from listopd_jax.models.lora import with_adapter
from listopd_jax.ops.fused import fused_loss
from listopd_jax.ops.head import entropy_of, take_token
from listopd_jax.ops.objective import token_weights
from listopd_jax.parallel.compiler import UPDATE, backend_options
from listopd_jax.rollout.decode import completion_mask
from listopd_jax.rollout.scoring import completion_hidden
from listopd_jax.train.accumulate import accumulated_grad
from listopd_jax.train.optimizer import TrainState, apply_gradients

NONE = nnx.State({})


def cross_entropy(
    logits: Float[Array, "c V"], rows: tuple[Int[Array, " c"], Float[Array, " c"]], _: None
) -> tuple[Float[Array, ""], dict[str, Float[Array, " c"]]]:
    """Σ −w log π(token) over rows (token, w); per row, times w, the entropy and whether its token is the likeliest."""
    tokens, weights = rows
    logp = jax.nn.log_softmax(logits)
    own = take_token(logp, tokens)
    right = own >= logp.max(-1)
    return -(weights * own).sum(), {"entropy": weights * entropy_of(logp), "accuracy": weights * right}


def make_sft_step(
    graphdef: nnx.GraphDef, tx: optax.GradientTransformation, vocab: int, chunk: int, microbatch: int = 0
) -> Callable:
    """A jitted step(state, batch, lr, frozen) → (state, metrics); `batch` as in listopd_jax.data.batches, or packed.

    `frozen` are the parameters that an adapter trains on top of; none where the whole model trains.
    Metrics are scalars: loss (nats per token), entropy, accuracy (share of answer tokens that were the likeliest),
    grad_norm, tokens (answer tokens in the batch).
    """

    def loss_of(params, rows, frozen):
        batch, weights = rows
        decoder, answers = nnx.merge(graphdef, with_adapter(frozen, params)), batch["answer"][:, None]
        if "starts" in batch:  # packed, see listopd_jax.data.packing
            hidden = decoder.states_at(batch["row"], batch["places"], batch["starts"])
        else:
            # The same pass that scores rollouts, with one completion per prompt. No logits are computed for the prompt.
            hidden = completion_hidden(decoder, batch["prompt"], batch["prompt_length"], answers)
        flat = hidden.reshape(-1, hidden.shape[-1]), decoder.head_weight()
        rows = answers.reshape(-1), weights.reshape(-1)
        loss, means = fused_loss(cross_entropy, vocab, chunk, *flat, rows, None)
        return loss, jax.tree.map(lambda x: x.reshape(weights.shape), means)

    def step(state: TrainState, batch, lr, frozen=NONE):
        mask = completion_mask(batch["answer_length"][:, None], batch["answer"].shape[-1])
        weights = token_weights(mask.astype(jnp.float32), "token")
        loss_of_rows = functools.partial(loss_of, frozen=frozen)
        # As in opd_step: cast once for all microbatches, while AdamW updates the float32 parameters.
        params = cast_once(state.params, nnx.merge(graphdef, with_adapter(frozen, state.params)).dtype)
        loss, grads, means = accumulated_grad(loss_of_rows, params, (batch, weights), microbatch)
        metrics = {
            "loss": loss,
            **{name: x.sum() for name, x in means.items()},
            "tokens": mask.sum(),
            "grad_norm": optax.tree.norm(grads),
        }
        return apply_gradients(state, grads, lr, tx), metrics

    return jax.jit(step, donate_argnums=0, compiler_options=backend_options(UPDATE))
