"""The guard: extrapolate a token only where the target keeps the teacher's mode (docs/theory.md, mode flip).

The base-relative target π_B(π_T/π_B)^λ prefers a rival v to the teacher's modal token m from λ_flip on: where the base
is surer of m than the teacher is, extrapolation takes mass away from m. A structural token that flips breaks the
contract. The guard gives each position a λ of its own: λ where λ·margin ≤ λ_flip, and elsewhere a fallback that keeps
m: the teacher (λ = 1) or, where it has the same mode, the base (λ = 0), which is surer of m against v exactly there.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from listopd_jax.ops.head import take_token


def flip_lambda(
    teacher: Float[Array, "*s V"], base: Float[Array, "*s V"], mode: Int[Array, "*s"]
) -> Float[Array, "*s"]:
    """The λ from which the target prefers another token to `mode`, ∞ if none; from log-probabilities, traceable.

    min over v with Δ_B > Δ_T of Δ_B / (Δ_B − Δ_T), Δ = log π(mode) − log π(v).
    """
    margin_t, margin_b = (take_token(logp, mode)[..., None] - logp for logp in (teacher, base))
    is_rival = (margin_b > margin_t) & (jnp.arange(teacher.shape[-1]) != mode[..., None])
    gap = jnp.where(is_rival, margin_b - margin_t, 1.0)
    quotient = jnp.where(jnp.isfinite(margin_b), margin_b / gap, 1.0)
    return jnp.where(is_rival, quotient, jnp.inf).min(-1)


def guarded_lambda(
    teacher: Float[Array, "*s V"],
    base: Float[Array, "*s V"],
    lam: Float[Array, "*#s"],
    margin: Float[Array, ""],
    fallback: str,
) -> Float[Array, "*s"]:
    """λ_t of each position from log-probabilities: `lam`, or where that flips, `fallback`'s (at most `lam`).

    `fallback` is "teacher" (1) or "base" (0 where base and teacher have one mode, else 1).
    """
    mode = teacher.argmax(-1)
    kept = lam * margin <= flip_lambda(teacher, base, mode)
    agrees = base.argmax(-1) == mode
    safe = jnp.where(agrees, 0.0, 1.0) if fallback == "base" else 1.0
    return jnp.where(kept, lam, jnp.minimum(lam, safe))
