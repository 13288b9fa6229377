"""listopd_jax: the prompt shared in rollout, scoring and update; scoring and update are one program."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np

from benchmarks.presets import cpu
from benchmarks.shape import Prompts, Shape
from benchmarks.step import Step
from listopd_jax.config import validate
from listopd_jax.parallel.compiler import compilations
from listopd_jax.rollout.decode import Rollout

ROWS = 16
"""Completions per gradient pass where the run does not say: as fast as all 64 on two cores, in less memory."""


class Peer:
    """One step in the stages rollout and update."""

    def __init__(self, shape: Shape, folder: pathlib.Path):
        compilations()  # as main does: it releases the memory of the compiler
        asked = Prompts.read(folder)
        self.shape = shape = in_microbatches(shape)
        self.work = Step(
            validate(cpu(shape)), asked.ids, asked.lengths, shape.new_tokens, folder, shape.eos, shape.pad, asked.hint
        )  # fmt: skip

    def rollout(self) -> Rollout:
        """Completions, with drafts where the run has them."""
        return self.work.rollout()

    def update(self, rollout: Rollout) -> tuple[float, dict[str, float]]:
        """Teacher and base scores, loss, clipped gradient, AdamW; the loss."""
        return float(self.work.update(rollout)["loss"]), {}

    def tokens(self, rollout: Rollout) -> np.ndarray:
        """Sampled tokens [prompts, n, T], padded."""
        return np.asarray(rollout.tokens)

    def of_tokens(self, tokens: np.ndarray) -> Rollout:
        """A rollout of these tokens (its log-probabilities are only read for a metric)."""
        return Rollout(jnp.asarray(tokens), jnp.zeros(tokens.shape), jnp.asarray(self.shape.lengths(tokens)))


def in_microbatches(shape: Shape) -> Shape:
    """`shape` with a microbatch of ROWS completions, where it has none and that divides its prompts."""
    prompts = max(1, ROWS // shape.completions)
    if shape.microbatch or prompts >= shape.prompts or shape.prompts % prompts:
        return shape
    return dataclasses.replace(shape, microbatch=prompts)
