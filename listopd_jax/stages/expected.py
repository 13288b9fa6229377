"""The scores that a policy expects, whatever it would write: an endpoint for which every list counts, parsed or not.

The right answer is read with the policy (teacher-forced), and where each score is, the policy's probabilities of 0
to 10 give its mean. So a policy whose lists break is judged by the same lists as one whose lists hold, on one footing:
the scores before are the true ones, whoever is judged.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from listopd_jax.metrics_log import progress
from listopd_jax.ops.grammar import START, states
from listopd_jax.ops.guard import Guard
from listopd_jax.parallel.compiler import OTHER, BackendJit
from listopd_jax.parallel.hosts import gather
from listopd_jax.rollout.sampling import mixed_logprobs
from listopd_jax.rollout.scoring import completion_hidden
from listopd_jax.task.codec import Codec
from listopd_jax.task.prompt import render_answer

SCORES = tuple(range(11))


class Forced(NamedTuple):
    """The right answers of N lists of K reviews, once for each review, whose own score is 1 there.

    After that 1 the answer may continue to 10, so one pass gives the probability of all scores.
    """

    tokens: Int[np.ndarray, "N K T"]
    place: Int[np.ndarray, "N K"]  # of the score
    first: Int[np.ndarray, " 11"]  # the token that each score begins with
    second: int | None  # the second token of 10; None where 10 is one token


def forced_answers(scores: Float[np.ndarray, "N K"], codec: Codec) -> Forced:
    """The answers to lists of true `scores`."""
    ids = lambda row: codec.tokenizer.encode(render_answer(row), add_special_tokens=False)  # noqa: E731
    rows = [list(map(int, row)) for row in scores]
    # With 1 and with 7 at the same place: where the two encodings differ is the token of the score.
    changed = [[[*r[:i], s, *r[i + 1 :]] for i in range(len(r)) for s in (1, 7)] for r in rows]
    encoded = [[ids(r) for r in row] for row in changed]
    ones = [row[::2] for row in encoded]
    place = [[_first_difference(a, b) for a, b in zip(row[::2], row[1::2], strict=True)] for row in encoded]
    width = max(len(answer) for row in ones for answer in row)
    tokens = np.full((*scores.shape, width), codec.pad, np.int32)
    for n, row in enumerate(ones):
        for i, answer in enumerate(row):
            tokens[n, i, : len(answer)] = answer
    first, ten = place[0][0], ids([10, *rows[0][1:]])
    # Every score in the same list, at the same place: a token may depend on the text before it.
    starts = np.array([ids([s, *rows[0][1:]])[first] for s in SCORES])
    return Forced(tokens, np.array(place), starts, ten[first + 1] if starts[10] == starts[1] else None)


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)


def expected_scores(
    graphdefs: tuple[nnx.GraphDef, ...],
    params: tuple[Any, ...],
    weights: Float[Array, "m n"],
    batches: Iterable[dict[str, np.ndarray]],
    forced: Forced,
    vocab: int,
    guard: Guard | None = None,
) -> Float[np.ndarray, "n N K"]:
    """For each of n mixtures Σ_i weights[i, j] log π_i, the mean score of every review of the N lists of `forced`.

    `batches` cover the lists; the arguments are those of `greedy_answers`.
    """
    found = np.full((weights.shape[1], *forced.place.shape), np.nan)
    for batch in progress(list(batches), "expected scores"):
        rows = batch["index"]
        means = _means(
            graphdefs, params, weights, batch["prompt"], batch["prompt_length"], forced.tokens[rows],
            forced.place[rows], jnp.asarray(forced.first), guard, vocab=vocab, second=forced.second,
        )  # fmt: skip
        found[:, rows] = gather(means)
    return found


@functools.partial(BackendJit, options=OTHER, static_argnames=("graphdefs", "vocab", "second"))
def _means(
    graphdefs,
    params,
    weights,
    prompts,
    lengths,
    answers,
    place,
    first,
    guard,
    *,
    vocab: int,
    second: int | None,
) -> Float[Array, "n B K"]:
    """Mean scores of a batch, the answers read once."""
    decoders = [nnx.merge(g, p) for g, p in zip(graphdefs, params, strict=True)]
    at = place[..., None] + jnp.arange(2)  # what predicts the score, and what follows it
    hiddens = [
        jnp.take_along_axis(completion_hidden(d, prompts, lengths, answers), at[..., None], axis=2)
        for d in decoders
    ]
    state = None
    if guard is not None and guard.grammar is not None:
        before = states(guard.grammar, jnp.full(place.shape, START), answers)
        state = jnp.take_along_axis(before, at, axis=2)

    def mean(column):
        shares = jnp.broadcast_to(column, (*place.shape, 1, len(column)))
        return _mean_score(mixed_logprobs(decoders, hiddens, shares, vocab, 1.0, guard, state), first, second)

    return jax.lax.map(mean, weights.T)


def _mean_score(
    logp: Float[Array, "B K 2 V"], first: Int[Array, " 11"], second: int | None
) -> Float[Array, "B K"]:
    """The mean over 0 to 10 from the distributions before a score and after a 1, renormalised."""
    p = jnp.exp(logp[:, :, 0, first])
    if second is not None:
        continues = jnp.exp(logp[:, :, 1, second])
        # 1 and 10 begin with one token, so both have its probability: here it is shared out.
        p = p.at[..., 1].multiply(1 - continues).at[..., 10].multiply(continues)
    return p @ jnp.arange(11.0) / p.sum(-1)
