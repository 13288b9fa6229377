"""The OPD loss from hidden states: student, teacher and base meet their heads a chunk of positions at a time.

The objective itself, per token, is listopd_jax.ops.objective; how the student's head gets its gradient without stored
logits is listopd_jax.ops.fused. Every position starts with the λ of `Hyper`, the guard lowers it where the
distributions of teacher and base are at hand (`_frozen_distributions`, for every estimator), and the loss takes it by
name. The same holds for log Z, which follows from those distributions and that λ (`_token_scores`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from listopd_jax.ops.fused import fused_loss
from listopd_jax.ops.gather_kernel import gather_logprobs
from listopd_jax.ops.grammar import Grammar
from listopd_jax.ops.guard import Guard, Guarded, guarded
from listopd_jax.ops.head import entropy_of, log_distribution, map_positions, take_token, token_logprobs
from listopd_jax.ops.objective import (
    Hyper,
    Variant,
    expected_weight,
    flipped,
    full_vocab_loss,
    log_normalizer,
    sampled_loss,
)


class Frozen(NamedTuple):
    """Something of each model that OPD never changes: parameters, hidden states, a head."""

    teacher: Any
    base: Any
    experts: tuple[Any, ...] = ()  # further teachers, where each row of a batch has its own

    @property
    def teachers(self) -> tuple[Any, ...]:
        """All teachers."""
        return self.teacher, *self.experts


class Models(NamedTuple):
    """Something of each of the three or more models: a static half, a decoder, hidden states, a head."""

    student: Any
    teacher: Any
    base: Any
    experts: tuple[Any, ...] = ()

    @property
    def frozen(self) -> Frozen:
        """Without the student's."""
        return Frozen(self.teacher, self.base, self.experts)


def opd_loss(
    hiddens: Models,
    heads: Models,
    tokens: Int[Array, " N"],
    rollout: Float[Array, " N"],
    weights: Float[Array, " N"],
    hyper: Hyper,
    variant: Variant,
    *,
    vocab: int,
    chunk: int,
    pallas: bool = False,
    reward: Float[Array, " N"] | None = None,
    grammar: Grammar | None = None,
    states: Int[Array, " N"] | None = None,
    own_teacher: Int[Array, " N"] | None = None,
    teacher: Float[Array, " N"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, " N"]]]:
    """Σ weight·loss over N completion positions (EC §2) and metrics of each; differentiable in the student's.

    Args:
      hiddens, heads: [N, D] and [V, D] of each model, which has its own width D and padded vocabulary V.
      tokens, rollout: the sampled tokens and their log-probability when they were sampled.
      weights: of each position's loss, 0 where there is no token.
      vocab, chunk: see `fused_loss`.
      grammar, states: for guards that know the contract; states are those of each position.
      pallas: score teacher and base by ops/gather_kernel.py, on a TPU, where no more than scores are needed.
      reward: of each sampled token, added to its advantage.
      own_teacher: with experts, whose row it is: 0 the teacher's, i the i-th expert's.
      teacher: log π_T of the tokens where that is all there is of a teacher: those of `hiddens` and `heads` are None.
    Returns the loss and, float32 [N]: advantage, ratio, lambda, entropy; student, teacher and base log-probabilities of
    the tokens; rollout; with Variant.flips, flip (`flipped`). They mean nothing where the weight is 0.
    """
    frozen = hiddens.frozen
    # Once, not in every chunk.
    frozen_heads = jax.tree.map(lambda w, h: w.astype(h.dtype), heads.frozen, frozen)
    # λ is per position from here on: a guard may lower some of them.
    rows = {"token": tokens, "rollout": rollout, "weight": weights, "lam": jnp.full_like(weights, hyper.lam)}
    rows |= {"state": states, "own_teacher": own_teacher}
    guard = _guard(variant, hyper, grammar)
    if variant.estimator == "full_vocab":
        f, rows["hiddens"] = _full_vocab, frozen
    else:
        f = _sampled
        rows |= {"log_z": jnp.zeros_like(weights), "banned": jnp.zeros(weights.shape, bool)}
        rows |= {} if reward is None else {"reward": reward}
        if variant.control_variate:  # which needs the distributions of all three models at one time
            rows["hiddens"] = frozen
        elif teacher is not None:
            score = gather_logprobs if pallas else functools.partial(_logprobs, chunk=chunk)
            rows |= {"teacher": teacher, "base": score(frozen.base, frozen_heads.base, tokens, vocab)}
        elif pallas and guard is None and not (variant.normalize or variant.flips):
            # The kernel gives no distributions.
            rows["teacher"], rows["base"] = _teacher_and_base(
                lambda h, w: gather_logprobs(h, w, tokens, vocab), frozen, frozen_heads, own_teacher
            )
        else:
            rows |= _frozen_scores(rows | {"hiddens": frozen}, frozen_heads, guard, variant, vocab, chunk)
    f = functools.partial(f, variant, vocab)
    return fused_loss(f, vocab, chunk, hiddens.student, heads.student, rows, (frozen_heads, hyper, guard))


