"""The objective against trl's losses, a float64 NumPy reference, and what the theory says of its gradient."""

import collections
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from listopd_jax.ops.head import entropy_of, take_token
from listopd_jax.ops.objective import (
    Hyper,
    Variant,
    advantage,
    full_vocab_loss,
    importance_ratio,
    log_normalizer,
    sampled_loss,
    target_log_distribution,
    token_weights,
    warmed_up_lambda,
)

B, N, T, V = 2, 2, 5, 7
RATIOS = ("teacher_student", "trainer_rollout", "aspo", "none")
ADVANTAGES = ("base_relative", "no_base")
AGGREGATES = ("token", "sequence")
LENGTHS = np.array([[5, 2], [1, 3]])
MASK = (np.arange(T) < LENGTHS[..., None]).astype(np.float32)


def hyper(lam=1.0, clip=5.0, beta=0.0, gamma=0.0, epsilon=0.2) -> Hyper:
    scalars = Hyper(lam=lam, clip=clip, kl_to_base=beta, entropy_bonus=gamma, ppo_clip=epsilon)
    return jax.tree.map(jnp.float32, scalars)


def make_case(seed=0, scale=1.5):
    """Logits of student, teacher and base, sampled tokens, and the sampler's log-probabilities."""
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=(3, B, N, T, V))).astype(np.float32)
    tokens = rng.integers(V, size=(B, N, T))
    at = np.take_along_axis(log_softmax(logits[0]), tokens[..., None], -1)[..., 0]
    return logits, tokens, (at + 0.3 * rng.normal(size=at.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def case():
    return make_case()


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def log_z_of(teacher, base, lam, variant: Variant):
    return log_normalizer(teacher, base, lam, variant.advantage) if variant.normalize else 0.0


def total_loss(student_logits, other_logits, tokens, rollout, hyper: Hyper, variant: Variant):
    """The scalar loss of a batch from logits, put together as a training step does."""
    logp, teacher, base = map(jax.nn.log_softmax, (student_logits, *other_logits))
    if variant.estimator == "full_vocab":
        loss, _ = full_vocab_loss(logp, teacher, base, tokens, hyper, variant, lam=hyper.lam)
    else:
        at = [take_token(x, tokens) for x in (logp, teacher, base)]
        entropy, log_z = entropy_of(logp), log_z_of(teacher, base, hyper.lam, variant)
        loss, _ = sampled_loss(at[0], entropy, *at[1:], rollout, hyper, variant, lam=hyper.lam, log_z=log_z)
    return (loss * token_weights(jnp.asarray(MASK), variant.aggregate)).sum()


loss_and_grad = jax.jit(jax.value_and_grad(total_loss), static_argnames="variant")


def ours(case, hyper, variant):
    logits, tokens, rollout = case
    loss, grad = loss_and_grad(logits[0], tuple(logits[1:]), tokens, rollout, hyper, variant=variant)
    return float(loss), np.asarray(grad)


# ---- trl


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="needs torch, the oracle")


def torch_case(torch, case):
    """The case with completions as rows: student logits (a leaf), log π of all, tokens, labels, rollout."""
    logits, tokens, rollout = case
    rows = torch.tensor(logits.reshape(3, B * N, T, V))
    tokens = torch.tensor(tokens.reshape(B * N, T))
    labels = torch.where(torch.tensor(MASK.reshape(B * N, T)) > 0, tokens, -100)
    student = rows[0].clone().requires_grad_()
    logp = rows.log_softmax(-1)
    return student, logp, tokens, labels, torch.tensor(rollout.reshape(B * N, T))


def assert_same(ours, loss, student):
    loss.backward()
    assert ours[0] == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(ours[1], student.grad.numpy().reshape(ours[1].shape), atol=1e-6)


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize("lam", [0.5, 1.0, 1.25, 3.0])
def test_full_vocab_is_trl_gkd_reverse_kl_to_the_extrapolated_target(torch, case, kind, lam):
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="needs trl, the oracle")
    student, logp, _, labels, _ = torch_case(torch, case)
    target = lam * logp[1] + (1 - lam) * logp[2] if kind == "base_relative" else lam * logp[1]
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student, target, labels, beta=1)
    assert_same(ours(case, hyper(lam), Variant("none", kind, "full_vocab")), theirs, student)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("lam", [1.0, 1.25])
