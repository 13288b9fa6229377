"""The OPD stage: sample from the student, score with teacher and base, update; one run for each λ and seed."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from listopd_jax.config import guard_text
from listopd_jax.models.build import cast
from listopd_jax.ops.grammar import Grammar
from listopd_jax.ops.objective import Hyper, Variant, warmed_up_lambda
from listopd_jax.ops.opd_loss import Frozen, Models
from listopd_jax.parallel import hosts
from listopd_jax.parallel.rules import decoding_copy
from listopd_jax.rollout.decode import Rollout, generate
from listopd_jax.rollout.state import trim
from listopd_jax.stages.job import Job, saving
from listopd_jax.task.codec import Codec
from listopd_jax.task.contract import strict_parse
from listopd_jax.task.prompt import review_ids
from listopd_jax.train.loop import Run, Saving, train
from listopd_jax.train.opd_step import OpdBatch, make_opd_step
from listopd_jax.train.optimizer import init_state
from listopd_jax.train.preflight import answer_logprobs, check_models


class Distillation(NamedTuple):
    """What the runs of every λ and seed share: where they start, what stays as it is, and how they are updated."""

    start: Callable[[], Any]  # gives each run its own copy of the SFT parameters in float32
    frozen: Frozen
    tx: optax.GradientTransformation
    step: Callable  # of `make_step`


def opd_runs(job: Job, lam: float, seed: int) -> list[Run]:
    """The OPD run at λ and seed, once for each budget at which it is evaluated: one training, read on its way."""
    opd = job.config.opd
    steps = opd.steps or job.steps(opd.epochs, opd.batch_size)
    run = Run(f"opd_lambda{float(lam)}_seed{seed}", "opd", float(lam), seed, steps, guard_text(opd.guard))
    return [run._replace(steps=budget) for budget in opd.eval_steps if budget < steps] + [run]


def preflight(job: Job, frozen: Frozen) -> None:
    """Look at teacher and student on the first batch of answers; UserError if they cannot be distilled."""
    batch, chunk = next(iter(job.evaluation_batches())), job.config.opd.head_chunk
    pairs = (("teacher", frozen.teacher), ("student", frozen.base))
    check_models(
        *(answer_logprobs(job.graphs[r], p, batch, job.codec.vocab, chunk) for r, p in pairs), job.codec.vocab
    )


def make_step(
    opd: Any,
    tx: optax.GradientTransformation,
    graphs: Mapping[str, nnx.GraphDef],
    *,
    vocab: int,
    attention: str,
    grammar: Grammar | None = None,
) -> Callable:
    """The update program of config section `opd`, to be shared by every λ and seed: they are data to it.

    `graphs` are the static halves of teacher and student, `attention` is their backend (never auto),
    `grammar` that of a guard which knows the contract.
    """
    return make_opd_step(
        Models(student=graphs["student"], teacher=graphs["teacher"], base=graphs["student"]),
        tx,
        variant_of(opd),
        vocab=vocab,
        chunk=opd.head_chunk,
        microbatch=opd.microbatch,
        pallas=attention == "splash",  # both are kernels for TPUs
        grammar=grammar,
    )


def variant_of(opd: Any) -> Variant:
    """The static choices of config section `opd`."""
    return Variant(
        ratio=opd.ratio,
        advantage=opd.advantage,
        estimator=opd.estimator,
        aggregate=opd.aggregate,
        ppo=opd.ppo_clip > 0,
        guard=opd.guard.fallback if opd.guard.margin else "",
        scope=opd.guard.scope,
        mask=opd.guard.mask,
        floor=opd.guard.floor,
        structure=opd.guard.structure,
        normalize=opd.normalize,
    )


def hyper_at(opd: Any, lam: float, step: int) -> Hyper:
    """The traced scalars of config section `opd` for a run at λ, at 0-based `step`."""
    scalars = Hyper(
        lam=warmed_up_lambda(lam, step, opd.lambda_warmup_steps),
        clip=opd.clip,
        kl_to_base=opd.kl_to_base,
        entropy_bonus=opd.entropy_bonus,
        ppo_clip=opd.ppo_clip,
        guard_margin=opd.guard.margin,
    )
    return jax.tree.map(jnp.float32, scalars)


def train_opd(job: Job, shared: Distillation, run: Run, best: int | None = None) -> Any:
    """Distil from the SFT student, or load the run if it is done; its parameters in float32.

    The checkpoint at step `best` is kept.
    """
    config, opd = job.config, job.config.opd
    key = jax.random.key(run.seed)

    def update(state, batch, step):
        rows = hosts.global_batch({k: batch[k] for k in ("prompt", "prompt_length")}, opd.batch_size)
        prompts, lengths = rows["prompt"], rows["prompt_length"]
        rollout = sample(job, state.params, prompts, lengths, jax.random.fold_in(key, step))
        sampled = OpdBatch(prompts, lengths, rollout._replace(steps=None))
        hyper = hyper_at(opd, run.lam, step)
        for _ in range(opd.updates_per_batch):
            state, metrics, per_token = shared.step(state, shared.frozen, sampled, hyper, jnp.float32(opd.lr))
        tokens = {"tokens": int(rollout.lengths.sum()) + opd.rollouts * int(lengths.sum())}
        tokens["tokens_per_decode_step"] = tokens_per_decode_step(rollout)
        return state, metrics | tokens | contract_metrics(
            rollout, per_token["advantage"], job.codec, config.task.k
        )

    def initial():
        return init_state(shared.start(), shared.tx)

    return train(job.workdir, run, initial, job.opd_batches(run.seed), update, opd_saving(config, best))


def opd_saving(config: Any, best: int | None = None) -> Saving:
    """How the runs of section `opd` of `config` are saved; the checkpoint at step `best` is kept."""
    return saving(config, best, lambda_warmup_steps=config.opd.lambda_warmup_steps)


def sample(job: Job, params: Any, prompts, lengths, key) -> Rollout:
    """`opd.rollouts` completions of each prompt by the student, cut to the longest (in quarters of the budget)."""
    opd, decoding = job.config.opd, job.decoding
    params = cast(params, job.config.dtype.compute)
    if job.config.parallel.gather_rollout:
        params = decoding_copy(params)
    rollout = generate(
        (job.graphs["student"],), (params,), jnp.ones((1, opd.rollouts)), prompts, lengths, key,
        temperature=opd.temperature, **decoding,
    )  # fmt: skip
    return trim(rollout, decoding["max_tokens"])


def tokens_per_decode_step(rollout: Rollout) -> float:
    """Tokens that a row wrote in each pass after the prefill: 1, and more where drafts were confirmed."""
    steps = int(rollout.steps.sum())
    return (int(rollout.lengths.sum()) - int((rollout.lengths > 0).sum())) / steps if steps else 1.0


def contract_metrics(rollout: Rollout, advantage, codec: Codec, k: int) -> dict[str, float]:
    """What the sampled completions say of the contract: how many hold it and end, advantage by kind of token."""
    tokens = hosts.gather(rollout.tokens).reshape(-1, rollout.tokens.shape[-1])
    lengths = hosts.gather(rollout.lengths).reshape(-1)
    parsed = [strict_parse(text, review_ids(k)).failure == "ok" for text in codec.texts(tokens, lengths)]
    structural, values = codec.structural(tokens, lengths), hosts.gather(advantage).reshape(tokens.shape)
    content = (np.arange(tokens.shape[1]) < lengths[:, None]) & ~structural
    return {
        "parse": np.mean(parsed),
        "ended": np.mean(codec.ended(tokens, lengths)),
        "advantage_structural": _mean(values[structural]),
        "advantage_content": _mean(values[content]),
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
