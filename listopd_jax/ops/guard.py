"""The guard: extrapolate a token only where the target keeps the teacher's mode (docs/theory.md, mode flip).

The base-relative target π_B(π_T/π_B)^λ prefers a rival v to the teacher's modal token m from λ_flip on: where the base
is surer of m than the teacher is, extrapolation takes mass away from m. A structural token that flips breaks the
contract. The guard gives each position a λ of its own: λ where λ·margin ≤ λ_flip, 1 (plain distillation) elsewhere.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from listopd_jax.ops.head import pick


def flip_lambda(
    teacher: Float[Array, "*s V"], base: Float[Array, "*s V"], mode: Int[Array, "*s"]
) -> Float[Array, "*s"]:
    """The λ from which the target prefers another token to `mode`, ∞ if none; from log-probabilities, traceable.

    min over v with Δ_B > Δ_T of Δ_B / (Δ_B − Δ_T), Δ = log π(mode) − log π(v): the float32 twin of
    `theory.thresholds.flip_lambda_from_log_probs`.
    """
    margin_t, margin_b = (pick(logp, mode)[..., None] - logp for logp in (teacher, base))
    is_rival = (margin_b > margin_t) & (jnp.arange(teacher.shape[-1]) != mode[..., None])
    gap = jnp.where(is_rival, margin_b - margin_t, 1.0)
    quotient = jnp.where(jnp.isfinite(margin_b), margin_b / gap, 1.0)
    return jnp.where(is_rival, quotient, jnp.inf).min(-1)


def guarded_lambda(
    lam: Float[Array, ""], flip: Float[Array, "*s"], margin: Float[Array, ""]
) -> Float[Array, "*s"]:
    """λ_t of each position: `lam` where it is at most 1 or `lam`·`margin` ≤ λ_flip, else 1."""
    return jnp.where((lam <= 1) | (lam * margin <= flip), lam, 1.0)
