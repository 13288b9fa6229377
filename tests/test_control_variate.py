"""The control variate by enumeration of a small vocabulary: the same expected gradient, less variance; the reward."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from listopd_jax.ops.head import entropy_of
from listopd_jax.ops.objective import (
    Hyper,
    Variant,
    expected_weight,
    flipped,
    log_normalizer,
    sampled_loss,
    target_log_distribution,
)
from listopd_jax.stages.opd import contract_reward

V, CASES = 5, 60
RATIOS = ("teacher_student", "trainer_rollout", "aspo", "none")
VARIANTS = [
    Variant(ratio, kind, normalize=normalize, control_variate=control)
    for ratio, kind, normalize, control in itertools.product(
        RATIOS, ("base_relative", "no_base"), (False, True), ("kl", "optimal")
    )
]
LAM, CLIP, BETA = 1.4, 3.0, 0.2


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@functools.cache
def distributions():
    """log π_S, log π_T and log π_B of CASES positions, float64 [3, CASES, V]; a student between base and teacher."""
    rng = np.random.default_rng(0)
    base, teacher, noise = rng.normal(0, 1.5, (3, CASES, V))
    return log_softmax(np.stack([(base + teacher + noise) / 2, teacher, base]))


def weights(student, teacher, base, variant):
    """What multiplies −log π_S of every token, float64 [CASES, V], on the policy, from the module's docstring."""
    logits = LAM * teacher + ((1 - LAM) * base if variant.advantage == "base_relative" else 0)
    advantage = logits - student
    if variant.normalize:
        advantage = advantage - np.log(np.exp(logits).sum(-1, keepdims=True))
    w = np.exp(teacher - student)
    ratio = {"none": 1, "trainer_rollout": 1, "teacher_student": np.minimum(CLIP, w)}
    ratio["aspo"] = np.minimum(CLIP, np.where(advantage > 0, 1 / w, w))
    return ratio[variant.ratio] * advantage - BETA * (student - base)


def hyper():
    scalars = Hyper(lam=LAM, clip=CLIP, kl_to_base=BETA, entropy_bonus=0.0, ppo_clip=0.0)
    return jax.tree.map(jnp.float32, scalars)


@functools.partial(jax.jit, static_argnames="variant")
def gradients(logits, teacher, base, variant, reward=0.0, at=None):
    """Of the loss of every token of the vocabulary in the student's logits, [V tokens, CASES, V]."""
    at = at or hyper()
    log_z = log_normalizer(teacher, base, at.lam, variant.advantage) if variant.normalize else 0.0

    def loss(logits, token):
        student = jax.nn.log_softmax(logits)
        baseline = 0.0
        if variant.control_variate:
            baseline = expected_weight(student, teacher, base, at, variant, lam=at.lam, log_z=log_z)
        s, t, b = (x[:, token] for x in (student, teacher, base))
        rollout = jax.lax.stop_gradient(s)
        given = dict(lam=at.lam, log_z=log_z, baseline=baseline, reward=reward)
        return sampled_loss(s, entropy_of(student), t, b, rollout, at, variant, **given)[0].sum()

    return jnp.stack([jax.grad(loss)(logits, token) for token in range(V)])


def moments(variant, reward=0.0):
    """Expectation [CASES, V] and total variance [CASES] of the gradient under the student, float64."""
    logps = distributions()
    p = np.exp(logps[0]).T[..., None]
    found = np.asarray(gradients(*logps.astype(np.float32), variant, reward), np.float64)
    mean = (p * found).sum(0)
    return mean, (p * (found - mean) ** 2).sum((0, 2))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v)))
def test_it_is_the_mean_weight_and_changes_the_variance_alone(variant):
    """`optimal` lowers it at every position; `kl` need not, far from the target."""
    student, teacher, base = distributions()
    p, of_tokens = np.exp(student), weights(student, teacher, base, variant)
    counts = p * (((np.eye(V) - p[:, None]) ** 2).sum(-1) if variant.control_variate == "optimal" else 1)
    log_z = log_normalizer(teacher, base, LAM, variant.advantage) if variant.normalize else 0.0
    logps = distributions().astype(np.float32)
    baseline = expected_weight(*logps, hyper(), variant, lam=jnp.float32(LAM), log_z=jnp.float32(log_z))
    np.testing.assert_allclose(baseline, (counts * of_tokens).sum(-1) / counts.sum(-1), rtol=1e-4, atol=1e-5)
    (mean, variance), (plain_mean, plain_variance) = (
        moments(v) for v in (variant, variant._replace(control_variate=""))
    )
    expected = -(p * of_tokens)[..., None] * (np.eye(V) - p[:, None])
    np.testing.assert_allclose(plain_mean, expected.sum(1), atol=1e-5)
    np.testing.assert_allclose(mean, plain_mean, atol=1e-5)
    if variant.control_variate == "optimal":
        assert (variance <= plain_variance * (1 + 1e-4)).all() and variance.sum() < 0.9 * plain_variance.sum()


