"""The guards that know the contract: mask, floor and a λ of structure, against float64 twins; any automaton will do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_opd_step import (
    EXACT,
    STUDENT,
    STUDENT_DEF,
    assert_close,
    batch,  # noqa: F401
    frozen_logps,  # noqa: F401
    hyper,
    naive_logp,
    run,
)  # noqa: F401

from listopd_jax.config import defaults, validate
from listopd_jax.errors import UserError
from listopd_jax.ops.grammar import START, Grammar, states
from listopd_jax.ops.guard import Guard, guarded
from listopd_jax.ops.objective import BANNED, Variant

V, S = 16, 7
rng = np.random.default_rng(2)
STEP = np.where(rng.random((S, 5)) < 0.5, 0, rng.integers(1, S, (S, 5)))
STEP[0] = 0
COLUMN = rng.integers(0, 5, V)
CONTENT = (rng.random((S, 5)) < 0.5) & (rng.random((S, 1)) < 0.5) & (STEP > 0)
TABLES = Grammar(jnp.asarray(STEP, jnp.int32), jnp.asarray(COLUMN, jnp.int32), jnp.asarray(CONTENT))
N = 600
STATE = rng.integers(0, S, N)
TEACHER, BASE = (np.asarray(jax.nn.log_softmax(jnp.asarray(s * rng.normal(size=(N, V))))) for s in (2.0, 3.0))


def allowed_at(state):
    """The tokens that lead on; all of them in a state that none leads out of."""
    leads = STEP[state][..., COLUMN] > 0
    return leads | ~(STEP[state] > 0).any(-1)[..., None]


def renormalized(logp, allowed):
    rest = np.where(allowed, logp, -np.inf)
    return rest - np.logaddexp.reduce(rest, -1, keepdims=True)


def twin(teacher, base, state, lam, mask=False, floor=0.0, structure=-1.0, scope="all"):
    """(teacher, base, λ, log target relative to the teacher's mode, allowed) in float64; −∞ where forbidden."""
    teacher, base = (np.asarray(x, np.float64) for x in (teacher, base))
    allowed = allowed_at(state) if mask else np.ones(teacher.shape, bool)
    teacher, base = (renormalized(x, allowed) if mask else x for x in (teacher, base))
    content = CONTENT[state][..., COLUMN]
    own = np.where(CONTENT[state].any(-1) | (structure < 0), lam, structure)
    mode = teacher.argmax(-1)[..., None]
    with np.errstate(invalid="ignore"):
        delta_t, delta_b = (np.take_along_axis(x, mode, -1) - x for x in (teacher, base))
        gap = own[..., None] * delta_t - (own[..., None] - 1) * delta_b
    kept = (np.arange(V) == mode) | (content & (scope == "structure"))
    gap = np.where(
        allowed,
        gap if not floor else np.where(kept, gap, np.maximum(gap, np.minimum(delta_b, floor))),
        np.inf,
    )
    return teacher, base, own, -gap, allowed


CASES = {
    "mask": {"mask": True},
    "floor": {"floor": 4.0},
    "floor of structure": {"floor": 4.0, "scope": "structure"},
    "structure": {"structure": 1.0},
    "all": {"mask": True, "floor": 1.0, "structure": 0.5, "scope": "structure"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("lam", [0.7, 1.3, 3.0])
def test_the_target_is_its_twin(lam, options):
    found = guarded(TEACHER, BASE, jnp.float32(lam), Guard(grammar=TABLES, **options), jnp.asarray(STATE))
    _, _, own, target, allowed = twin(TEACHER, BASE, STATE, lam, **options)
    np.testing.assert_allclose(found.lam, own)
    got = np.asarray(jax.nn.log_softmax(found.target), np.float64)
    wanted = target - np.logaddexp.reduce(target, -1, keepdims=True)
    np.testing.assert_allclose(np.where(allowed, got, 0), np.where(allowed, wanted, 0), atol=2e-4)
    assert (np.exp(got)[~allowed] == 0).all()


@pytest.mark.parametrize("lam", [1.0, 2.0, 5.0])
def test_a_mask_mends_a_teacher_whose_own_mode_is_forbidden(lam):
    alive = (STEP[STATE] > 0).any(-1)
    broken = ~np.take_along_axis(allowed_at(STATE), TEACHER.argmax(-1)[:, None], 1)[:, 0]
    found = guarded(TEACHER, BASE, jnp.float32(lam), Guard(grammar=TABLES, mask=True), jnp.asarray(STATE))
    choice = np.asarray(found.target.argmax(-1))
    assert broken.any() and (STEP[STATE, COLUMN[choice]] > 0)[alive].all()


@pytest.mark.parametrize("lam", [1.5, 4.0])
def test_a_floor_keeps_the_mode_that_teacher_and_base_share(lam):
    found = guarded(TEACHER, BASE, jnp.float32(lam), Guard(floor=2.0))
    mode = TEACHER.argmax(-1)
    shared = BASE.argmax(-1) == mode
    plain = (lam * TEACHER + (1 - lam) * BASE).argmax(-1)
    assert (plain != mode)[shared].any() and (found.target.argmax(-1) == mode)[shared].all()


def naive(params, batch, lam, variant, options, teacher, base):  # noqa: F811
    """The loss from the twin's target: advantage BANNED and ratio 1 of what is forbidden."""
    tokens = batch.rollout.tokens
    state = np.asarray(states(TABLES, jnp.full(tokens.shape[:2], START), tokens))
    t, _, _, target, allowed = twin(teacher, base, state, lam, **options)
    student = naive_logp(STUDENT_DEF, params, batch)
    detached = jax.lax.stop_gradient(student)
    if variant is EXACT:
        goal = np.where(allowed, target, -1e9)
        goal = jnp.where(allowed, jax.nn.log_softmax(goal), detached + BANNED)
        loss = (jnp.exp(student) * (student - goal)).sum(-1)
    else:
        at = lambda x: jnp.take_along_axis(x, jnp.asarray(tokens)[..., None], -1)[..., 0]  # noqa: E731
        mode = t.argmax(-1)[..., None]
        lam_t = twin(teacher, base, state, lam, **options)[2][..., None]
        with np.errstate(invalid="ignore"):
            height = lam_t * t + (1 - lam_t) * twin(teacher, base, state, lam, **options)[1]
        logits = np.where(allowed, target, 0) + np.take_along_axis(height, mode, -1)
        if variant.normalize:
            logits = logits - np.logaddexp.reduce(np.where(allowed, logits, -np.inf), -1, keepdims=True)
        ok = at(jnp.asarray(allowed))
        adv = jnp.where(ok, at(jnp.asarray(logits)) - at(detached), BANNED)
        ratio = jnp.where(ok, jnp.minimum(5.0, jnp.exp(at(jnp.where(allowed, t, 0.0)) - at(detached))), 1.0)
        loss = -(ratio * adv) * at(student)
    mask = np.arange(tokens.shape[-1]) < batch.rollout.lengths[..., None]
    return (loss * mask).sum() / mask.sum()


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    "variant", [EXACT, Variant(), Variant(normalize=True)], ids=["exact", "sampled", "normalized"]
)
def test_the_update_is_the_naive_one(batch, frozen_logps, variant, options):  # noqa: F811
    _, _, grads = run(batch, hyper(1.6), variant._replace(**options), 2, grammar=TABLES)
    loss = lambda p: naive(p, batch, 1.6, variant, options, *frozen_logps)  # noqa: E731
    assert_close(grads, jax.grad(loss)(STUDENT), 3e-4)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("floor", -1.0, "floor"), ("structure", -0.5, "opd.guard.structure=-0.5: a λ ≥ 0, or -1")],
)
def test_values_that_mean_nothing_are_refused(name, value, says):
    config = defaults()
    config.opd.guard[name] = value
    with pytest.raises(UserError, match=says):
        validate(config)


@pytest.mark.parametrize(("name", "value"), [("mask", True), ("floor", 4.0), ("structure", 1.0)])
def test_without_a_base_there_is_nothing_to_guard(name, value):
    config = defaults()
    config.opd.guard[name], config.opd.advantage = value, "no_base"
    with pytest.raises(UserError, match=f"opd.guard.{name} guards the base-relative target"):
        validate(config)