def test_other_divergences_are_trl_gkd(torch, case, beta, lam):
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="needs trl, the oracle")
    student, logp, _, labels, _ = torch_case(torch, case)
    target = lam * logp[1] + (1 - lam) * logp[2]
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student, target, labels, beta=beta)
    variant = Variant("none", estimator="full_vocab", jsd=beta)
    assert_same(ours(case, hyper(lam), variant), theirs, student)


def test_sampled_at_lambda_1_is_trl_iw_opd_without_weights(torch, case):
    iw_opd = pytest.importorskip("trl.experimental.iw_opd.iw_opd_trainer", reason="needs trl, the oracle")
    student, logp, tokens, labels, _ = torch_case(torch, case)
    trainer = types.SimpleNamespace(
        temperature=1.0,
        iw_opd_epsilon=1e-8,
        iw_opd_gamma=0.0,
        model=types.SimpleNamespace(training=False),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    )
    teacher = logp[1].gather(-1, tokens[..., None])[..., 0]
    theirs = iw_opd.IWOPDTrainer._compute_iw_opd_loss(trainer, student, tokens, labels, teacher)
    assert_same(ours(case, hyper(1.0), Variant("none")), theirs, student)


def grpo_loss(torch, loss_type, per_token, entropy, old, advantages, **settings):
    """trl's GRPO loss of given log-probabilities, without a model."""
    grpo = pytest.importorskip("trl.trainer.grpo_trainer", reason="needs trl, the oracle")
    mask = torch.tensor(MASK.reshape(B * N, T))
    model = types.SimpleNamespace(training=False)
    switches = dict(loss_type=loss_type, epsilon_low=0.2, epsilon_high=0.2, beta=0.0)
    switches |= dict(importance_sampling_level="token", off_policy_mask_threshold=None, use_vllm=False)
    switches |= dict(
        top_entropy_quantile=1.0,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        use_adaptive_entropy=False,
    )
    trainer = types.SimpleNamespace(
        model=model,
        args=types.SimpleNamespace(delta=None),
        accelerator=types.SimpleNamespace(gather=lambda x: x, reduce=lambda x, **_: x, num_processes=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (per_token, entropy, None),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        **switches | settings,
    )
    ids = mask.long()
    inputs = dict(prompt_ids=ids, prompt_mask=mask, completion_ids=ids, completion_mask=mask)
    inputs |= dict(advantages=advantages, old_per_token_logps=old, num_items_in_batch=mask.sum())
    return grpo.GRPOTrainer._compute_loss(trainer, model, inputs)


def torch_tokens(torch, case, lam):
    """Student logits, log π_S(a), entropy, the sampler's log-probabilities, and the advantage of EC Eq. 2."""
    student, logp, tokens, _, rollout = torch_case(torch, case)
    logp_s = student.log_softmax(-1)
    at = [x.gather(-1, tokens[..., None])[..., 0] for x in (logp_s, logp[1], logp[2])]
    entropy = torch.distributions.Categorical(logits=student).entropy()
    adv = (lam * (at[1] - at[2]) - (at[0] - at[2])).detach()
    return student, at[0], entropy, rollout, adv


@pytest.mark.parametrize(("aggregate", "loss_type"), [("token", "bnpo"), ("sequence", "grpo")])
def test_ppo_clip_is_trl_grpo(torch, case, aggregate, loss_type):
    student, per_token, entropy, rollout, adv = torch_tokens(torch, case, 1.3)
    theirs = grpo_loss(torch, loss_type, per_token, entropy, rollout, adv)
    assert_same(ours(case, hyper(1.3), Variant("none", aggregate=aggregate, ppo=True)), theirs, student)


def test_entropy_bonus_is_trl_grpo(torch, case):
    student, per_token, entropy, rollout, adv = torch_tokens(torch, case, 1.3)
    settings = dict(_entropy_bonus_enabled=True, entropy_coef=0.7)
    theirs = grpo_loss(torch, "bnpo", per_token, entropy, rollout, adv, **settings)
    assert_same(ours(case, hyper(1.3, gamma=0.7), Variant("none", ppo=True)), theirs, student)


@pytest.mark.parametrize("clip", [1.1, 5.0])
def test_trainer_rollout_ratio_is_trl_cispo(torch, case, clip):
    student, per_token, entropy, rollout, adv = torch_tokens(torch, case, 1.3)
    theirs = grpo_loss(torch, "cispo", per_token, entropy, rollout, adv, epsilon_high=clip)
    assert_same(ours(case, hyper(1.3, clip), Variant("trainer_rollout")), theirs, student)


# ---- every variant against float64 NumPy


def reference(case, lam, clip, beta, gamma, epsilon, variant):
    """Loss and its gradient in the student's logits, from EC §2 and the module's docstring."""
    logits, tokens, rollout = case
    logps = [log_softmax(x) for x in logits]
    p, entropy = np.exp(logps[0]), -(np.exp(logps[0]) * logps[0]).sum(-1)
    if variant.estimator == "full_vocab":
        loss, grad = exact_reference(*logps, lam, beta, variant.advantage)
    else:
        at = [np.take_along_axis(x, tokens[..., None], -1)[..., 0] for x in logps]
        log_z = log_z_reference(*logps[1:], lam, variant.advantage) if variant.normalize else 0.0
        loss, slope = sampled_reference(*at, rollout, log_z, lam, clip, beta, epsilon, variant)
        grad = slope[..., None] * (np.eye(V)[tokens] - p)
    loss, grad = loss - gamma * entropy, grad + gamma * p * (logps[0] + entropy[..., None])
    weights = MASK / MASK.sum() if variant.aggregate == "token" else MASK / LENGTHS[..., None] / LENGTHS.size
    return (loss * weights).sum(), grad * weights[..., None]


def exact_reference(student, teacher, base, lam, beta, kind):
    """KL(π_S‖target) + β KL(π_S‖π_B) and its gradient in the logits."""
    target = log_softmax(lam * teacher + (0 if kind == "no_base" else (1 - lam) * base))
    gap = student - target + beta * (student - base)
    loss = (np.exp(student) * gap).sum(-1)
    return loss, np.exp(student) * (gap - loss[..., None])


def log_z_reference(teacher, base, lam, kind):
    """log Σ π_T^λ π_B^(1−λ), or of π_T^λ for `no_base`; the largest term in front, for the extreme case."""
    terms = lam * teacher + (0 if kind == "no_base" else (1 - lam) * base)
    most = terms.max(-1)
    return most + np.log(np.exp(terms - most[..., None]).sum(-1))


def sampled_reference(student, teacher, base, rollout, log_z, lam, clip, beta, epsilon, variant):
    """The loss of sampled tokens and its derivative in log π_S(a)."""
    adv = (
        lam * teacher - student
        if variant.advantage == "no_base"
        else lam * (teacher - base) - (student - base)
    ) - log_z
    with np.errstate(over="ignore"):
        w, change = np.exp(teacher - student), np.exp(student - rollout)
        ratio = {
            "none": np.ones_like(w),
            "teacher_student": np.minimum(clip, w),
            "trainer_rollout": np.minimum(clip, change),
            "aspo": np.where(adv > 0, np.minimum(clip, 1 / w), np.minimum(clip, w)),
        }[variant.ratio]
    weight = ratio * adv - beta * (student - base)
    if not variant.ppo:
        return -weight * student, -weight
    free, bounded = weight * change, weight * np.clip(change, 1 - epsilon, 1 + epsilon)
    return -np.minimum(free, bounded), -free * (free <= bounded)


PAIRS = (("token", False), ("sequence", True))  # aggregate and ppo act after the rest, each on its own
SAMPLED = [
    Variant(r, a, "sampled", aggregate, ppo)
    for r, a, (aggregate, ppo) in itertools.product(RATIOS, ADVANTAGES, PAIRS)
]
SAMPLED += [Variant(r, a, normalize=True) for r, a in itertools.product(RATIOS, ADVANTAGES)]
FULL = [Variant("none", a, "full_vocab", g) for a, g in itertools.product(ADVANTAGES, AGGREGATES)]
SETTINGS = {
    "plain": (1.0, 5.0, 0.0, 0.0, 0.2),
    "all terms": (1.2, 1.5, 0.3, 0.7, 0.1),
    "no clip": (2.5, np.inf, 0.01, 0.001, 0.2),
    "base only": (0.0, 2.0, 0.0, 0.0, 0.2),
}


@pytest.mark.parametrize("variant", SAMPLED + FULL, ids=lambda v: "-".join(map(str, v)))
def test_every_variant_matches_float64(case, variant):
    for name, setting in SETTINGS.items():
        expected = reference(case, *setting, variant)
        got = ours(case, hyper(*setting), variant)
        assert got[0] == pytest.approx(expected[0], rel=2e-5, abs=1e-6), name
        np.testing.assert_allclose(got[1], expected[1], rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    "variant", [v for v in SAMPLED + FULL if not v.ppo], ids=lambda v: "-".join(map(str, v))
)
def test_extreme_logits_stay_accurate(variant):
    """Log-probabilities down to -1000: no ratio overflows, nothing cancels that float64 would keep."""
    extreme = make_case(seed=1, scale=200.0)
    setting = (1.2, 5.0, 0.1, 0.1, 0.2)
    expected, got = reference(extreme, *setting, variant), ours(extreme, hyper(*setting), variant)
    assert np.isfinite(got[1]).all()
    assert got[0] == pytest.approx(expected[0], rel=1e-3, abs=1e-2)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-3, atol=1e-3 * np.abs(expected[1]).max())


