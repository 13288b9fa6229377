"""The SFT stages: the teacher, and the student whose end state is also the frozen base of OPD."""

import functools
from typing import Any

import jax.numpy as jnp

from listopd_jax.models.build import PARAM_DTYPE, as_given, cast, initial_params, lora_of
from listopd_jax.models.lora import initial_adapter, merge_adapter
from listopd_jax.parallel.hosts import global_batch
from listopd_jax.stages.job import Job, saving
from listopd_jax.train.loop import Run, train
from listopd_jax.train.optimizer import adamw, cosine_lr, init_state
from listopd_jax.train.sft_step import NONE, make_sft_step


def sft_run(job: Job, role: str) -> Run:
    """The SFT run of `role` (teacher or student)."""
    sft = job.config.sft[role]
    steps = sft.steps or job.steps(sft.epochs, sft.batch_size)
    return Run(f"sft_{role}", f"sft_{role}", lam=None, seed=sft.seed, steps=steps)


def train_sft(job: Job, role: str) -> Any:
    """Train `role` on the answers, or load it if that is done; its parameters in float32.

    A teacher of `sft.continued` starts from the student's, with a learning rate and moments of its own.
    """
    config, sft, run = job.config, job.config.sft[role], sft_run(job, role)
    tx, lora = adamw(config.optimizer, sft.b2, sft.moments), lora_of(config[role])
    weights = functools.partial(initial_params, config[role], job.shapes[role], sft.seed)
    if role == "teacher" and config.sft.continued:
        weights = lambda dtype: cast(train_sft(job, "student"), dtype)  # noqa: E731
    if run.steps == 0:  # the weights are fine-tuned already
        # A teacher that is only ever frozen need not exist in float32.
        return weights(config.dtype.frozen if role == "teacher" and as_given(config) else PARAM_DTYPE)
    if lora is None:
        frozen, start = NONE, functools.partial(weights, PARAM_DTYPE)
    else:
        frozen = weights(config.dtype.frozen)
        start = functools.partial(initial_adapter, job.shapes[role], lora, sft.seed)
    sft_step = make_sft_step(job.trained[role], tx, job.codec.vocab, config.opd.head_chunk, sft.microbatch)

    def update(state, batch, step):
        lr = cosine_lr(step, run.steps, sft.lr, sft.warmup_steps)
        # Packed batches have as many rows as their lists need, and every host has all of them.
        rows = len(batch["answer"]) if sft.packing else sft.batch_size
        return sft_step(state, global_batch(batch, rows), jnp.float32(lr), frozen)

    params = train(
        job.workdir, run, lambda: init_state(start(), tx), job.sft_batches(role), update,
        saving(config, job.workdir), tracking=job.tracking,
    )  # fmt: skip
    return merge_adapter(frozen, params, lora)