def _logprobs(hidden, head, tokens: Int[Array, " N"], vocab: int, chunk: int) -> Float[Array, " N"]:
    """`gather_logprobs` in plain XLA."""
    return token_logprobs(hidden, head, tokens, vocab, chunk)[0]


def _guard(variant: Variant, hyper: Hyper, grammar: Grammar | None) -> Guard | None:
    """The guard that `variant` asks for, if any."""
    options = (variant.scope, variant.mask, variant.floor, variant.structure)
    guard = Guard(hyper.guard_margin, variant.guard, grammar, *options)
    return guard if variant.guard or variant.mask or variant.floor or variant.structure >= 0 else None


def _teacher_and_base(
    f: Callable[[Any, Any], Array], hiddens: Frozen, heads: Frozen, own_teacher: Int[Array, " n"] | None
) -> tuple[Array, Array]:
    """`f` (of hidden states and a head) of each row's own teacher, and of the base.

    Every teacher computes every row, so that shapes do not depend on whose rows a batch has.
    """
    teacher, base = f(hiddens.teacher, heads.teacher), f(hiddens.base, heads.base)
    for i, expert in enumerate(zip(hiddens.experts, heads.experts, strict=True), 1):
        # [n, 1] for distributions, [n] for log-probabilities of tokens.
        own = (own_teacher == i).reshape(-1, *[1] * (teacher.ndim - 1))
        teacher = jnp.where(own, f(*expert), teacher)
    return teacher, base


def _frozen_distributions(rows: dict[str, Any], heads: Frozen, guard: Guard | None, vocab: int):
    """log π_T and log π_B [c, vocab] of a chunk of rows, and the λ of each position [c], after the guard."""
    teacher, base = _teacher_and_base(
        lambda h, w: log_distribution(h, w, vocab), rows["hiddens"], heads, rows["own_teacher"]
    )
    if guard is None:
        return teacher, base, rows["lam"], None
    found = guarded(teacher, base, rows["lam"], guard, rows["state"])
    return teacher, base, found.lam, found


def _frozen_scores(
    rows: dict[str, Any], heads: Frozen, guard: Guard | None, variant: Variant, vocab: int, chunk: int
):
    """`_token_scores` of every sampled token, float32 [N], in one pass of both heads."""

    def score(part):
        return _token_scores(part, *_frozen_distributions(part, heads, guard, vocab), variant)

    needed = {
        name: rows[name] for name in ("hiddens", "token", "lam", "log_z", "state", "banned", "own_teacher")
    }
    return map_positions(score, needed, chunk)


def _token_scores(
    rows: dict[str, Any], teacher, base, lam, found: Guarded | None, variant: Variant
) -> dict[str, Any]:
    """For every sampled token [c]: log π_T, log π_B, λ and log Z of its position, whether it is banned, and whether the
    target flips there."""
    token, banned, flip = rows["token"], rows["banned"], _flips(teacher, base, lam, found, variant)
    log_z = log_normalizer(teacher, base, lam, variant.advantage) if variant.normalize else rows["log_z"]
    if found is not None:
        teacher, base, banned = _allowed_scores(teacher, base, token, found)
        log_z = jax.nn.logsumexp(found.target, -1) if variant.normalize else rows["log_z"]
        # A floor moves the target of a token away from that of λ: its advantage moves with it.
        of_lam = lam * take_token(teacher, token) + (1 - lam) * take_token(base, token)
        log_z = jnp.where(banned, 0.0, log_z + of_lam - take_token(found.target, token))
    at = {"teacher": take_token(teacher, token), "base": take_token(base, token)}
    return at | {"lam": lam, "log_z": log_z, "banned": banned} | flip