def test_a_ratio_beyond_the_float_range_is_the_clip():
    ratio = importance_ratio(
        jnp.float32(-500), jnp.float32(-1), jnp.float32(-1), 1.0, jnp.float32(5), "teacher_student"
    )
    assert float(ratio) == pytest.approx(5, rel=1e-6)


# ---- what the gradient is


def exact_expectation(logits, under, hyper, variant):
    """Σ_a under(a) · (gradient of the sampled loss of a), and the gradient of the full-vocabulary loss."""

    def one(student_logits, token, exact):
        logp, teacher, base = map(jax.nn.log_softmax, (student_logits, *logits[1:]))
        if exact:
            return full_vocab_loss(logp, teacher, base, token, hyper, variant, lam=hyper.lam)[0]
        at = [take_token(x, token) for x in (logp, teacher, base)]
        rollout, log_z = take_token(jnp.log(under), token), log_z_of(teacher, base, hyper.lam, variant)
        entropy = entropy_of(logp)
        return sampled_loss(at[0], entropy, *at[1:], rollout, hyper, variant, lam=hyper.lam, log_z=log_z)[0]

    sampled = jax.vmap(jax.grad(lambda x, a: one(x, a, False)), (None, 0))(logits[0], jnp.arange(V))
    return under @ sampled, jax.grad(lambda x: one(x, jnp.int32(0), True))(logits[0])


