"""The OPD loss from hidden states: student, teacher and base meet their heads a chunk of positions at a time.

The objective itself, per token, is listopd_jax.ops.objective; how the student's head gets its gradient without stored
logits is listopd_jax.ops.fused.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from listopd_jax.ops.fused import fused_loss
from listopd_jax.ops.gather_kernel import gather_logprobs
from listopd_jax.ops.head import entropy_of, log_distribution, map_positions, take_token
from listopd_jax.ops.objective import Hyper, Variant, full_vocab_loss, position_lambda, sampled_loss


def opd_loss(
    hiddens: Sequence[Float[Array, "N _"]],
    heads: Sequence[Float[Array, "_ _"]],
    tokens: Int[Array, " N"],
    rollout: Float[Array, " N"],
    weights: Float[Array, " N"],
    hyper: Hyper,
    variant: Variant,
    *,
    vocab: int,
    chunk: int,
    pallas: bool = False,
) -> tuple[Float[Array, ""], dict[str, Float[Array, " N"]]]:
    """Σ weight·loss over N completion positions (EC §2) and what is known of each; differentiable in the student's.

    Args:
      hiddens, heads: of student, teacher and base, each of its own width D and padded vocabulary V.
      tokens, rollout: the sampled tokens and their log-probability when they were sampled.
      weights: of each position's loss, 0 where there is no token.
      vocab, chunk: see `fused_loss`.
      pallas: score teacher and base by ops/gather_kernel.py, on a TPU, where no more than that is asked of them.
    Returns the loss and, float32 [N]: advantage, ratio, lambda, entropy; student, teacher and base log-probabilities of
    the tokens; rollout. They mean nothing where the weight is 0.
    """
    hidden, *frozen = hiddens
    head, *frozen_heads = heads
    frozen_heads = [
        w.astype(h.dtype) for w, h in zip(frozen_heads, frozen, strict=True)
    ]  # not in every chunk
    rows = {"token": tokens, "rollout": rollout, "weight": weights}
    if variant.estimator == "full_vocab":
        f, rows["hiddens"] = _full_vocab, frozen
    else:
        f = _sampled
        pair = frozen, frozen_heads
        if pallas and not variant.guard:
            scores = [gather_logprobs(h, w, tokens, vocab) for h, w in zip(*pair, strict=True)]
            scores.append(jnp.full_like(weights, hyper.lam))
        else:
            scores = _frozen_scores(*pair, tokens, hyper, variant, vocab, chunk)
        rows |= dict(zip(("teacher", "base", "lambda"), scores, strict=True))
    f = functools.partial(f, variant, vocab)
    return fused_loss(f, vocab, chunk, hidden, head, rows, (frozen_heads, hyper))


def _frozen_scores(hiddens, heads, tokens, hyper: Hyper, variant: Variant, vocab: int, chunk: int):
    """log π_T, log π_B of the sampled tokens and the λ of each position, all [N], in one pass of both heads."""

    def rows(xs):
        hiddens, token = xs
        teacher, base = (log_distribution(h, w, vocab) for h, w in zip(hiddens, heads, strict=True))
        return (
            take_token(teacher, token),
            take_token(base, token),
            position_lambda(teacher, base, hyper, variant),
        )

    return map_positions(rows, (hiddens, tokens), chunk)


def _sampled(variant: Variant, vocab: int, logits, rows, shared):
    """A chunk's weighted loss and quantities from the student's logits [c, vocab] and the others' scores [c]."""
    logp, hyper, kept = jax.nn.log_softmax(logits), shared[1], rows["weight"] > 0
    student = take_token(logp, rows["token"])
    # Zeros after the end: an infinite ratio there would turn the gradient of a masked loss into 0 · inf = NaN.
    student, teacher, base, rollout = (
        jnp.where(kept, x, 0.0) for x in (student, rows["teacher"], rows["base"], rows["rollout"])
    )
    entropy, lam = entropy_of(logp), rows["lambda"]
    loss, extra = sampled_loss(student, entropy, teacher, base, rollout, hyper._replace(lam=lam), variant)
    scores = {"student": student, "teacher": teacher, "base": base, "entropy": entropy, "rollout": rollout}
    return jnp.where(kept, loss * rows["weight"], 0.0).sum(), extra | scores | {"lambda": lam}


def _full_vocab(variant: Variant, vocab: int, logits, rows, shared):
    """The same with exact losses over the vocabulary: all three distributions of a chunk exist at one time."""
    (heads, hyper), token = shared, rows["token"]
    frozen = (log_distribution(h, w, vocab) for h, w in zip(rows["hiddens"], heads, strict=True))
    logp = [jax.nn.log_softmax(logits), *frozen]
    loss, extra = full_vocab_loss(*logp, token, hyper, variant)
    scores = dict(zip(("student", "teacher", "base"), (take_token(x, token) for x in logp), strict=True))
    extra |= scores | {"entropy": entropy_of(logp[0]), "rollout": rows["rollout"]}
    return jnp.where(rows["weight"] > 0, loss * rows["weight"], 0.0).sum(), extra
