"""How firmly a policy holds the form that the contract dictates: margins at structural tokens of its own answers."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from listopd_jax.models.build import cast
from listopd_jax.ops.head import log_distribution, map_positions
from listopd_jax.parallel.compiler import OTHER, BackendJit
from listopd_jax.parallel.hosts import gather
from listopd_jax.rollout.scoring import completion_hidden
from listopd_jax.rounding import round_up
from listopd_jax.stages.evaluate import Answer
from listopd_jax.stages.job import Job
from listopd_jax.stages.positions import ANSWER_STEP, padded
from listopd_jax.task.codec import Codec

QUANTILE = 0.05


def structural_margin(job: Job, role: str, params: Any, answers: Sequence[Answer]) -> float | None:
    """The 5 % quantile of `structural_margins` along a policy's greedy answers; None where they have no such token."""
    params, written = cast(params, job.config.dtype.compute), {a.index: a.tokens for a in answers}
    found = structural_margins(
        job.graphs[role], params, job.evaluation_batches(), written, job.codec, job.config.opd.head_chunk
    )
    return float(np.quantile(found, QUANTILE)) if found.size else None


def structural_margins(
    graphdef: nnx.GraphDef,
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    written: Mapping[int, Sequence[int]],
    codec: Codec,
    chunk: int,
) -> Float[np.ndarray, " N"]:
    """log π_1 − log π_2 in nats at each structural token of the answers `written` to the prompts of `batches`.

    π_1 and π_2 are the probabilities of the likeliest token and of the next: noise can carry a policy across a small
    margin. Filler rows (weight 0) are left out.
    """
    found = []
    for batch in batches:
        rows = [[written[index]] for index in batch["index"].tolist()]
        lengths = np.array([len(row[0]) for row in rows])
        tokens = padded(rows, round_up(int(lengths.max()), ANSWER_STEP), codec.pad)
        asked = (jnp.asarray(batch[name]) for name in ("prompt", "prompt_length"))
        margins = gather(
            _margins(graphdef, params, *asked, jnp.asarray(tokens), vocab=codec.vocab, chunk=chunk)
        )
        counted = codec.structural(tokens[:, 0], lengths) & (batch["weight"] > 0)[:, None]
        found.append(margins[:, 0][counted])
    return np.concatenate(found)


@functools.partial(BackendJit, options=OTHER, static_argnames=("graphdef", "vocab", "chunk"))
def _margins(
    graphdef: nnx.GraphDef,
    params: Any,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, " B"],
    answers: Int[Array, "B 1 T"],
    *,
    vocab: int,
    chunk: int,
) -> Float[Array, "B 1 T"]:
    """log π_1 − log π_2 at every position of the answers."""
    decoder = nnx.merge(graphdef, params)
    hidden = completion_hidden(decoder, prompts, prompt_lengths, answers)
    head = decoder.head_weight().astype(hidden.dtype)

    def rows(hidden):
        first, second = jax.lax.top_k(log_distribution(hidden, head, vocab), 2)[0].T
        return first - second

    return map_positions(rows, hidden.reshape(-1, hidden.shape[-1]), chunk).reshape(answers.shape)
