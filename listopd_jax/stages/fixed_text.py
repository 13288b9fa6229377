"""The parse of students that are trained without rollouts, on a few texts: a predictor (train/fixed_text.py)."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import stats

from listopd_jax.config import guard_text
from listopd_jax.models.lora import with_adapter
from listopd_jax.ops.opd_loss import Frozen, Models
from listopd_jax.parallel.compiler import OTHER, BackendJit
from listopd_jax.rollout.state import Rollout
from listopd_jax.rounding import ceil_div
from listopd_jax.stages.job import Job, base_of
from listopd_jax.stages.opd import (
    Distillation,
    hyper_at,
    learning_rate,
    merged_student,
    opd_steps,
    read_by_models,
    sample,
    variant_of,
)
from listopd_jax.stages.results import greedy
from listopd_jax.stages.teachers import experts_of
from listopd_jax.train.fixed_text import Schedule, Texts, make_fixed_text
from listopd_jax.train.opd_step import OpdBatch, states_and_heads

LEVEL = 0.9  # of the band


def fixed_text_parse(job: Job, shared: Distillation, lambdas: Sequence[float]) -> Float[np.ndarray, "S L"]:
    """The share of validation lists that parse, for each of `predict.seeds` and each λ."""
    opd, guard = job.config.opd, job.guard_of(guard_text(job.config.opd.guard))
    texts, heads = _texts(job, shared)
    train = make_fixed_text(
        job.trained["student"], shared.tx, variant_of(opd), vocab=job.codec.vocab, chunk=opd.head_chunk,
        temperature=opd.temperature, grammar=None if guard is None else guard.grammar,
    )  # fmt: skip

    def parse(lam: float, seed: int) -> float:
        schedule = schedule_of(opd, lam, seed, len(texts.batch.prompts), opd_steps(job))
        trained = train(shared.start(seed), shared.frozen.base, heads, texts, schedule)
        answers = greedy(job, "student", merged_student(job, shared, trained), f"fixed text, λ = {lam:g}")
        return float(np.mean([a.parsed.ok for a in answers]))

    return np.array([[parse(lam, seed) for lam in lambdas] for seed in job.config.predict.seeds])


def band(
    parse: Float[np.ndarray, "S L"], seeds: int
) -> tuple[Float[np.ndarray, " L"], Float[np.ndarray, " L"]] | None:
    """Where the mean of `seeds` other runs should lie, by Student's t over the S that are known; None for one."""
    known = len(parse)
    if known < 2:
        return None
    t = stats.t.ppf((1 + LEVEL) / 2, known - 1)
    # 1/known + 1/seeds: both means are uncertain, the one that predicts and the one to be predicted.
    margin = t * parse.std(0, ddof=1) * np.sqrt(1 / known + 1 / seeds)
    low, high = (np.clip(parse.mean(0) + sign * margin, 0, 1) for sign in (-1, 1))
    return low, high


def _texts(job: Job, shared: Distillation) -> tuple[Texts, Models]:
    """`predict.fixed_text_lists` prompts, or a few more, with the student's answers now; the frozen models' heads."""
    options, models, start = job.config, models_of(job), shared.start(0)
    sampler, student = with_adapter(shared.frozen.base, start), merged_student(job, shared, start)
    count = ceil_div(options.predict.fixed_text_lists, options.opd.batch_size)
    parts = []
    for number, batch in enumerate(itertools.islice(job.opd_batches(seed=0), count)):
        batch = _completed(job, sampler, batch, jax.random.key(number))
        hiddens, heads = _read(models, student, shared.frozen, batch)
        parts.append(Texts(batch, hiddens))
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts), heads


def models_of(job: Job) -> Models:
    """The static halves of the models of a job, the student's as one model without adapter."""
    graphs = job.graphs
    return Models(
        student=graphs["student"],
        teacher=graphs["teacher"],
        base=base_of(graphs),
        experts=experts_of(graphs),
    )


@functools.partial(BackendJit, options=OTHER, static_argnums=0)
def _read(graphs: Models, student: Any, frozen: Frozen, batch: OpdBatch) -> tuple[Models, Models]:
    """States and heads of the frozen models; nothing of the student's, which changes."""
    hiddens, heads = states_and_heads(graphs, student, frozen, batch)
    return hiddens._replace(student=None), heads._replace(student=None)


def _completed(job: Job, sampler: Any, batch: Mapping[str, np.ndarray], key: Array) -> OpdBatch:
    """A training batch with its completions; prompts and completions padded to the largest sizes."""
    _, prompts, lengths, *for_teachers = read_by_models(job, batch)
    rollout = sample(job, sampler, prompts, lengths, key)
    fill = job.max_response - rollout.tokens.shape[-1]
    tokens, logprobs = (jnp.pad(x, ((0, 0), (0, 0), (0, fill))) for x in (rollout.tokens, rollout.logprobs))
    prompts = jnp.pad(prompts, ((0, 0), (0, job.buckets[-1] - prompts.shape[1])))
    return OpdBatch(prompts, lengths, Rollout(tokens, logprobs, rollout.lengths), None, *for_teachers)


def schedule_of(opd: Any, lam: float, seed: int, lists: int, steps: int) -> Schedule:
    """The steps of a run of section `opd` at λ: the inputs of each, and which of the texts it takes."""
    order, each = np.random.default_rng(seed), min(opd.batch_size, lists)
    hyper = jax.tree.map(lambda *xs: jnp.stack(xs), *(hyper_at(opd, lam, step) for step in range(steps)))
    return Schedule(
        jnp.array([order.choice(lists, each, replace=False) for _ in range(steps)]),
        jax.random.split(jax.random.key(seed), steps),
        hyper,
        jnp.array([learning_rate(opd, step, steps) for step in range(steps)], jnp.float32),
    )
