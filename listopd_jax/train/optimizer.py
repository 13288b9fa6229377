"""AdamW with a traced learning rate, and the schedules that produce it."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float

from listopd_jax.parallel.rules import constrain_state, place_state


class TrainState(NamedTuple):
    """What one optimisation step changes: parameters of the student and Adam's moments."""

    params: Any
    opt_state: Any


def adamw(optimizer: ml_collections.ConfigDict, b2: float) -> optax.GradientTransformation:
    """Clipping by global norm (0: none), Adam moments and decoupled weight decay, without the learning rate."""
    clip = optax.clip_by_global_norm(optimizer.max_grad_norm) if optimizer.max_grad_norm else optax.identity()
    adam = optax.scale_by_adam(optimizer.b1, b2)
    return optax.chain(clip, adam, optax.add_decayed_weights(optimizer.weight_decay))


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """A fresh state at a copy of `params`: steps donate their state, and OPD students start from the frozen base."""
    return place_state(TrainState(jax.tree.map(jnp.copy, params), tx.init(params)))


def apply_gradients(
    state: TrainState, grads: Any, lr: Float[Array, ""], tx: optax.GradientTransformation
) -> TrainState:
    """One AdamW step; `lr` is traced, so that a schedule or a sweep over it never recompiles."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: (p - lr * u).astype(p.dtype), state.params, updates)
    return constrain_state(TrainState(params, opt_state))


def cosine_lr(step: int, steps: int, peak: float, warmup_steps: int) -> float:
    """Learning rate at 0-based `step`: linear to `peak` over the warm-up, then half a cosine to 0 after `steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def tree_add(a: Any, b: Any) -> Any:
    """Sum of two pytrees, leaf by leaf."""
    return jax.tree.map(jnp.add, a, b)
