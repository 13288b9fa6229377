"""OPD without rollouts: against the OPD step where the drawn token does not matter, and its mean where it does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_opd_step import (
    EXACT,
    FROZEN,
    MODELS,
    STUDENT,
    STUDENT_DEF,
    VOCAB,
    N,
    batch,  # noqa: F401 (a fixture)
    hyper,
    own,
)
from test_reference import config_of, models  # noqa: F401 (a fixture)

from listopd_jax.ops.head import token_logprobs
from listopd_jax.ops.objective import Variant
from listopd_jax.rollout.decode import completion_mask
from listopd_jax.stages import fixed_text as stage
from listopd_jax.stages.pipeline import distillation, frozen_models
from listopd_jax.stages.prepare import job_on_mesh
from listopd_jax.train.fixed_text import Schedule, Texts, make_fixed_text
from listopd_jax.train.opd_step import make_opd_step, states_and_heads
from listopd_jax.train.optimizer import init_state

ADAM, SGD = optax.scale_by_adam(), optax.identity()
LAM, LR = 1.5, 0.01


@pytest.fixture(scope="module")
def texts(batch):  # noqa: F811
    hiddens, heads = states_and_heads(MODELS, STUDENT, FROZEN, batch)
    as_arrays = jax.tree.map(jnp.asarray, Texts(batch, hiddens._replace(student=None)))
    return as_arrays, heads._replace(student=None)


def schedule(lists, key, lam=LAM):
    """The lists of each step, given one row a step."""
    steps = len(lists)
    scalars = jax.tree.map(lambda x: jnp.full(steps, x), hyper(lam))
    return Schedule(jnp.array(lists), jax.random.split(key, steps), scalars, jnp.full(steps, LR))


def trained(texts, variant, tx, plan):
    found, heads = texts
    train = make_fixed_text(STUDENT_DEF, tx, variant, vocab=VOCAB, chunk=7)
    return train(own(STUDENT), FROZEN.base, heads, found, plan)


def rows_of(batch, rows):  # noqa: F811
    return jax.tree.map(lambda x: x[np.array(rows)], batch)


def test_with_exact_losses_it_is_the_opd_step_on_the_same_texts(batch, texts):  # noqa: F811
    lists = [[0, 2], [3, 1], [1, 2]]
    found = trained(texts, EXACT, ADAM, schedule(lists, jax.random.key(0)))
    step = make_opd_step(MODELS, ADAM, EXACT, vocab=VOCAB, chunk=7)
    state = init_state(own(STUDENT), ADAM)
    for rows in lists:
        state, *_ = step(state, FROZEN, rows_of(batch, rows), hyper(LAM), LR)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, found, STUDENT))
    assert moved > 0.1
    assert optax.tree.norm(jax.tree.map(jnp.subtract, found, state.params)) < 1e-4 * moved


def test_the_drawn_tokens_give_the_exact_gradient_in_the_mean(texts):
    lists, draws = [[0, 1, 2, 3]], 1000
    exact = trained(texts, EXACT, SGD, schedule(lists, jax.random.key(0)))
    found, heads = texts
    train = make_fixed_text(STUDENT_DEF, SGD, Variant("none"), vocab=VOCAB, chunk=4 * N * 5)
    moments = jax.jit(
        lambda keys: jax.lax.map(
            lambda key: train(STUDENT, FROZEN.base, heads, found, schedule(lists, key)), keys, batch_size=200
        )
    )(jax.random.split(jax.random.key(1), draws))
    apart, noise = 0.0, 0.0
    for many, one in zip(jax.tree.leaves(moments), jax.tree.leaves(exact), strict=True):
        many, one = np.asarray(many, np.float64), np.asarray(one, np.float64)
        apart += ((many.mean(0) - one) ** 2).sum()
        noise += many.var(0).sum() / draws
    assert noise > 0 and apart < 3 * noise


def test_the_texts_are_the_students_own(models, tmp_path):  # noqa: F811
    fields = {"predict.fixed_text_lists": 3, "predict.anchors": (1.0, 1.5, 2.0), "predict.seeds": (1,)}
    config = config_of(models, **fields)
    with job_on_mesh(config, tmp_path) as job:
        shared = distillation(job, frozen_models(job), None)
        found, heads = stage._texts(job, shared)
        assert len(found.batch.prompts) == 4  # two batches of two
        rollout, student = found.batch.rollout, shared.start(0)
        hiddens, heads = states_and_heads(
            stage.models_of(job), student, shared.frozen, jax.tree.map(jnp.asarray, found.batch)
        )
        logp, _ = token_logprobs(hiddens.student, heads.student, rollout.tokens, job.codec.vocab, 64)
        mask = np.asarray(completion_mask(rollout.lengths, rollout.tokens.shape[-1]))
        assert mask.sum() > 50
        np.testing.assert_allclose(np.asarray(logp)[mask], np.asarray(rollout.logprobs)[mask], atol=1e-4)
        np.testing.assert_allclose(found.hiddens.teacher, hiddens.teacher, atol=1e-5)
        parse = stage.fixed_text_parse(job, shared, [2.0])
        assert parse.shape == (1, 1) and ((parse >= 0) & (parse <= 1)).all()


def test_a_schedule_is_that_of_the_run(models):  # noqa: F811
    config = config_of(models, **{"opd.lr_decay": "linear", "opd.lambda_warmup_steps": 4, "opd.steps": 8})
    plan = stage.schedule_of(config.opd, 3.0, seed=1, lists=6, steps=8)
    assert plan.lists.shape == (8, 2) and all(len(set(row)) == 2 for row in plan.lists.tolist())
    np.testing.assert_allclose(plan.hyper.lam, [1, 1.5, 2, 2.5, 3, 3, 3, 3])
    assert plan.lr[0] > plan.lr[-1] > 0 and plan.lr[0] == pytest.approx(config.opd.lr)


def test_the_band_is_students(rng=np.random.default_rng(0)):  # noqa: B008
    known, others = rng.normal(0.5, 0.05, (4, 2000)), rng.normal(0.5, 0.05, (8, 2000)).mean(0)
    low, high = stage.band(known, seeds=8)
    assert ((low < others) & (others < high)).mean() == pytest.approx(0.9, abs=0.03)
    assert stage.band(known[:1], seeds=8) is None
