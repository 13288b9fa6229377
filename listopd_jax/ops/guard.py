"""The guard: extrapolate a token only where the target keeps the teacher's mode (docs/theory.md, mode flip).

The base-relative target π_B(π_T/π_B)^λ prefers a rival v to the teacher's modal token m from λ_flip on: where the base
is surer of m than the teacher is, extrapolation takes mass away from m. A structural token that flips breaks the
contract. The guard gives each position a λ of its own: λ where λ·margin ≤ λ_flip, and elsewhere a fallback that keeps
m: the teacher (λ = 1) or, where it has the same mode, the base (λ = 0), which is surer of m against v exactly there.

Guarded everywhere, the greedy target is the teacher's own answer at every λ. With scope "structure" a flip to another
score does not count: the contract allows it, and scores are what extrapolation can improve.

Three more guards need no margin and go together with it. `mask` leaves teacher and base only the tokens that the
contract allows next, the one guard that repairs a teacher whose own mode breaks the list. `floor` = μ keeps the mode m
ahead of each rival v on its own, log q_m/q_v = max(λΔ_T − (λ−1)Δ_B, min(Δ_B, μ)), and leaves λ to all other tokens.
`structure` is a λ of its own for the positions that choose no score: the simple rule that the others must beat.

`limit` is not a guard: the target gives way to where the estimator with ratio `teacher_student` and clip `clip` ends.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from listopd_jax.ops.grammar import Grammar, allowed_tokens, chooses_score, content_tokens
from listopd_jax.ops.head import take_token
from listopd_jax.ops.limit import teacher_student_limit

IMPOSSIBLE = -1e9  # log-probability of a masked token; finite, since λ(−∞) + (1−λ)(−∞) is undefined


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["margin", "grammar", "clip"],
    meta_fields=["fallback", "scope", "mask", "floor", "structure", "limit"],
)
@dataclasses.dataclass(frozen=True)
class Guard:
    """What changes the target at a position (see the module); scope, mask, floor and structure need the grammar.

    fallback "": no margin is kept. floor 0, structure below 0: off.
    """

    margin: Any = 0.0  # a scalar, or what stands for one in a pytree
    fallback: str = ""
    grammar: Grammar | None = None
    scope: str = "all"
    mask: bool = False
    floor: float = 0.0
    structure: float = -1.0
    limit: bool = False
    clip: Any = 0.0


class Guarded(NamedTuple):
    """A position under a guard: log-distributions, λ_t and the target's logits; which tokens are allowed, None: all."""

    teacher: Float[Array, "*s V"]
    base: Float[Array, "*s V"]
    lam: Float[Array, "*s"]
    target: Float[Array, "*s V"]
    allowed: Bool[Array, "*s V"] | None


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
    # 1 where there is no rival: no division by 0.
    gap = jnp.where(is_rival, margin_b - margin_t, 1.0)
    # If the base rules v out, Δ_B is ∞ and the quotient tends to 1.
    quotient = jnp.where(jnp.isfinite(margin_b), margin_b / gap, 1.0)
    return jnp.where(is_rival, quotient, jnp.inf).min(-1)


def guarded(
    teacher: Float[Array, "*s V"],
    base: Float[Array, "*s V"],
    lam: Float[Array, "*#s"],
    guard: Guard,
    state: Int[Array, "*s"] | None = None,
) -> Guarded:
    """Positions of a run at `lam` under `guard`, from log-distributions; `state` is of its grammar, if it has one."""
    # The order matters: the mask changes the two distributions that the margin compares, and the floor bounds
    # whatever target the others leave.
    allowed, harmless = None, False
    if guard.mask:
        allowed = allowed_tokens(guard.grammar, state)
        teacher, base = (_masked(logp, allowed) for logp in (teacher, base))
    if guard.scope == "structure":
        harmless = content_tokens(guard.grammar, state)
    lam = jnp.broadcast_to(lam, teacher.shape[:-1])
    if guard.structure >= 0:
        lam = jnp.where(chooses_score(guard.grammar, state), lam, guard.structure)
    if guard.fallback:
        lam = guarded_lambda(teacher, base, lam, guard.margin, guard.fallback, harmless)
    target = lam[..., None] * teacher + (1 - lam[..., None]) * base
    if guard.limit:
        target = teacher_student_limit(teacher, base, lam, guard.clip)
    if guard.floor:
        target = _floored(target, teacher, base, guard.floor, harmless)
    return Guarded(teacher, base, lam, target, allowed)


def guarded_lambda(
    teacher: Float[Array, "*s V"],
    base: Float[Array, "*s V"],
    lam: Float[Array, "*#s"],
    margin: Float[Array, ""],
    fallback: str,
    harmless: Bool[Array, "*s V"] | bool = False,
) -> Float[Array, "*s"]:
    """λ_t of each position from log-probabilities: `lam`, or where that flips, `fallback`'s (at most `lam`).

    `fallback` is "teacher" (1) or "base" (0 where base and teacher have one mode, else 1).
    """
    mode = teacher.argmax(-1)
    kept = lam * margin <= flip_lambda(teacher, base, mode, harmless)
    agrees = base.argmax(-1) == mode
    # The base is safe only where it has the same mode.
    safe = jnp.where(agrees, 0.0, 1.0) if fallback == "base" else 1.0
    # A run below λ = 1 must not extrapolate further because of its guard.
    return jnp.where(kept, lam, jnp.minimum(lam, safe))


def _masked(logp: Float[Array, "*s V"], allowed: Bool[Array, "*s V"]) -> Float[Array, "*s V"]:
    """The distribution over what is allowed."""
    rest = jnp.where(allowed, logp, IMPOSSIBLE)
    # The normaliser shifted masked entries too. They must be equal in teacher and base, so that every λ leaves them
    # IMPOSSIBLE.
    return jnp.where(allowed, rest - jax.nn.logsumexp(rest, -1, keepdims=True), IMPOSSIBLE)


def _floored(target, teacher, base, floor: float, harmless) -> Float[Array, "*s V"]:
    """The target's logits, rivals of the teacher's mode lowered to min(Δ_B, `floor`) below it."""
    mode = teacher.argmax(-1)
    margin = jnp.minimum(take_token(base, mode)[..., None] - base, floor)
    exempt = (jnp.arange(base.shape[-1]) == mode[..., None]) | harmless
    return jnp.where(exempt, target, jnp.minimum(target, take_token(target, mode)[..., None] - margin))
