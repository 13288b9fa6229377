"""The extrapolated on-policy distillation objective: advantages, importance ratios, losses (EC §2).

Per sampled token a_t ~ π_S, with π_T the teacher and π_B the base (all log-probabilities float32):

    A_t = λ(log π_T − log π_B) − (log π_S − log π_B)        EC Eq. 2, `base_relative`
    A_t = λ log π_T − log π_S                                `no_base`
    ρ_t = min(c, π_T/π_S)                                    EC Eq. 3, `teacher_student`
    L   = −Σ_t sg(ρ_t A_t) log π_S(a_t)

`full_vocab` replaces the sampled estimate by the exact reverse KL per position to the same target,
log target = λ log π_T + (1−λ) log π_B − log Z. The target is per token, given the prefix: no return-to-go, so it is
not the tilt of whole sequences by (π_T/π_B)^λ. With a ratio other than 1 the limit is not the target either, and
`no_base` can lose the teacher's mode (docs/theory.md §2). `normalize` (ours) subtracts the position's log Z from A_t: A
is then log target − log π_S, which vanishes at the target, and the limit is the target for every ratio.

`jsd` < 1 takes the exact divergence of GKD (arXiv:2306.13649) in place of the reverse KL, see `divergence`.

`control_variate` subtracts from ρA a number per position that does not depend on the sampled token, so that the
expected gradient is the same. `kl`: the mean of ρA under the student; where the ratio is 1, −KL(π_S‖target), up to
log Z (vOPD, arXiv:2605.07865). `optimal` (ours): the mean in which token v counts π_S(v)·‖e_v − π_S‖², its share of the
squared gradient in the logits; no other number leaves less variance there, and none is left between two tokens.

Everything a sweep varies is a traced number in `Hyper`; what changes the program is static in `Variant`. In a guarded
run λ is a number per position, so the losses take it by name in addition to `Hyper`, as they take log Z
(listopd_jax.ops.opd_loss decides both).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from listopd_jax.ops.head import entropy_of, take_token


class Hyper(NamedTuple):
    """Traced scalars of the objective, given by keyword: a sweep over them never recompiles."""

    lam: Float[Array, ""]  # λ of the run; the losses are given that of each position
    clip: Float[Array, ""]  # c, may be inf
    kl_to_base: Float[Array, ""]  # β
    entropy_bonus: Float[Array, ""]  # γ
    ppo_clip: Float[Array, ""]  # ε; only read where Variant.ppo
    guard_margin: Float[Array, ""] | float = 1.0  # only read where Variant.guard


class Variant(NamedTuple):
    """Static choices of the objective; one name per variant of the module's docstring."""

    ratio: str = "teacher_student"
    advantage: str = "base_relative"
    estimator: str = "sampled"
    aggregate: str = "token"
    ppo: bool = False
    guard: str = ""  # fallback of listopd_jax.ops.guard, a λ for each position; empty: no margin is kept
    scope: str = "all"  # these too are fields of its Guard
    mask: bool = False
    floor: float = 0.0
    structure: float = -1.0
    normalize: bool = False  # whether log Z is subtracted from the advantage of sampled tokens
    control_variate: str = ""  # kl or optimal: what is subtracted from their weight; empty: nothing
    jsd: float = 1.0  # β of `divergence`, for full_vocab
    flips: bool = False  # whether `flipped` is computed for each position


BANNED = -8.0
"""The advantage of a token that a mask forbids, whose own would be −∞."""


def warmed_up_lambda(lam: float, step: int, warmup_steps: int) -> float:
    """λ at 0-based `step`: linear from 1 (plain distillation) to `lam` over `warmup_steps`, then constant."""
    return lam if step >= warmup_steps else 1.0 + (lam - 1.0) * step / warmup_steps


def advantage(student, teacher, base, lam, kind: str) -> Float[Array, "*s"]:
    """A_t of EC Eq. 2 (`base_relative`) or without the base (`no_base`), from the sampled tokens' log-probabilities."""
    if kind == "base_relative":
        return lam * (teacher - base) - (student - base)
    return lam * teacher - student