expectation = jax.jit(exact_expectation, static_argnames="variant")


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_sampled_gradient_is_unbiased_for_the_exact_one(case, kind):
    """Expectation by enumeration of the vocabulary, with the β and γ terms."""
    logits = case[0][:, 0, 0, 0]
    for lam, beta, gamma in [(1.0, 0, 0), (1.3, 0.2, 0), (0.5, 0, 0.3), (3.0, 0.5, 0.1)]:
        setting = hyper(lam, beta=beta, gamma=gamma)
        sampled, exact = expectation(
            logits, jax.nn.softmax(logits[0]), setting, variant=Variant("none", kind)
        )
        np.testing.assert_allclose(sampled, exact, atol=2e-6)
        assert np.abs(exact).max() > 1e-2


def test_trainer_rollout_ratio_corrects_samples_of_another_policy(case):
    logits = case[0][:, 0, 0, 0]
    other = jax.nn.softmax(0.5 * logits[0] + 0.3)
    variant = Variant("trainer_rollout")
    setting = hyper(1.3, np.inf, gamma=0.1)
    sampled, exact = expectation(logits, other, setting, variant=variant)
    np.testing.assert_allclose(sampled, exact, atol=2e-6)
    uncorrected, _ = expectation(logits, other, setting, variant=Variant("none"))
    assert np.abs(uncorrected - exact).max() > 1e-2


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_pull_to_the_base_is_not_weighted_by_the_ratio(case, ratio):
    """β adds the gradient of β KL(π_S‖π_B), whatever the ratio."""
    logits = case[0][:, 0, 0, 0]
    policy = jax.nn.softmax(logits[0])
    sampled, exact = zip(
        *(expectation(logits, policy, hyper(1.3, 2.0, beta), variant=Variant(ratio)) for beta in (0.0, 0.5)),
        strict=True,
    )
    np.testing.assert_allclose(sampled[1] - sampled[0], exact[1] - exact[0], atol=2e-6)


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_normalized_the_target_is_stationary_for_every_ratio(case, ratio, kind):
    """The expected gradient at the target vanishes; without log Z it does so where the ratio is 1 only."""
    logits = case[0][:, 0, 0, 0]
    logp = log_softmax(logits)
    for lam, clip in itertools.product((0.5, 1.3, 2.5), (1.5, np.inf)):
        target = np.asarray(target_log_distribution(logp[1], logp[2], lam, kind), np.float32)
        at = np.stack([target, *logits[1:]]), jax.nn.softmax(target), hyper(lam, clip)
        normalized, plain = (
            expectation(*at, variant=Variant(ratio, kind, normalize=on))[0] for on in (True, False)
        )
        np.testing.assert_allclose(normalized, 0, atol=2e-6)
        assert (np.abs(plain).max() > 1e-3) == (ratio in ("teacher_student", "aspo"))


