"""Drafts that are confirmed as often as a trained model confirms them, for rollouts of random weights.

Random weights confirm no draft. To time a drafted rollout at sizes that nobody has trained here, each drafted token is
confirmed with a given probability instead of being compared; all else is the program that a job runs.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from listopd_jax.rollout import decode
from listopd_jax.rollout.state import Rows

RESOLUTION, PRIME = 1000, 7919


@contextlib.contextmanager
def confirmed(probability: float | None) -> Iterator[None]:
    """While inside, rollouts confirm each draft with `probability`; None: where it is right.

    Every compiled program of the process is forgotten at both ends: it would stay as it was compiled.
    """
    if probability is None:
        yield
        return

    def num_kept(rows: Rows, tokens: Int[Array, "B n S"], drafted: Array, eos: tuple[int, ...]) -> Array:
        # The sampled ids of random weights are as good as random numbers.
        confirmed = tokens[..., :-1] * PRIME % RESOLUTION < round(probability * RESOLUTION)
        count = 1 + jnp.cumprod(confirmed, axis=-1).sum(-1)
        return jnp.where(rows.done, 0, jnp.minimum(count, rows.budgets - rows.rollout.lengths))

    jax.clear_caches()
    with mock.patch.object(decode, "_num_kept", num_kept):
        yield
    jax.clear_caches()
