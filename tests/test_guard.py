"""The guard: what it promises of the target, its limits, and the update that uses it."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from test_opd_step import EXACT, STUDENT, assert_close, batch, frozen_logps, hyper, naive_loss, run  # noqa: F401

from listopd_jax.config import defaults, guard_text, validate
from listopd_jax.errors import UserError
from listopd_jax.ops.grammar import START, Grammar, content_tokens, states
from listopd_jax.ops.guard import Guard, flip_lambda, guarded_lambda
from listopd_jax.ops.guard import guarded as apply_guard
from listopd_jax.ops.objective import Variant, target_log_distribution

rng = np.random.default_rng(0)
TEACHER, BASE = (jax.nn.log_softmax(jnp.asarray(s * rng.normal(size=(400, 12)))) for s in (2.0, 3.0))
MODE = TEACHER.argmax(-1)
FLIP = flip_lambda(TEACHER, BASE, MODE)


def guarded(lam, margin, fallback="teacher"):
    return guarded_lambda(TEACHER, BASE, jnp.float32(lam), jnp.float32(margin), fallback)


@pytest.mark.parametrize("fallback", ["teacher", "base"])
@pytest.mark.parametrize("lam", [1.05, 1.3, 2.0, 5.0])
@pytest.mark.parametrize("margin", [1.001, 1.25, 2.0])
def test_the_guarded_target_keeps_the_teachers_mode_and_the_plain_one_does_not(lam, margin, fallback):
    own = guarded(lam, margin, fallback)
    target = target_log_distribution(TEACHER, BASE, own[:, None], "base_relative")
    plain = target_log_distribution(TEACHER, BASE, lam, "base_relative")
    assert (target.argmax(-1) == MODE).all()
    assert ((plain.argmax(-1) != MODE) == (lam > FLIP)).all()
    assert set(np.unique(own)) == {0.0, 1.0, np.float32(lam)} - ({0.0} if fallback == "teacher" else set())


def test_with_one_rival_the_base_is_the_surer_of_the_mode_where_it_stands_in():
    teacher, base = (x[:, :2] - jax.nn.logsumexp(x[:, :2], -1, keepdims=True) for x in (TEACHER, BASE))
    own = guarded_lambda(teacher, base, jnp.float32(1.3), jnp.float32(1.25), "base")
    sure_t, sure_b = (np.asarray(x.max(-1))[own == 0] for x in (teacher, base))
    assert len(sure_t) > 20 and (sure_b > sure_t).all()


def test_a_larger_margin_guards_more_and_without_a_rival_nothing_is_guarded():
    shares = [float((guarded(1.3, margin) == 1).mean()) for margin in (1.0, 1.25, 2.0, 1e9)]
    assert shares == sorted(shares) and shares[0] < shares[-1]
    assert shares[-1] == float(jnp.isfinite(FLIP).mean()) < 1


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_no_extrapolation_no_guard_by_the_teacher(lam):
    assert (guarded(lam, 1e9) == lam).all()


@pytest.mark.parametrize("fallback", ["teacher", "base"])
@pytest.mark.parametrize("variant", [EXACT, Variant("aspo"), Variant()])
def test_the_update_is_the_naive_one_with_a_lambda_for_each_position(
    batch,  # noqa: F811
    frozen_logps,  # noqa: F811
    variant,
    fallback,
):
    lam, margin = 1.4, 1.5
    teacher, base = (np.asarray(x, np.float64) for x in frozen_logps)
    agrees = (teacher.argmax(-1) == base.argmax(-1)) & (fallback == "base")
    own = np.where(lam * margin <= oracles.flip_lambda(teacher, base), lam, np.where(agrees, 0.0, 1.0))
    scalars = hyper(lam)._replace(guard_margin=jnp.float32(margin))
    metrics, per_token, grads = run(batch, scalars, variant._replace(guard=fallback), microbatch=2)
    written = per_token["student"] != 0
    np.testing.assert_allclose(per_token["lambda"][written], own[written], rtol=1e-6)
    assert 0 < metrics["guarded_fraction"] < 1
    assert metrics["guarded_fraction"] == pytest.approx((own[written] != lam).mean())
    used = own[..., None] if variant is EXACT else own
    loss = lambda p: naive_loss(p, *frozen_logps, batch, used, 5.0, 0.0, 0.0, 0.2, variant)  # noqa: E731
    assert_close(grads, jax.jit(jax.grad(loss))(STUDENT))


def test_at_lambda_one_guarded_is_plain(batch):  # noqa: F811
    plain, guarded = (
        run(batch, hyper(1.0)._replace(guard_margin=jnp.float32(9.0)), Variant(guard=on))
        for on in ("", "teacher")
    )
    assert_close(guarded, plain, 1e-6)  # two programs: their last bits may differ


def test_records_name_the_options_of_a_guard_and_nothing_where_it_is_off():
    guard = defaults().opd.guard
    assert guard_text(guard) == ""
    guard.scope = "structure"  # alone it guards nothing
    assert guard_text(guard) == ""
    guard.update(margin=1.25, fallback="base")
    assert sorted(guard_text(guard).split()) == ["fallback=base", "margin=1.25", "scope=structure"]


@pytest.mark.parametrize(
    ("margin", "advantage", "word"), [(0.5, "base_relative", "margin"), (1.25, "no_base", "no_base")]
)
def test_a_guard_that_cannot_work_is_refused(margin, advantage, word):
    config = defaults()
    config.opd.guard.margin, config.opd.advantage = margin, advantage
    with pytest.raises(UserError, match=word):
        validate(config)


# --- scope "structure": any tables of an automaton will do ---

draw = np.random.default_rng(1)
TABLES = Grammar(
    jnp.asarray(draw.integers(0, 7, (7, 5)), jnp.int32),
    jnp.asarray(draw.integers(0, 5, 16), jnp.int32),
    jnp.asarray(draw.random((7, 5)) < 0.7),
)


def test_states_are_those_of_a_walk_token_by_token():
    tokens = draw.integers(0, 16, (3, 2, 6))
    found = states(TABLES, jnp.full((3, 2), START), jnp.asarray(tokens))
    step, column = np.asarray(TABLES.step), np.asarray(TABLES.column)
    for row, text in zip(np.asarray(found).reshape(-1, 6), tokens.reshape(-1, 6), strict=True):
        state = START
        for seen, token in zip(row, text, strict=True):
            assert seen == state
            state = step[state, column[token]]


def harmless_at(state):
    """The twin of `content_tokens` in NumPy."""
    return np.asarray(TABLES.content)[state][..., np.asarray(TABLES.column)]


@pytest.mark.parametrize("lam", [1.05, 1.5, 3.0])
def test_with_scope_structure_only_other_flips_count(lam):
    teacher, base = (jax.nn.log_softmax(jnp.asarray(s * draw.normal(size=(500, 16)))) for s in (2.0, 3.0))
    state = draw.integers(0, 7, 500)
    harmless = harmless_at(state)
    assert (content_tokens(TABLES, jnp.asarray(state)) == harmless).all()
    guard = Guard(jnp.float32(1.25), "teacher", TABLES, "structure")
    own = apply_guard(teacher, base, jnp.float32(lam), guard, state).lam
    mode = np.asarray(teacher.argmax(-1))
    others = harmless & (np.arange(16) != mode[:, None])  # a token that both forbid is no rival
    flip = oracles.flip_lambda(
        *(np.where(others, -np.inf, np.asarray(x, np.float64)) for x in (teacher, base))
    )
    np.testing.assert_allclose(own, np.where(lam * 1.25 <= flip, lam, 1.0), rtol=1e-6)
    target = lam * np.asarray(teacher, np.float64) + (1 - lam) * np.asarray(base, np.float64)
    target = np.where((np.asarray(own) == lam)[:, None], target, teacher).argmax(-1)
    flipped = target != mode
    assert flipped.any() and np.take_along_axis(harmless, target[:, None], 1)[flipped].all()


@pytest.mark.parametrize("variant", [EXACT, Variant()])
def test_the_update_with_scope_structure_is_the_naive_one(batch, frozen_logps, variant):  # noqa: F811
    lam, margin = 1.4, 1.5
    teacher, base = (np.asarray(x, np.float64) for x in frozen_logps)
    state = np.asarray(states(TABLES, jnp.full(batch.rollout.tokens.shape[:2], START), batch.rollout.tokens))
    others = harmless_at(state) & (np.arange(16) != teacher.argmax(-1)[..., None])
    flip = oracles.flip_lambda(*(np.where(others, -np.inf, x) for x in (teacher, base)))
    own = np.where(lam * margin <= flip, lam, 1.0)
    assert (own != np.where(lam * margin <= oracles.flip_lambda(teacher, base), lam, 1.0)).any()
    scalars = hyper(lam)._replace(guard_margin=jnp.float32(margin))
    _, per_token, grads = run(
        batch, scalars, variant._replace(guard="teacher", scope="structure"), 2, grammar=TABLES
    )
    written = per_token["student"] != 0
    np.testing.assert_allclose(per_token["lambda"][written], own[written], rtol=1e-6)
    used = own[..., None] if variant is EXACT else own
    loss = lambda p: naive_loss(p, *frozen_logps, batch, used, 5.0, 0.0, 0.0, 0.2, variant)  # noqa: E731
    assert_close(grads, jax.jit(jax.grad(loss))(STUDENT))


def test_a_scope_without_a_guard_is_refused():
    config = defaults()
    config.opd.guard.scope = "structure"
    with pytest.raises(
        UserError, match="opd.guard.scope='structure' does nothing alone: set opd.guard.margin"
    ):
        validate(config)
    config.opd.guard.margin = 1.25
    validate(config)
