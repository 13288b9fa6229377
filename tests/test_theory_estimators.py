"""The mean drift of each estimator against the project's own objective, and the limits it leads to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from listopd_jax import theory
from listopd_jax.ops.objective import Hyper, Variant, log_normalizer, sampled_loss
from listopd_jax.theory.estimators import drift, flip_lambda_of, limit_log_odds

PAIRS = [(0.684, 0.988), (0.9, 0.6), (0.7, 0.7)]


def objective_drift(theta, p, b, lam, c, ratio, advantage, normalize):
    """Minus the gradient of the objective's loss, averaged exactly over the student's two tokens."""
    hyper = Hyper(lam=lam, clip=c, kl_to_base=0.0, entropy_bonus=0.0, ppo_clip=0.0)

    def pair(x):
        return jnp.stack([jax.nn.log_sigmoid(x), jax.nn.log_sigmoid(-x)])

    teacher, base = pair(theory.log_odds(p)), pair(theory.log_odds(b))
    rollout = jax.lax.stop_gradient(pair(theta))
    log_z = log_normalizer(teacher, base, lam, advantage) if normalize else 0.0

    def loss(theta):
        per_token, _ = sampled_loss(
            pair(theta),
            jnp.zeros(2),
            teacher,
            base,
            rollout,
            hyper,
            Variant(ratio, advantage),
            lam=lam,
            log_z=log_z,
        )
        return (jnp.exp(rollout) * per_token).sum()

    return -jax.grad(loss)(theta)


@pytest.mark.parametrize("ratio", ["none", "teacher_student", "trainer_rollout", "aspo"])
@pytest.mark.parametrize("advantage", ["base_relative", "no_base"])
@pytest.mark.parametrize("normalize", [False, True])
def test_drift_is_the_objectives_expected_gradient(ratio, advantage, normalize):
    for p, b in PAIRS:
        for theta in (-3.0, 0.0, 2.5):
            for lam, c in ((1.0, 5.0), (1.4, 1.2)):
                at = theta, p, b, lam, c, ratio, advantage, normalize
                assert drift(*at) == pytest.approx(float(objective_drift(*at)), abs=2e-6)


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.floats(0.5, 3), st.floats(-6, 6))
def test_without_a_ratio_the_drift_points_to_the_target(p, b, lam, theta):
    q = theory.probability(theta)
    expected = q * (1 - q) * (theory.fixed_point_log_odds(p, b, lam) - theta)
    assert drift(theta, p, b, lam, 5.0, "none") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("p", "b"), [(0.684, 0.988), (0.9993, 0.81), (0.6, 0.3)])
@pytest.mark.parametrize("lam", [1.0, 1.2, 2.0])
def test_limits(p, b, lam):
    target = theory.fixed_point_log_odds(p, b, lam)
    assert limit_log_odds(p, b, lam, ratio="none") == pytest.approx(target, abs=1e-9)
    biased = limit_log_odds(p, b, lam, 5.0, "teacher_student")
    assert drift(biased, p, b, lam, 5.0) == pytest.approx(0, abs=1e-9)
    if lam == 1:
        assert biased == pytest.approx(theory.log_odds(p), abs=1e-9)  # log Z = 0: the teacher is the limit
    else:
        low, high = sorted((target, theory.log_odds(p)))
        assert low < biased < high  # the ratio holds the student back, between target and teacher


@pytest.mark.parametrize("ratio", ["none", "teacher_student", "aspo"])
@pytest.mark.parametrize(("p", "b"), [(0.684, 0.988), (0.9993, 0.81), (0.6, 0.3)])
@pytest.mark.parametrize("lam", [0.0, 1.0, 1.2, 2.0, 3.0])
def test_normalized_every_ratio_ends_at_the_target(ratio, p, b, lam):
    """Also where plain `aspo` runs away."""
    for c in (1.5, 5.0, np.inf):
        limit = limit_log_odds(p, b, lam, c, ratio, normalize=True)
        assert limit == pytest.approx(theory.fixed_point_log_odds(p, b, lam), abs=1e-9)
        assert limit_log_odds(p, b, lam, c, ratio, "no_base", normalize=True) == pytest.approx(
            lam * theory.log_odds(p), abs=1e-9
        )


def test_no_base_keeps_the_mode_at_every_lambda():
    for ratio in ("none", "teacher_student", "aspo"):
        for lam in np.linspace(1, 4, 13):
            limit = limit_log_odds(0.684, 0.988, lam, 5.0, ratio, "no_base")
            assert limit > theory.log_odds(0.684) - 1e-9


def test_the_ratio_moves_the_flip():
    flips = {ratio: flip_lambda_of(0.684, 0.988, ratio, 5.0) for ratio in ("none", "teacher_student", "aspo")}
    assert flips["none"] == pytest.approx(theory.flip_lambda(0.684, 0.988), rel=1e-12)
    assert flips["aspo"] < flips["none"] < flips["teacher_student"]
    for ratio, lam in flips.items():
        below, above = (limit_log_odds(0.684, 0.988, lam * x, 5.0, ratio) for x in (0.999, 1.001))
        assert below > 0 > above


def test_a_surer_teacher_never_flips():
    assert flip_lambda_of(0.9993, 0.81, "none") == np.inf


def test_crossing_the_clip_boundary_leaves_the_mean_flow_smooth():
    # EC Eq. 4's threshold is 1.277 here: the limit's tail changes there neither in value nor in slope, to 3 %
    lams = 1.277 + np.array([-0.02, -0.01, 0.01, 0.02])
    clipped, free = (
        [limit_log_odds(0.9993, 0.81, lam, c, "teacher_student") for lam in lams] for c in (5.0, np.inf)
    )
    np.testing.assert_allclose(clipped, free, rtol=1e-3)
    before, after = np.diff(clipped)[[0, 2]]
    assert after == pytest.approx(before, rel=0.03)


def test_aspo_runs_away_past_a_point():
    assert np.isfinite(limit_log_odds(0.9993, 0.81, 1.2, 5.0, "aspo"))
    assert limit_log_odds(0.9993, 0.81, 1.5, 5.0, "aspo") == np.inf
    assert limit_log_odds(0.684, 0.988, 1.5, 5.0, "aspo") == -np.inf


def test_no_base_with_teacher_student_leaves_a_uniform_choice_past_one_plus_one_over_log_n():
    # at a uniform choice of n tokens A = (1 − λ) log n for each; where A < −1 the drift pushes a larger token up
    for lam, sign in ((1.0, -1), (2.4, -1), (2.5, 1)):  # 1 + 1/ln 2 = 2.443
        slopes = [drift(x, 0.5, 0.9, lam, advantage="no_base") / x for x in (-0.01, 0.01)]
        assert all(np.sign(slope) == sign for slope in slopes), lam
        assert drift(0.01, 0.5, 0.9, lam, ratio="none", advantage="no_base") < 0


def no_base_limits(p, start, lam, clip, normalize=False):
    """Where the mean flow of no_base takes students [P, V] of teachers `p`; `clip` None: no ratio."""
    theta, log_p = np.log(start), np.log(p)
    log_z = np.log((p**lam).sum(1, keepdims=True)) if normalize else 0.0
    for _ in range(6000):
        theta = theta - theta.max(1, keepdims=True)
        q = np.exp(theta) / np.exp(theta).sum(1, keepdims=True)
        log_q = np.log(np.maximum(q, 1e-300))
        ratio = 1.0 if clip is None else np.minimum(clip, np.exp(np.minimum(log_p - log_q, 50)))
        pull = q * ratio * (lam * log_p - log_z - log_q)
        theta = theta + 0.05 * (pull - q * pull.sum(1, keepdims=True))
    return theta


def test_the_digits_mode_survives_no_base_without_a_ratio_and_not_always_with_one():
    """Sixty random teachers of eleven scores, and a base that mixes in another opinion: docs/theory.md §2."""
    rng = np.random.default_rng(0)
    p, other = rng.dirichlet(np.ones(11), 60), rng.dirichlet(np.ones(11), 60)
    base = (p + 0.5 * other) / 1.5

    def kept(lam, clip, start=base, normalize=False):
        return (no_base_limits(p, start, lam, clip, normalize).argmax(1) == p.argmax(1)).mean()

    np.testing.assert_allclose(
        [kept(lam, 5.0) for lam in (1.0, 1.3, 1.5, 2.0)], [1, 0.7, 0.6, 0.63], atol=0.02
    )
    assert kept(2.0, None) == 1 and kept(2.0, 5.0, start=p) == 1
    assert kept(2.0, 5.0, normalize=True) == 1