def _flips(teacher, base, lam, found: Guarded | None, variant: Variant) -> dict[str, Array]:
    """With Variant.flips, under "flip" 1 where the target (a guard's, if there is one) has another mode than π_T."""
    if not variant.flips:
        return {}
    if found is None:
        return {"flip": flipped(teacher, base, lam, variant.advantage)}
    return {"flip": (found.target.argmax(-1) != teacher.argmax(-1)).astype(jnp.float32)}


def _allowed_scores(teacher, base, token: Int[Array, " c"], found: Guarded):
    """Teacher and base over what is allowed, and whether `token` is not; what is not keeps its log-probability."""
    if found.allowed is None:
        return found.teacher, found.base, jnp.zeros(token.shape, bool)
    masked = (jnp.where(found.allowed, x, y) for x, y in ((found.teacher, teacher), (found.base, base)))
    return *masked, ~jnp.take_along_axis(found.allowed, token[:, None], -1)[:, 0]


def _sampled(variant: Variant, vocab: int, logits, rows, shared):
    """A chunk's weighted loss and quantities from the student's logits [c, vocab] and the others' scores [c].

    With the control variate the others' distributions are computed here, next to the student's.
    """
    logp, (heads, hyper, guard), kept = jax.nn.log_softmax(logits), shared, rows["weight"] > 0
    constants = {"reward": rows["reward"]} if "reward" in rows else {}
    if variant.control_variate:
        teacher, base, lam, found = _frozen_distributions(rows, heads, guard, vocab)
        rows = rows | _token_scores(rows, teacher, base, lam, found, variant)
        # Of the guarded λ, like the weight that it is subtracted from.
        constants["baseline"] = expected_weight(
            logp, teacher, base, hyper, variant, lam=lam, log_z=rows["log_z"]
        )
    constants |= {name: rows[name] for name in ("lam", "log_z", "banned")}
    student = take_token(logp, rows["token"])
    # Zeros after the end: an infinite ratio there would turn the gradient of a masked loss into 0 · inf = NaN.
    student, teacher, base, rollout = (
        jnp.where(kept, x, 0.0) for x in (student, rows["teacher"], rows["base"], rows["rollout"])
    )
    entropy = entropy_of(logp)
    loss, extra = sampled_loss(student, entropy, teacher, base, rollout, hyper, variant, **constants)
    scores = {"student": student, "teacher": teacher, "base": base, "entropy": entropy, "rollout": rollout}
    scores |= {"lambda": rows["lam"]} | ({"flip": rows["flip"]} if variant.flips else {})
    return jnp.where(kept, loss * rows["weight"], 0.0).sum(), extra | scores


def _full_vocab(variant: Variant, vocab: int, logits, rows, shared):
    """The same with exact losses over the vocabulary: all three distributions of a chunk exist at one time."""
    (heads, hyper, guard), token, student = shared, rows["token"], jax.nn.log_softmax(logits)
    teacher, base, lam, found = _frozen_distributions(rows, heads, guard, vocab)
    target, allowed = (None, None) if found is None else (jax.nn.log_softmax(found.target), found.allowed)
    loss, extra = full_vocab_loss(
        student, teacher, base, token, hyper, variant, lam=lam, target=target, allowed=allowed
    )
    at = {"student": student, "teacher": teacher, "base": base}
    scores = {name: take_token(x, token) for name, x in at.items()}
    scores |= {"entropy": entropy_of(student), "rollout": rows["rollout"], "lambda": lam}
    scores |= _flips(teacher, base, lam, found, variant)
    return jnp.where(rows["weight"] > 0, loss * rows["weight"], 0.0).sum(), extra | scores