def test_lambda_1_does_not_depend_on_the_base(case):
    logits, tokens, rollout = case
    other = np.stack([*logits[:2], logits[2][..., ::-1]])
    for variant in (Variant(), Variant("none", estimator="full_vocab")):
        (loss, grad), (loss2, grad2) = (
            ours((x, tokens, rollout), hyper(1.0), variant) for x in (logits, other)
        )
        assert loss == pytest.approx(loss2, rel=1e-6)
        np.testing.assert_allclose(grad, grad2, atol=1e-6)
        loss3, _ = ours((other, tokens, rollout), hyper(1.5), variant)
        assert abs(loss3 - loss) > 1e-3


def test_ppo_clip_is_inert_on_the_policy_that_sampled(case):
    logits, tokens, _ = case
    fresh = np.take_along_axis(log_softmax(logits[0]), tokens[..., None], -1)[..., 0].astype(np.float32)
    plain, clipped = (ours((logits, tokens, fresh), hyper(1.3), Variant(ppo=ppo))[1] for ppo in (False, True))
    np.testing.assert_allclose(plain, clipped, atol=1e-6)


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_flow_ends_at_the_target(case, kind):
    """Gradient descent on the exact loss from the base ends at π_B(π_T/π_B)^λ (EC §2), whatever λ."""
    lams = np.array([0.5, 1.0, 1.25, 2.0])
    logits = np.broadcast_to(case[0][:, 0, 0, 0, None], (3, 4, V))
    logp = log_softmax(logits)
    target = lams[:, None] * logp[1] + (1 - lams[:, None] if kind == "base_relative" else 0) * logp[2]
    target = np.exp(log_softmax(target))

    def loss(student):
        def one(lam, *logits):
            at = map(jax.nn.log_softmax, logits)
            return full_vocab_loss(*at, jnp.int32(0), hyper(), Variant(advantage=kind), lam=lam)[0]

        return jax.vmap(one)(jnp.float32(lams), student, *logits[1:]).sum()

    end = jax.jit(lambda x: jax.lax.fori_loop(0, 3000, lambda _, x: x - jax.grad(loss)(x), x))(logits[2])
    np.testing.assert_allclose(jax.nn.softmax(end), target, atol=2e-3)
    assert np.abs(np.exp(logp[2]) - target).max() > 0.05
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(np.log(target).astype(np.float32)), 0, atol=1e-6)


