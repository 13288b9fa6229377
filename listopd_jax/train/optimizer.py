"""AdamW with a traced learning rate, the schedules that produce it, and the average of the weights."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, BFloat16, Float

from listopd_jax.parallel.compiler import OTHER, BackendJit
from listopd_jax.parallel.rules import constrain_state, place_state


class TrainState(NamedTuple):
    """The state of training: parameters of the student, Adam's moments, and the average if one is kept."""

    params: Any
    opt_state: Any
    average: Any = None  # of the parameters so far (`with_average`)

    @property
    def trees(self) -> dict[str, Any]:
        """Its parts by name, without an average that is not kept."""
        return {name: tree for name, tree in self._asdict().items() if tree is not None}

    @property
    def result(self) -> str:
        """The name of the part that is evaluated and exported."""
        return "params" if self.average is None else "average"


def adamw(
    optimizer: ml_collections.ConfigDict, b2: float, moments: str = "float32"
) -> optax.GradientTransformation:
    """Clipping by global norm (0: none), Adam and decoupled weight decay, without the learning rate.

    moments: the dtype that Adam's moments are kept in, float32 or bfloat16.
    """
    clip = optax.clip_by_global_norm(optimizer.max_grad_norm) if optimizer.max_grad_norm else optax.identity()
    adam = optax.scale_by_adam(optimizer.b1, b2)
    adam = adam if moments == "float32" else _in_bfloat16(adam)
    return optax.chain(clip, adam, optax.add_decayed_weights(optimizer.weight_decay))


def _in_bfloat16(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """`adam` with moments kept in bfloat16, half the memory, rounded stochastically so that the mean is right.

    Rounded to nearest, the second moment would not move: at b2 = .999 a step changes it by less than bfloat16 tells.
    """

    def init(params):
        return _stored(adam.init(params))

    def update(grads, state, params=None):
        exact = state._replace(mu=to_float32(state.mu), nu=to_float32(state.nu))
        updates, state = adam.update(grads, exact, params)
        return updates, _stored(state)

    return optax.GradientTransformation(init, update)


def to_float32(tree: Any) -> Any:
    """The same arrays in float32, without copying those that are."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _stored(state: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
    """The state with its moments in bfloat16; the random numbers are derived from its count."""
    leaves, tree = jax.tree.flatten((state.mu, state.nu))
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), state.count), len(leaves))
    mu, nu = tree.unflatten(map(stochastic_round, keys, leaves))
    return state._replace(mu=mu, nu=nu)


def stochastic_round(key: Array, x: Float[Array, "*s"]) -> BFloat16[Array, "*s"]:
    """float32 to one of the two bfloat16 around it, to the nearer with the larger probability: x on average."""
    random = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    # `random` is uniform on [0, 2^16): the sum carries with the probability of the part that is cut off.
    words = (
        jax.lax.bitcast_convert_type(x, jnp.uint32) + random
    )  # carries into the upper half, which is the bfloat16
    upper = (words >> 16).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(upper, jnp.bfloat16)


def init_state(params: Any, tx: optax.GradientTransformation, average: bool = False) -> TrainState:
    """A fresh state that takes over `params`: steps donate their state. `average`: that of the weights is kept too."""
    # A copy: both are donated, and one buffer cannot be donated twice.
    kept = jax.tree.map(jnp.copy, params) if average else None
    return place_state(TrainState(params, tx.init(params), kept))


def apply_gradients(
    state: TrainState, grads: Any, lr: Float[Array, ""], tx: optax.GradientTransformation
) -> TrainState:
    """One AdamW step; `lr` is traced, so that a schedule or a sweep over it never recompiles."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    # Weight decay is in `u` already, so the learning rate scales it too (AdamW as in PyTorch and optax).
    params = jax.tree.map(lambda p, u: (p - lr * u).astype(p.dtype), state.params, updates)
    return constrain_state(state._replace(params=params, opt_state=opt_state))


def cosine_lr(step: int, steps: int, peak: float, warmup_steps: int) -> float:
    """Learning rate at 0-based `step`: linear to `peak` over the warm-up, then half a cosine to 0 after `steps`."""
    if step < warmup_steps:
        # + 1: at a rate of 0 the first step would change nothing.
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def linear_lr(step: int, steps: int, peak: float) -> float:
    """Learning rate at 0-based `step`: linear from `peak` to 0 after `steps`."""
    return peak * max(0.0, 1 - step / steps)


def average_rate(step: int, decay: float) -> float:
    """The rate of the weights after 0-based `step` in their exponential moving average: 1 at the first.

    The average has the weights decay^(t−i) of the steps i ≤ t, divided by their sum (Kingma & Ba 2015, §3): where a run
    starts from does not count.
    """
    return (1 - decay) / (1 - decay ** (step + 1))


@functools.partial(BackendJit, options=OTHER, donate_argnums=0)
def with_average(state: TrainState, rate: Float[Array, ""]) -> TrainState:
    """`state` with its average moved to the parameters by `rate` of the way (`average_rate`)."""
    average = jax.tree.map(lambda a, p: (a + rate * (p - a)).astype(a.dtype), state.average, state.params)
    return constrain_state(state._replace(average=average))


def tree_add(a: Any, b: Any) -> Any:
    """Sum of two pytrees, leaf by leaf."""
    return jax.tree.map(jnp.add, a, b)
