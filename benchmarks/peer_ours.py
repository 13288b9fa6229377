"""listopd_jax: shared prefix in rollout, scoring and update; scoring and update are one program."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.shape import Shape
from listopd_jax.config import defaults
from listopd_jax.models.build import graph_of
from listopd_jax.models.hf import load_hf
from listopd_jax.ops.objective import Hyper, Variant
from listopd_jax.rollout.decode import generate
from listopd_jax.train.opd_step import Frozen, Models, OpdBatch, make_opd_step
from listopd_jax.train.optimizer import adamw, init_state


class Peer:
    """One step in the stages rollout and update."""

    def __init__(self, shape: Shape, folder: pathlib.Path):
        student, teacher = (load_hf(folder / role, jnp.float32)[1] for role in ("student", "teacher"))
        self.shape, self.graphs = (
            shape,
            {r: graph_of(shape.config(r), "float32", "none") for r in ("student", "teacher")},
        )
        tx = adamw(defaults().optimizer, 0.999)
        self.state, self.frozen, self.step_count = init_state(student, tx), Frozen(teacher, student), 0
        models = Models(self.graphs["student"], self.graphs["teacher"], self.graphs["student"])
        self.step = make_opd_step(models, tx, Variant(), vocab=shape.vocab, chunk=1024)
        self.prompts = jnp.asarray(shape.prompt_ids())
        self.lengths = jnp.full(shape.prompts, shape.prompt_tokens, jnp.int32)

    def rollout(self):
        """Completions of forced length."""
        self.step_count += 1
        rollout = generate(
            (self.graphs["student"],), (self.state.params,), jnp.ones((1, self.shape.completions)), self.prompts,
            self.lengths, jax.random.key(self.step_count), max_tokens=self.shape.new_tokens, vocab=self.shape.vocab,
            eos=-1, pad=0,
        )  # fmt: skip
        return jax.block_until_ready(rollout)

    def update(self, rollout) -> float:
        """Teacher and base scores, loss, gradient, AdamW; the loss."""
        hyper = Hyper(*map(jnp.float32, (1.1, 5.0, 0.0, 0.0, 0.0)))
        batch = OpdBatch(self.prompts, self.lengths, rollout)
        self.state, metrics, _ = self.step(self.state, self.frozen, batch, hyper, jnp.float32(1e-5))
        jax.block_until_ready(self.state)
        return float(np.asarray(metrics["loss"]))