def test_bernoulli_fixed_point_of_the_paper():
    """logit q* = λ logit p + (1−λ) logit b (EC §3), also where p is within 1e-6 of 1."""
    p, b, lam = np.array([0.9993, 0.7, 1 - 1e-6]), np.array([0.81, 0.5, 0.9]), 1.2
    logp, logb = (np.log(np.stack([x, 1 - x], -1)).astype(np.float32) for x in (p, b))
    target = np.asarray(target_log_distribution(logp, logb, lam, "base_relative"))
    expected = lam * np.log(p / (1 - p)) + (1 - lam) * np.log(b / (1 - b))
    np.testing.assert_allclose(target[:, 0] - target[:, 1], expected, rtol=1e-5)


def test_advantage_vanishes_at_the_target(case):
    logp = log_softmax(case[0])
    for kind in ADVANTAGES:
        target = target_log_distribution(logp[1], logp[2], 1.4, kind)
        adv = advantage(target, logp[1], logp[2], 1.4, kind)
        assert np.ptp(np.asarray(adv), axis=-1).max() < 1e-4  # a constant: zero expected gradient
        log_z = log_normalizer(logp[1], logp[2], 1.4, kind)
        np.testing.assert_allclose(adv, np.broadcast_to(log_z[..., None], adv.shape), atol=1e-4)
    with_unit_norm = target_log_distribution(logp[1], logp[2], 1.4, "base_relative")
    np.testing.assert_allclose(np.exp(with_unit_norm).sum(-1), 1, atol=1e-5)


# ---- weights, schedules, compilation


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("lengths", [LENGTHS, [[5, 0], [0, 3]], [[1, 0], [0, 0]]])
def test_weights_are_a_mean_over_what_is_there(aggregate, lengths):
    mask = (np.arange(T) < np.array(lengths)[..., None]).astype(np.float32)
    weights = np.asarray(token_weights(jnp.asarray(mask), aggregate))
    assert weights.sum() == pytest.approx(1)
    assert (weights[mask == 0] == 0).all()
    per_row = weights.sum(-1)[np.array(lengths) > 0]
    expected = np.array(lengths)[np.array(lengths) > 0] if aggregate == "token" else np.ones(per_row.shape)
    np.testing.assert_allclose(per_row, expected / expected.sum(), rtol=1e-6)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_an_empty_batch_weighs_nothing(aggregate):
    assert (np.asarray(token_weights(jnp.zeros((B, N, T)), aggregate)) == 0).all()


def test_lambda_warms_up_from_plain_distillation():
    path = [warmed_up_lambda(1.5, step, 4) for step in range(7)]
    assert path == [1.0, 1.125, 1.25, 1.375, 1.5, 1.5, 1.5]
    assert warmed_up_lambda(1.5, 0, 0) == 1.5


def test_a_sweep_never_recompiles(case):
    loss_and_grad.clear_cache()
    losses = [
        ours(case, hyper(*x), Variant())[0]
        for x in itertools.product((0.5, 1.2), (1.5, np.inf), (0.0, 0.01), (0.0, 0.001))
    ]
    assert loss_and_grad._cache_size() == 1
    assert len(set(losses)) == len(losses)
