"""The OPD loss from hidden states against a dense float64 one: value, quantities, both gradients, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from listopd_jax.ops.objective import Hyper, Variant
from listopd_jax.ops.opd_loss import Models, opd_loss

N, VOCAB = 23, 17
WIDTHS, ROWS = (6, 10, 6), (20, 24, 20)  # student, teacher, base: the teacher is wider and padded differently
EXACT = Variant("none", estimator="full_vocab")
NORMALIZED = Variant(normalize=True)
CONTROLLED = Variant(control_variate="kl", flips=True)
OPTIMAL = CONTROLLED._replace(control_variate="optimal")


def make(dtype=np.float32, scale=1.0, n=N, seed=0):
    """Hidden states, heads, tokens, rollout log-probabilities and ragged weights."""
    rng = np.random.default_rng(seed)
    hiddens = Models(*(jnp.asarray(scale * rng.normal(size=(n, d)), dtype) for d in WIDTHS))
    heads = Models(*(jnp.asarray(rng.normal(size=(v, d)), dtype) for v, d in zip(ROWS, WIDTHS, strict=True)))
    weights = rng.random(n) * (rng.random(n) > 0.3) / n
    return (
        hiddens,
        heads,
        jnp.asarray(rng.integers(VOCAB, size=n)),
        jnp.asarray(-rng.random(n), np.float32),
        jnp.asarray(weights, np.float32),
    )


def hyper(lam, clip, beta=0.2, gamma=0.1):
    scalars = Hyper(lam=lam, clip=clip, kl_to_base=beta, entropy_bonus=gamma, ppo_clip=0.2)
    return jax.tree.map(jnp.float32, scalars)


def ours(case, hyper, variant, chunk):
    hiddens, heads, *rows = case

    def loss(hidden, head):
        models = hiddens._replace(student=hidden), heads._replace(student=head)
        return opd_loss(*models, *rows, hyper, variant, vocab=VOCAB, chunk=chunk)

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, per_token), gradients = grad(hiddens.student, heads.student)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), (value, per_token, gradients))


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def dense(case, lam, clip, variant, beta=0.2, gamma=0.1):
    """The same in float64: all logits at once, gradients with respect to the student's logits by hand (EC Eq. 1-3)."""
    hiddens, heads, tokens, _, w = jax.tree.map(lambda x: np.asarray(x, np.float64), case)
    tokens, rows = np.asarray(case[2]), np.arange(len(w))
    log_s, log_t, log_b = (log_softmax(h @ v[:VOCAB].T) for h, v in zip(hiddens[:3], heads[:3], strict=True))
    s, t, b = (x[rows, tokens] for x in (log_s, log_t, log_b))
    p, entropy = np.exp(log_s), -(np.exp(log_s) * log_s).sum(-1)
    target = log_softmax(lam * log_t + (1 - lam) * log_b)
    advantage = target[rows, tokens] - s if variant.normalize else lam * (t - b) - (s - b)
    if variant.estimator == "full_vocab":
        kl, to_base = ((p * (log_s - q)).sum(-1) for q in (target, log_b))
        loss = kl + beta * to_base - gamma * entropy
        d_logits = p * (log_s - target - kl[:, None] + beta * (log_s - log_b - to_base[:, None]))
    else:
        weight = np.exp(np.minimum(t - s, np.log(clip))) * advantage - beta * (s - b)
        if variant.control_variate:
            of_tokens = np.exp(np.minimum(log_t - log_s, np.log(clip)))
            of_tokens = of_tokens * (lam * (log_t - log_b) - (log_s - log_b)) - beta * (log_s - log_b)
            counts = p * (((np.eye(VOCAB) - p[:, None]) ** 2).sum(-1) if variant == OPTIMAL else 1)
            weight = weight - (counts * of_tokens).sum(-1) / counts.sum(-1)
        loss = -weight * s - gamma * entropy
        d_logits = -weight[:, None] * (np.eye(VOCAB)[tokens] - p)
    d_logits = w[:, None] * (d_logits + gamma * p * (log_s + entropy[:, None]))
    d_head = np.zeros(heads.student.shape)
    d_head[:VOCAB] = d_logits.T @ hiddens.student
    quantities = {"student": s, "teacher": t, "base": b, "entropy": entropy, "advantage": advantage}
    if variant.flips:
        quantities["flip"] = target.argmax(-1) != log_t.argmax(-1)
    return (w * loss).sum(), quantities, (d_logits @ heads.student[:VOCAB], d_head)


def check(case, lam, clip, variant, chunk, tolerance, gradient_scale=0.0):
    value, per_token, gradients = ours(case, hyper(lam, clip), variant, chunk)
    wanted, quantities, wanted_gradients = dense(case, lam, clip, variant)
    kept = np.asarray(case[-1]) > 0
    assert value == pytest.approx(wanted, rel=tolerance, abs=tolerance)
    for name, x in quantities.items():
        np.testing.assert_allclose(
            per_token[name][kept], x[kept], rtol=tolerance, atol=tolerance, err_msg=name
        )
    for got, x in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(got, x, atol=tolerance * max(np.abs(x).max(), gradient_scale))


