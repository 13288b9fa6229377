"""The SFT stages: the teacher, and the student whose end state is also the frozen base of OPD."""

from typing import Any

import jax
import jax.numpy as jnp

from listopd_jax.job import Job
from listopd_jax.models.build import initial_params
from listopd_jax.train.loop import Run, train
from listopd_jax.train.optimizer import adamw, cosine_lr, init_state
from listopd_jax.train.sft_step import make_sft_step


def sft_run(job: Job, role: str) -> Run:
    """The SFT run of `role` (teacher or student)."""
    sft = job.config.sft[role]
    steps = sft.steps or job.steps(sft.epochs, sft.batch_size)
    return Run(f"sft_{role}", f"sft_{role}", {"lambda": None, "seed": sft.seed}, steps)


def train_sft(job: Job, role: str) -> Any:
    """Train `role` on the answers, or load it if that is done; its parameters in `dtype.param`."""
    config, sft, run = job.config, job.config.sft[role], sft_run(job, role)
    tx = adamw(config.optimizer, sft.b2)
    params = initial_params(config[role], job.shapes[role], sft.seed, config.dtype.param)
    if run.steps == 0:  # the weights are fine-tuned already
        return params
    sft_step = make_sft_step(job.graphs[role], tx, job.codec.vocab, config.opd.head_chunk, sft.microbatch)

    def update(state, batch, step):
        lr = cosine_lr(step, run.steps, sft.lr, sft.warmup_steps)
        return sft_step(state, jax.tree.map(jnp.asarray, batch), jnp.float32(lr))

    batches = job.sft_batches(role)
    every, keep = config.train.checkpoint_every, config.train.keep_checkpoints
    return train(job.workdir, run, init_state(params, tx), batches, update, every, keep).params
