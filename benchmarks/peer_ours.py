"""listopd_jax: the prompt shared in rollout, scoring and update; scoring and update are one program."""

import pathlib

import jax.numpy as jnp
import numpy as np

from benchmarks.presets import cpu
from benchmarks.shape import Shape
from benchmarks.step import Step
from listopd_jax.config import validate
from listopd_jax.rollout.decode import Rollout


class Peer:
    """One step in the stages rollout and update."""

    def __init__(self, shape: Shape, folder: pathlib.Path):
        config, prompts = validate(cpu(shape)), shape.prompt_ids()
        self.work = Step(config, prompts, shape.prompt_tokens, shape.new_tokens, folder)

    def rollout(self) -> Rollout:
        """Completions of forced length."""
        return self.work.rollout()

    def update(self, rollout: Rollout) -> tuple[float, dict[str, float]]:
        """Teacher and base scores, loss, clipped gradient, AdamW; the loss."""
        return float(self.work.update(rollout)["loss"]), {}

    def tokens(self, rollout: Rollout) -> np.ndarray:
        """Sampled tokens [prompts, n, new]."""
        return np.asarray(rollout.tokens)

    def of_tokens(self, tokens: np.ndarray) -> Rollout:
        """A rollout of these tokens (its log-probabilities are only read for a metric)."""
        lengths = np.full(tokens.shape[:2], tokens.shape[2], np.int32)
        return Rollout(jnp.asarray(tokens), jnp.zeros(tokens.shape), jnp.asarray(lengths))