@pytest.mark.parametrize(
    "variant",
    [Variant(), NORMALIZED, CONTROLLED, OPTIMAL, EXACT],
    ids=["sampled", "normalized", "kl", "optimal", "full_vocab"],
)
@pytest.mark.parametrize("clip", [1.1, 5.0, np.inf])
@pytest.mark.parametrize("lam", [0.5, 1.0, 1.3, 3.0])
def test_it_is_the_dense_loss(lam, clip, variant):
    check(make(), lam, clip, variant, chunk=5, tolerance=2e-5)


@pytest.mark.parametrize(
    "variant",
    [Variant(), NORMALIZED, CONTROLLED, EXACT],
    ids=["sampled", "normalized", "controlled", "full_vocab"],
)
def test_bfloat16_loses_only_the_rounding_of_its_factors(variant):
    """Quantities are float32 of bfloat16 inputs; a gradient is rounded twice, to 8 bits each time."""
    case = make(jnp.bfloat16)
    value, per_token, gradients = ours(case, hyper(1.5, 5.0), variant, 8)
    wanted, quantities, wanted_gradients = dense(case, 1.5, 5.0, variant)
    assert value == pytest.approx(wanted, rel=1e-4)
    kept = np.asarray(case[-1]) > 0
    np.testing.assert_allclose(
        per_token["advantage"][kept], quantities["advantage"][kept], rtol=1e-4, atol=1e-4
    )
    for got, x in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(got, x, atol=2**-6 * np.abs(x).max())


@pytest.mark.parametrize(
    "variant",
    [Variant(), NORMALIZED, CONTROLLED, EXACT],
    ids=["sampled", "normalized", "controlled", "full_vocab"],
)
def test_extreme_logits_are_the_dense_loss_too(variant):
    """Log-probabilities of −1000 are spaced by 6e-5 in float32, and meet hidden states of 100 in the gradient."""
    check(make(scale=100.0), 1.3, 5.0, variant, chunk=7, tolerance=3e-5, gradient_scale=20.0)


@pytest.mark.parametrize(
    "variant",
    [Variant(), NORMALIZED, CONTROLLED, EXACT],
    ids=["sampled", "normalized", "controlled", "full_vocab"],
)
def test_memory_does_not_grow_with_tokens_times_vocabulary(variant):
    """128 times the logits of one chunk would be 67 MB a model; the whole program grows by less than a fiftieth."""
    vocab, chunk = 4096, 32

    def temp_bytes(n):
        shape = jax.ShapeDtypeStruct
        models = [Models(*[shape((m, 8), jnp.float32)] * 3) for m in (n, vocab)]
        rows = shape((n,), jnp.int32), shape((n,), jnp.float32), shape((n,), jnp.float32)
        grad = jax.grad(
            lambda h, w, r: opd_loss(h, w, *r, hyper(1.3, 5.0), variant, vocab=vocab, chunk=chunk)[0]
        )
        return jax.jit(grad).lower(*models, rows).compile().memory_analysis().temp_size_in_bytes

    assert temp_bytes(chunk * 128) - temp_bytes(chunk) < 4 * chunk * 128 * vocab / 50


def test_normalized_and_guarded_log_z_is_that_of_the_positions_own_lambda():
    case, lam = make(), 3.0
    variant = NORMALIZED._replace(guard="teacher")
    per_token = opd_loss(*case, hyper(lam, 5.0), variant, vocab=VOCAB, chunk=5)[1]
    own = np.asarray(per_token["lambda"])
    assert set(np.unique(own)) == {1.0, lam}
    for guarded in (1.0, lam):
        at = (own == guarded) & (np.asarray(case[-1]) > 0)
        expected = dense(case, guarded, 5.0, variant)[1]["advantage"]
        np.testing.assert_allclose(np.asarray(per_token["advantage"])[at], expected[at], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "variant", [Variant(), NORMALIZED, CONTROLLED], ids=["sampled", "normalized", "controlled"]
)
def test_the_kernel_scores_frozen_models_alike(monkeypatch, variant):
    """Or leaves it to others where the loss asks for more than the kernel gives."""
    case, at = make(), hyper(1.3, 5.0)
    wanted = opd_loss(*case, at, variant, vocab=VOCAB, chunk=5)
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    got = opd_loss(*case, at, variant, vocab=VOCAB, chunk=5, pallas=True)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", [Variant(), CONTROLLED], ids=["sampled", "controlled"])
def test_a_reward_adds_to_the_advantage_of_its_token(variant):
    case, at = make(), hyper(1.3, 5.0)
    reward = np.random.default_rng(1).normal(size=N).astype(np.float32)
    plain, rewarded = (
        opd_loss(*case, at, variant, vocab=VOCAB, chunk=5, reward=r) for r in (None, jnp.asarray(reward))
    )
    kept, added = np.asarray(case[-1]) > 0, rewarded[1]["advantage"] - plain[1]["advantage"]
    np.testing.assert_allclose(np.asarray(added)[kept], reward[kept], atol=1e-5)
    scores = {k: np.asarray(v, np.float64) for k, v in plain[1].items()}
    change = -(np.asarray(case[-1]) * scores["ratio"] * reward * scores["student"])[kept].sum()
    assert float(rewarded[0] - plain[0]) == pytest.approx(change, rel=1e-3)
