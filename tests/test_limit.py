"""Where the estimator with ratio `teacher_student` ends, against SciPy and against the mean flow of two tokens."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import lambertw

from listopd_jax.ops.guard import Guard, guarded
from listopd_jax.ops.limit import _lambert_below_zero, _lambert_of_log, teacher_student_limit
from listopd_jax.theory.estimators import limit_log_odds


def log_distribution(rng, size, scale=3.0):
    logits = scale * rng.normal(size=size)
    return logits - np.logaddexp.reduce(logits)


def solved(teacher, base, lam, clip):
    """q of the module's equation in float64: Lambert's function and the root by SciPy."""
    r = np.exp((lam - 1) * (teacher - base))
    target = np.exp(teacher) * r

    def q(kappa):
        return target * np.exp(-np.maximum(lambertw(kappa * r).real, kappa / clip))

    return q(brentq(lambda kappa: q(kappa).sum() - 1, 0, clip * np.log(target.sum()) + 1e-9, xtol=1e-14))


def test_lamberts_function_is_scipys():
    z = np.linspace(-60, 60, 2001).astype(np.float32)
    np.testing.assert_allclose(
        _lambert_of_log(jnp.array(z)), lambertw(np.exp(z.astype(float))).real, rtol=1e-5
    )
    z = np.linspace(-20, -1.001, 2001).astype(np.float32)
    below = lambertw(-np.exp(z.astype(float))).real
    np.testing.assert_allclose(_lambert_below_zero(jnp.array(z)), below, rtol=1e-4)


def test_the_limit_solves_its_equation():
    rng = np.random.default_rng(0)
    for clip in (1.5, 5.0, 50.0):
        lam = rng.uniform(1, 3, 12)
        teacher, base = ([log_distribution(rng, 6) for _ in lam] for _ in range(2))
        found = teacher_student_limit(
            jnp.float32(teacher), jnp.float32(base), jnp.float32(lam), jnp.float32(clip)
        )
        expected = [solved(*row, clip) for row in zip(teacher, base, lam, strict=True)]
        np.testing.assert_allclose(np.exp(found), expected, atol=2e-4)


def test_of_many_tokens_the_unlikely_count_as_one():
    rng = np.random.default_rng(4)
    teacher, base = ([log_distribution(rng, 300) for _ in range(8)] for _ in range(2))
    found = teacher_student_limit(jnp.float32(teacher), jnp.float32(base), jnp.full(8, 1.5), jnp.float32(5.0))
    expected = [solved(t, b, 1.5, 5.0) for t, b in zip(teacher, base, strict=True)]
    np.testing.assert_allclose(np.exp(found), expected, atol=0.01)
    assert (np.argmax(found, -1) == np.argmax(expected, -1)).all()


@pytest.mark.parametrize(
    ("p", "b", "lam", "clip"),
    [(0.684, 0.988, 1.2, 5.0), (0.684, 0.988, 1.35, 5.0), (0.9, 0.95, 1.5, 1.5), (0.9, 0.8, 0.7, 5.0)],
)
def test_of_two_tokens_it_is_where_the_mean_flow_ends(p, b, lam, clip):
    teacher, base = (jnp.log(jnp.array([x, 1 - x])) for x in (p, b))
    found = teacher_student_limit(teacher, base, jnp.float32(lam), jnp.float32(clip))
    assert float(found[0] - found[1]) == pytest.approx(limit_log_odds(p, b, lam, clip), abs=5e-3)


def test_at_lambda_1_the_limit_is_the_teacher():
    rng = np.random.default_rng(1)
    teacher, base = (jnp.float32([log_distribution(rng, 9) for _ in range(4)]) for _ in range(2))
    np.testing.assert_allclose(
        teacher_student_limit(teacher, base, jnp.ones(4), jnp.float32(5.0)), teacher, atol=1e-5
    )


def test_a_guard_that_gives_way_to_the_limit_changes_the_target_alone():
    rng = np.random.default_rng(2)
    teacher, base = (jnp.float32([log_distribution(rng, 9) for _ in range(4)]) for _ in range(2))
    found = guarded(teacher, base, jnp.float32(1.4), Guard(limit=True, clip=jnp.float32(5.0)))
    expected = teacher_student_limit(teacher, base, jnp.float32(1.4), jnp.float32(5.0))
    np.testing.assert_array_equal(found.target, expected)
    np.testing.assert_array_equal(found.lam, np.float32([1.4] * 4))