def test_without_a_ratio_it_is_minus_the_kl_to_the_target():
    student, teacher, base = distributions()
    target = log_softmax(LAM * teacher + (1 - LAM) * base)
    kl = (np.exp(student) * (student - target)).sum(-1)
    at, lam = hyper()._replace(kl_to_base=jnp.float32(0)), jnp.float32(LAM)
    variant, logps = Variant("none", normalize=True, control_variate="kl"), distributions().astype(np.float32)
    log_z = log_normalizer(*logps[1:], lam, variant.advantage)
    found = expected_weight(*logps, at, variant, lam=lam, log_z=log_z)
    np.testing.assert_allclose(found, -kl, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("control", ["kl", "optimal"])
def test_at_the_target_no_sample_has_a_gradient(control):
    """Without a ratio all weights of a position are one number, log Z; the plain estimator is noise there."""
    _, teacher, base = distributions().astype(np.float32)
    target = np.asarray(target_log_distribution(teacher, base, jnp.float32(LAM), "base_relative"))
    without_pull = hyper()._replace(kl_to_base=jnp.float32(0))
    on, off = (
        np.asarray(gradients(target, teacher, base, Variant("none", control_variate=x), 0.0, without_pull))
        for x in (control, "")
    )
    np.testing.assert_allclose(on, 0, atol=1e-5)
    assert np.abs(off).max() > 0.1


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_reward_is_added_to_the_advantage_of_its_token(ratio):
    """Of every token the same: under the student it has no expected gradient, unless the ratio weights it."""
    variant = Variant(ratio, normalize=True)
    logps = distributions().astype(np.float32)
    rewarded, plain = (np.asarray(gradients(*logps, variant, r)) for r in (0.5, 0.0))
    p = np.exp(distributions()[0])
    away = np.eye(V)[:, None] - p  # ∇ log π of each token
    if ratio in ("none", "trainer_rollout"):
        np.testing.assert_allclose(rewarded - plain, -0.5 * away, atol=1e-5)
    if ratio == "teacher_student":
        w = np.minimum(CLIP, np.exp(distributions()[1] - distributions()[0])).T[..., None]
        np.testing.assert_allclose(rewarded - plain, -0.5 * w * away, atol=1e-4)


def test_a_target_flips_where_its_mode_is_not_the_teachers():
    _, teacher, base = distributions()
    for lam in (0.0, 1.0, 1.4, 3.0):
        target = lam * teacher + (1 - lam) * base
        expected = target.argmax(-1) != teacher.argmax(-1)
        found = flipped(*distributions()[1:].astype(np.float32), jnp.float32(lam), "base_relative")
        assert (np.asarray(found) == expected).all() and expected.any() == (lam != 1)
        assert not np.asarray(flipped(teacher, base, lam, "no_base")).any() or lam == 0


@pytest.mark.parametrize("certainty", [0.0, 3.0, 12.0])
def test_between_two_tokens_no_variance_is_left(certainty):
    """Every sample has the expected gradient, also where float32 all but rounds a probability to 1."""
    rng, other = np.random.default_rng(1), np.full((CASES, V - 2), -300.0)
    logits = np.concatenate([rng.normal(0, 1, (3, CASES, 2)) + [certainty, 0], np.stack([other] * 3)], -1)
    logps = log_softmax(logits).astype(np.float32)
    variant = Variant("none", control_variate="optimal")
    found = np.asarray(gradients(*logps, variant), np.float64)[:2]
    p = np.exp(log_softmax(logits)[0])
    of_tokens = weights(*log_softmax(logits), variant)
    expected = -((p * of_tokens)[..., None] * (np.eye(V) - p[:, None])).sum(1)
    for gradient in found:
        np.testing.assert_allclose(gradient, expected, rtol=2e-3, atol=1e-6)


def test_the_contract_reward_is_centred_over_the_completions_of_a_prompt():
    """Where all or none of them hold the contract there is nothing to learn."""
    held = np.array([[True, False, False, True], [True] * 4, [False] * 4, [True, False, False, False]])
    found = np.asarray(contract_reward(held, 0.5))
    np.testing.assert_allclose(
        found[[0, 3]], [[0.25, -0.25, -0.25, 0.25], [0.375, -0.125, -0.125, -0.125]], rtol=1e-6
    )
    assert (found[1:3] == 0).all() and found.dtype == np.float32