def importance_ratio(student, teacher, rollout, adv, clip, kind: str) -> Float[Array, "*s"]:
    """The clipped weight ρ_t ≤ c of each token.

    `teacher_student`: min(c, π_T/π_S), EC Eq. 3. `trainer_rollout`: min(c, π_S/π_rollout), the mismatch between the
    training and the sampling program. `aspo`: with w = π_T/π_S, min(c, 1/w) where A > 0 and min(c, w) elsewhere.
    `none`: 1.
    """
    if kind == "none":
        return jnp.ones_like(student)
    log_ratio = student - rollout if kind == "trainer_rollout" else teacher - student
    if kind == "aspo":
        log_ratio = jnp.where(adv > 0, -log_ratio, log_ratio)
    # min in log space: exp would overflow for a token that the student finds far less likely than the teacher
    return jnp.exp(jnp.minimum(log_ratio, jnp.log(clip)))


def _token_weight(
    student, teacher, base, rollout, hyper: Hyper, variant: Variant, *, lam, shift, banned=False
):
    """The factor of −log π_S of a token in the loss, its advantage plus `shift`, and its ratio."""
    adv = advantage(student, teacher, base, lam, variant.advantage) + shift
    ratio = importance_ratio(student, teacher, rollout, adv, hyper.clip, variant.ratio)
    adv, ratio = jnp.where(banned, BANNED, adv), jnp.where(banned, 1.0, ratio)
    return ratio * adv - hyper.kl_to_base * (student - base), adv, ratio


def expected_weight(
    student, teacher, base, hyper: Hyper, variant: Variant, *, lam, log_z
) -> Float[Array, "*s"]:
    """The control variate, a mean over v of the weight of v, from log-distributions [*s, V]; no gradient.

    On the policy: the student samples, so that the ratio `trainer_rollout` is 1. `lam` and `log_z` are one for all or
    one per position.
    """
    student = jax.lax.stop_gradient(student)
    lam, shift = jnp.asarray(lam)[..., None], -jnp.asarray(log_z)[..., None]
    weight, *_ = _token_weight(student, teacher, base, student, hyper, variant, lam=lam, shift=shift)
    p = jnp.exp(student)
    # Both are means over the vocabulary, so they do not depend on the sampled token and leave the gradient unbiased.
    counts = p * _squared_scores(p) if variant.control_variate == "optimal" else p
    return (counts * weight).sum(-1) / counts.sum(-1)


def _squared_scores(p: Float[Array, "*s V"]) -> Float[Array, "*s V"]:
    """‖e_v − p‖², the squared gradient of log π(v) in the logits; above 0 even where p is 1 to rounding.

    Of the mode it is summed from the other tokens: 1 − p would keep no digit of it.
    """
    is_mode = jnp.arange(p.shape[-1]) == p.argmax(-1, keepdims=True)
    rest = jnp.where(is_mode, 0.0, p)
    total, squares = rest.sum(-1, keepdims=True), (rest**2).sum(-1, keepdims=True)
    of_mode, of_rest = total**2 + squares, (1 - p) ** 2 + (1 - total) ** 2 + squares - rest**2
    return jnp.where(is_mode, of_mode, of_rest) + jnp.finfo(p.dtype).tiny


def sampled_loss(
    student, entropy, teacher, base, rollout, hyper: Hyper, variant: Variant, *, lam, log_z=0.0, reward=0.0,
    baseline=0.0, banned=False,
):  # fmt: skip
    """Per-token loss and metrics from log-probabilities of the sampled tokens, all of one shape.

    `student` and `entropy` carry the gradient; teacher, base, rollout and what is given by name, one for all or one for
    each token, are constants. `log_z` is that of `log_normalizer` where Variant.normalize, `baseline` that of
    `expected_weight` where Variant.control_variate, else 0; `reward` is added to the advantage. A `banned` token has
    the advantage BANNED and the ratio 1. β enters as the sampled (score-function) gradient of KL(π_S‖π_B), without the
    ratio, γ as the exact entropy.
    Returns (loss, {"advantage", "ratio"}).
    """
    weight, adv, ratio = _token_weight(
        jax.lax.stop_gradient(student), teacher, base, rollout, hyper, variant,
        lam=lam, shift=reward - log_z, banned=banned,
    )  # fmt: skip
    weight = weight - baseline
    if variant.ppo:
        # PPO's ratio π_S/π_rollout carries the gradient; `minimum` takes the pessimistic one of the two bounds.
        change = jnp.exp(student - rollout)
        bounded = jnp.clip(change, 1 - hyper.ppo_clip, 1 + hyper.ppo_clip)
        loss = -jnp.minimum(weight * change, weight * bounded)
    else:
        loss = -weight * student
    return loss - hyper.entropy_bonus * entropy, {"advantage": adv, "ratio": ratio}


