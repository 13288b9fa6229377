"""What training forgets: how a policy reads plain English that has nothing to do with the task."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from listopd_jax.models.build import cast
from listopd_jax.ops.head import log_distribution, map_positions, take_token
from listopd_jax.parallel.compiler import OTHER, BackendJit
from listopd_jax.parallel.hosts import gather
from listopd_jax.stages.job import Job

TEXTS = (
    "The ferry leaves the harbour at half past six, and on clear mornings you can see the islands from the upper deck.",
    "Water boils at a lower temperature on a mountain, because the air above it is thinner and presses on it less.",
    "My grandmother kept bees behind the shed and sold the honey in jars that had once held pickles.",
    "To divide one fraction by another, turn the second one upside down and multiply the two.",
    "The committee met on Tuesday, agreed on the budget for the new library, and put off the question of its roof.",
    "He tuned the old guitar by ear, played three slow chords, and asked whether anyone knew the words.",
    "A sorted list can be searched by halving: compare with the middle, then go on in the half that is left.",
    "In autumn the maple outside the school turns red first at the top, as if someone had lit a match there.",
    "The treaty ended the war but drew the border through the middle of several villages.",
    "Knead the dough until it no longer sticks to your hands, cover it, and let it rise for an hour.",
    "Light from the nearest star beside the sun takes a little more than four years to reach us.",
    "She missed the last train, walked home along the river, and found that she had forgotten her keys.",
)
"""Written for this purpose; no task here has anything like them."""


def forgetting(job: Job, role: str, params: Any, base: Any = None) -> dict[str, float]:
    """Scores of TEXTS by a policy of `role`, in the dtype that samples.

    `perplexity`: exp of the mean of −log π per token of the task's tokenizer: to be compared between policies of one
    tokenizer. `kl_to_base`, given the parameters of the model that it was trained from: the mean over positions of KL(π
    ‖ base) in nats.
    """
    tokens, lengths = _encoded(job)
    params = cast(params, job.config.dtype.compute)
    score = _scorer(job.graphs[role], job.codec.vocab, job.config.opd.head_chunk)
    # Without a base the policy stands in for it, and its KL of 0 is dropped: one program serves both.
    logprobs, kl = (gather(x) for x in score(params, params if base is None else base, tokens, lengths))
    # From 1: nothing predicts the first token.
    read = np.arange(1, tokens.shape[1]) < lengths[:, None]
    found = {"perplexity": math.exp(min(-float(logprobs[read].mean()), 700.0))}  # at most what JSON can hold
    return found if base is None else found | {"kl_to_base": float(kl[read].mean())}


def _encoded(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """TEXTS as right-padded ids [texts, T], and their lengths."""
    rows = [job.codec.tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.full((len(rows), lengths.max()), job.codec.pad, np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return tokens, lengths


def _scorer(graphdef: nnx.GraphDef, vocab: int, chunk: int) -> BackendJit:
    """A compiled (params, base, tokens, lengths) → log π of each token but the first, and KL(π ‖ base) there."""

    def rows(xs, heads):
        policy, base = (log_distribution(x, head, vocab) for x, head in zip(xs[:2], heads, strict=True))
        return take_token(policy, xs[2]), (jnp.exp(policy) * (policy - base)).sum(-1)

    def score(params, base, tokens, lengths) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        decoders = [nnx.merge(graphdef, p) for p in (params, base)]
        read = [d(tokens, lengths)[:, :-1] for d in decoders]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (*read, tokens[:, 1:]))
        of_rows = functools.partial(rows, heads=[d.head_weight() for d in decoders])
        return tuple(x.reshape(len(tokens), -1) for x in map_positions(of_rows, flat, chunk))

    return BackendJit(score, OTHER)
