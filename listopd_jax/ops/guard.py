"""The guard: extrapolate a token only where the target keeps the teacher's mode (docs/theory.md, mode flip).

The base-relative target π_B(π_T/π_B)^λ prefers a rival v to the teacher's modal token m from λ_flip on: where the base
is surer of m than the teacher is, extrapolation takes mass away from m. A structural token that flips breaks the
contract. The guard gives each position a λ of its own: λ where λ·margin ≤ λ_flip, and elsewhere a fallback that keeps
m: the teacher (λ = 1) or, where it has the same mode, the base (λ = 0), which is surer of m against v exactly there.

Guarded everywhere, the greedy target is the teacher's own answer at every λ. With scope "structure" a flip to another
score is none: the contract allows it, and what extrapolation can improve are the scores.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from listopd_jax.ops.grammar import Grammar, content_tokens
from listopd_jax.ops.head import take_token


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["margin", "grammar"], meta_fields=["fallback"]
)
@dataclasses.dataclass(frozen=True)
class Guard:
    """How λ is lowered: see `guarded_lambda`. With a grammar only flips that change more than a score count."""

    margin: Any  # a scalar, or what stands for one in a pytree
    fallback: str
    grammar: Grammar | None = None


def flip_lambda(
    teacher: Float[Array, "*s V"],
    base: Float[Array, "*s V"],
    mode: Int[Array, "*s"],
    harmless: Bool[Array, "*s V"] | bool = False,
) -> Float[Array, "*s"]:
    """The λ from which the target prefers another token to `mode`, ∞ if none; from log-probabilities, traceable.

    min over v with Δ_B > Δ_T of Δ_B / (Δ_B − Δ_T), Δ = log π(mode) − log π(v); `harmless` tokens v do not count.
    """
    margin_t, margin_b = (take_token(logp, mode)[..., None] - logp for logp in (teacher, base))
    is_rival = (
        (margin_b > margin_t) & (jnp.arange(teacher.shape[-1]) != mode[..., None]) & ~jnp.asarray(harmless)
    )
    gap = jnp.where(is_rival, margin_b - margin_t, 1.0)
    quotient = jnp.where(jnp.isfinite(margin_b), margin_b / gap, 1.0)
    return jnp.where(is_rival, quotient, jnp.inf).min(-1)


def guarded_weights(
    logits: Sequence[Float[Array, "*s V"]],
    weights: Float[Array, "*#s 2"],
    guard: Guard,
    state: Int[Array, "*s"] | None,
) -> Float[Array, "*s 2"]:
    """The weights λ_t and 1 − λ_t of teacher and base at each position, of those that `weights` ask for."""
    teacher, base = map(jax.nn.log_softmax, logits)
    lam = guarded_lambda(teacher, base, weights[..., 0], guard, state)
    return jnp.stack([lam, 1 - lam], -1)


def guarded_lambda(
    teacher: Float[Array, "*s V"],
    base: Float[Array, "*s V"],
    lam: Float[Array, "*#s"],
    guard: Guard,
    state: Int[Array, "*s"] | None = None,
) -> Float[Array, "*s"]:
    """λ_t of each position from log-probabilities: `lam`, or where that flips, that of the fallback (at most `lam`).

    The fallback is "teacher" (1) or "base" (0 where base and teacher have one mode, else 1). `state`: of the guard's
    grammar, where it has one.
    """
    mode = teacher.argmax(-1)
    harmless = False if guard.grammar is None else content_tokens(guard.grammar, state)
    kept = lam * guard.margin <= flip_lambda(teacher, base, mode, harmless)
    agrees = base.argmax(-1) == mode
    safe = jnp.where(agrees, 0.0, 1.0) if guard.fallback == "base" else 1.0
    return jnp.where(kept, lam, jnp.minimum(lam, safe))
