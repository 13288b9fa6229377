"""Exact gradients in microbatches: the loss is a weighted sum over tokens whose weights are known beforehand."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from listopd_jax.parallel.rules import constrain_state, from_chunks, row_multiple, to_chunks
from listopd_jax.train.optimizer import to_float32, tree_add


def accumulated_grad(loss_of: Callable, params: Any, batch: Any, microbatch: int) -> tuple[Any, Any, Any]:
    """Loss, gradient and auxiliary output of `loss_of(params, rows) → (loss, aux)` summed over microbatches of rows.

    `batch` is a pytree of arrays with a leading row axis B that `microbatch` divides (0, or B and more: all). The
    losses of the microbatches must add up to the loss of the batch; `aux` is a pytree with a leading row axis. The
    gradient is float32, whatever `params` are.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if microbatch == 0 or microbatch >= rows:  # a loop of one iteration would still copy its carry
        (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(params, batch)
        return loss, constrain_state(to_float32(grads)), aux
    # `to_chunks` counts rows per device, `microbatch` over all devices.
    parts = jax.tree.map(lambda x: to_chunks(x, microbatch // row_multiple()), batch)
    grad = jax.value_and_grad(loss_of, has_aux=True)

    def one(total, part):
        (loss, aux), grads = grad(params, part)
        return tree_add(total, (loss, constrain_state(grads))), aux

    # Summed in float32 whatever the parameters are: bfloat16 would lose the smaller terms.
    zero = (jnp.float32(0), constrain_state(jax.tree.map(jnp.zeros_like, to_float32(params))))
    (loss, grads), aux = jax.lax.scan(one, zero, parts)
    return loss, grads, jax.tree.map(lambda x: from_chunks(x, rows), aux)