def target_log_distribution(teacher, base, lam, kind: str) -> Float[Array, "*s V"]:
    """log of the normalised target of the flow, π_B(π_T/π_B)^λ, or π_T^λ for `no_base`."""
    return jax.nn.log_softmax(_extrapolated(teacher, base, lam, kind))


def log_normalizer(teacher, base, lam, kind: str) -> Float[Array, "*s"]:
    """log Z of the target, from log-distributions [*s, V]: the same constant in the advantage of every token."""
    return jax.nn.logsumexp(_extrapolated(teacher, base, jnp.asarray(lam)[..., None], kind), -1)


def flipped(teacher, base, lam, kind: str) -> Float[Array, "*s"]:
    """1 where the target has another mode than the teacher, else 0, from log-distributions [*s, V]."""
    target = _extrapolated(teacher, base, jnp.asarray(lam)[..., None], kind)
    return (target.argmax(-1) != teacher.argmax(-1)).astype(jnp.float32)


def _extrapolated(teacher, base, lam, kind: str) -> Float[Array, "*s V"]:
    return lam * teacher + (1 - lam) * base if kind == "base_relative" else lam * teacher


def divergence(student, target, beta: float) -> Float[Array, "*s"]:
    """GKD's generalised Jensen–Shannon divergence (arXiv:2306.13649, Eq. 5) of log-distributions [*s, V].

    With the mixture m = β·target + (1−β)·π_S it is β KL(target‖m) + (1−β) KL(π_S‖m). The ends stand for their limits
    as trl has them: β = 1 is the reverse KL(π_S‖target), β = 0 the forward KL(target‖π_S).
    """
    if beta == 1:
        return _kl(student, target)
    if beta == 0:
        return _kl(target, student)
    mixture = jnp.logaddexp(student + jnp.log1p(-beta), target + jnp.log(beta))
    return beta * _kl(target, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(p, q) -> Float[Array, "*s"]:
    return (jnp.exp(p) * (p - q)).sum(-1)


def full_vocab_loss(
    student, teacher, base, tokens, hyper: Hyper, variant: Variant, *, lam, target=None, allowed=None
):
    """Exact per-position loss KL(π_S‖target) + β KL(π_S‖π_B) − γ H(π_S) from log-distributions [*s, V].

    With Variant.jsd below 1 its `divergence` takes the place of the first term. Zero variance given the visited prefix.
    `lam` is one for all or one per position; `target`, log-probabilities [*s, V], stands in for the one that λ gives;
    what is not `allowed` has the advantage BANNED. Returns (loss [*s], {"advantage", "ratio"}): the advantage of the
    visited `tokens` against the target of the reverse KL, for the same metrics as the sampled estimator; the ratio is
    1.
    """
    if target is None:
        target = target_log_distribution(teacher, base, jnp.asarray(lam)[..., None], variant.advantage)
    if allowed is not None:
        # log π_S − log target = −BANNED for a banned token, however unlikely it is: finite, and it never fades.
        target = jnp.where(allowed, target, jax.lax.stop_gradient(student) + BANNED)
    loss = divergence(student, target, variant.jsd)
    loss = loss + hyper.kl_to_base * _kl(student, base) - hyper.entropy_bonus * entropy_of(student)
    at = [jax.lax.stop_gradient(take_token(x, tokens)) for x in (student, teacher, base)]
    adv = advantage(*at, lam, variant.advantage)
    return loss, {"advantage": adv, "ratio": jnp.ones_like(adv)}


def token_weights(mask: Float[Array, "B n T"], aggregate: str) -> Float[Array, "B n T"]:
    """Weights that turn per-token losses into the loss by a sum: they add up to 1 over the whole batch.

    `token`: the mean over all completion tokens of the global batch. `sequence`: the mean over sequences of each
    sequence's token mean.
    """
    if aggregate == "token":
        # At least 1: a batch of empty completions has loss 0, not NaN.
        return mask / jnp.maximum(mask.sum(), 1.0)
    lengths = mask.sum(-1, keepdims=True)
    return mask / jnp.maximum(lengths, 1.0) / jnp.maximum((lengths > 0).sum(), 1)
