"""Teacher and base at every position of greedy answers: what calibration is computed from."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from listopd_jax.data.batches import as_teachers_read
from listopd_jax.metrics_log import progress
from listopd_jax.ops.guard import flip_lambda
from listopd_jax.ops.head import log_distribution, map_positions, take_token
from listopd_jax.parallel.compiler import OTHER, BackendJit
from listopd_jax.parallel.hosts import gather
from listopd_jax.rollout.decode import generate
from listopd_jax.rollout.scoring import completion_hidden
from listopd_jax.rounding import round_up
from listopd_jax.stages.job import base_of
from listopd_jax.task.codec import IS_STRUCTURAL, Codec
from listopd_jax.theory.thresholds import probability

ANSWER_STEP = 64  # answers are cut to a multiple of this: few shapes, so few compilations


class Positions(NamedTuple):
    """The positions of greedy answers, one after another, about the teacher's modal token m of each.

    Log-odds keep the digits that probabilities lose next to 1.
    """

    logit_p: Float[np.ndarray, " N"]  # of m under the teacher
    logit_b: Float[np.ndarray, " N"]  # of m under the base
    flip: Float[np.ndarray, " N"]  # λ_flip of m, ∞ if none
    token_class: Int[
        np.ndarray, " N"
    ]  # of m, or of a structural token in its place; index into TOKEN_CLASSES
    prompt: Int[np.ndarray, " N"]  # row of the split
    token: Int[np.ndarray, " N"]  # id of m
    written: Int[np.ndarray, " N"]  # id of the answer's own token: m along the teacher's answers

    @property
    def p(self) -> Float[np.ndarray, " N"]:
        """The teacher's maximum probability."""
        return probability(self.logit_p)

    @property
    def b(self) -> Float[np.ndarray, " N"]:
        """The base's probability of m."""
        return probability(self.logit_b)

    @property
    def log_ratio(self) -> Float[np.ndarray, " N"]:
        """log π_T(m) − log π_B(m)."""
        return np.logaddexp(0, -self.logit_b) - np.logaddexp(0, -self.logit_p)

    @property
    def structural(self) -> Bool[np.ndarray, " N"]:
        """Whether the contract dictates the token, or the one in its place."""
        return IS_STRUCTURAL[self.token_class]

    def where(self, mask: Bool[np.ndarray, " N"]) -> "Positions":
        """The positions that `mask` selects."""
        return Positions(*(x[mask] for x in self))


def measure(
    graphs: Mapping[str, nnx.GraphDef],
    params_teacher: Any,
    params_base: Any,
    batches: Iterable[dict[str, np.ndarray]],
    codec: Codec,
    decoding: Mapping[str, Any],
    chunk: int,
) -> Positions:
    """Teacher and base at every position of the teacher's greedy answers to the prompts of `batches`.

    Args:
      graphs: static halves by role; the base's is `base_of` them.
      batches: evaluation batches, maybe with prompts of the teacher's own; filler rows (weight 0) are left out.
      decoding: how answers are written, Job.decoding.
      chunk: positions whose distributions over the vocabulary exist at one time.
    """
    models = (graphs["teacher"], base_of(graphs)), (params_teacher, params_base)
    parts = []
    for batch in progress(list(batches), "calibrate"):
        read = as_teachers_read(batch)
        rollout = generate(
            models[0][:1], models[1][:1], jnp.ones((1, 1)), read["prompt"], read["prompt_length"],
            jax.random.key(0), greedy=True, **decoding,
        )  # fmt: skip
        lengths = gather(rollout.lengths)
        size = min(decoding["max_tokens"], round_up(int(lengths.max()), ANSWER_STEP))
        parts += along(*models, batch, gather(rollout.tokens)[..., :size], lengths, codec, chunk)
    return concatenate_positions(parts)


def along(
    graphdefs: tuple[nnx.GraphDef, nnx.GraphDef],
    params: tuple[Any, Any],
    batch: dict[str, np.ndarray],
    answers: Int[np.ndarray, "B n T"],
    lengths: Int[np.ndarray, "B n"],
    codec: Codec,
    chunk: int,
) -> list[Positions]:
    """Teacher and base, in this order, at every position of n answers to each prompt of `batch`, one pass of each.

    The teacher reads its own prompts, if `batch` has such. Filler rows (weight 0) are left out. Each of the n has its
    own positions.
    """
    prompts = [
        (jnp.asarray(b["prompt"]), jnp.asarray(b["prompt_length"])) for b in (as_teachers_read(batch), batch)
    ]
    seen = _measure_batch(graphdefs, params, prompts, jnp.asarray(answers), vocab=codec.vocab, chunk=chunk)
    *numbers, modes = map(gather, seen)
    inside = (np.arange(answers.shape[-1]) < lengths[..., None]) & (batch["weight"] > 0)[:, None, None]
    index = np.broadcast_to(np.asarray(batch["index"])[:, None], lengths.shape)
    found = []
    for i in range(lengths.shape[1]):
        mask, written, mode = inside[:, i], answers[:, i], modes[:, i]
        classes = _classes(codec, written, mode, lengths[:, i])
        rows = np.broadcast_to(index[:, i, None], mask.shape)
        # float64 on the host: thresholds are differences of nearly equal numbers.
        columns = *(x[:, i].astype(np.float64) for x in numbers), classes, rows, mode, written
        found.append(Positions(*(x[mask] for x in columns)))
    return found


def concatenate_positions(parts: Iterable[Positions]) -> Positions:
    """The positions of all `parts`, one part after the other."""
    return Positions(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _classes(
    codec: Codec,
    answers: Int[np.ndarray, "B T"],
    modes: Int[np.ndarray, "B T"],
    lengths: Int[np.ndarray, " B"],
) -> Int[np.ndarray, "B T"]:
    """The class of each position, −1 after the end: of the teacher's token, or of the one written in its place.

    It is structural if one of the two is: a list may end where the teacher continues, and where it writes a score.
    """
    classes = codec.classes(answers, lengths)
    for row, at in np.argwhere((modes != answers) & (classes >= 0)):
        # A token's class depends on the text before it: the answer is read up to here, the mode at its end.
        prefix = np.append(answers[row, :at], modes[row, at])
        mode = codec.classes(prefix[None], np.array([at + 1]))[0, at]
        classes[row, at] = mode if IS_STRUCTURAL[mode] else classes[row, at]
    return classes


@functools.partial(BackendJit, options=OTHER, static_argnames=("graphdefs", "vocab", "chunk"))
def _measure_batch(
    graphdefs: tuple[nnx.GraphDef, nnx.GraphDef],
    params: tuple[Any, Any],
    prompts: list[tuple[Int[Array, "B _"], Int[Array, " B"]]],
    answers: Int[Array, "B n T"],
    *,
    vocab: int,
    chunk: int,
) -> tuple[Float[Array, "B n T"], Float[Array, "B n T"], Float[Array, "B n T"], Int[Array, "B n T"]]:
    """logit p, logit b and λ_flip of the teacher's modal token, and its id, at every answer position.

    Each model reads prompts of its own.
    """
    # Reductions to three numbers per position happen on the device; no distribution reaches the host.
    decoders = [nnx.merge(g, p) for g, p in zip(graphdefs, params, strict=True)]
    hiddens = [completion_hidden(d, *read, answers) for d, read in zip(decoders, prompts, strict=True)]
    heads = [d.head_weight().astype(h.dtype) for d, h in zip(decoders, hiddens, strict=True)]

    def rows(hiddens):
        log_t, log_b = (log_distribution(h, head, vocab) for h, head in zip(hiddens, heads, strict=True))
        mode = log_t.argmax(-1)
        return _log_odds(log_t, mode), _log_odds(log_b, mode), flip_lambda(log_t, log_b, mode), mode

    flat = tuple(h.reshape(-1, h.shape[-1]) for h in hiddens)
    return tuple(x.reshape(answers.shape) for x in map_positions(rows, flat, chunk))


def _log_odds(logp: Float[Array, "s V"], token: Int[Array, " s"]) -> Float[Array, " s"]:
    """Log-odds of `token`; the complement is summed over the other tokens, so that p → 1 keeps its digits."""
    is_token = jnp.arange(logp.shape[-1]) == token[:, None]
    return take_token(logp, token) - jax.nn.logsumexp(jnp.where(is_token, -jnp.inf, logp), axis=-1)


def padded(answers: Sequence[Sequence[Sequence[int]]], size: int, pad: int) -> Int[np.ndarray, "B n T"]:
    """Token ids, each row filled up to `size`."""
    return np.array([[[*ids, *[pad] * (size - len(ids))] for ids in row] for row in answers], np.int32)
