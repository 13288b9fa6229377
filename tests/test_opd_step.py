"""The OPD update against a naive one: whole sequences, no chunks, no microbatches, no shared prompt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from listopd_jax.models.config import ModelConfig
from listopd_jax.models.decoder import Decoder
from listopd_jax.ops.objective import Hyper, Variant
from listopd_jax.ops.opd_loss import Frozen, Models
from listopd_jax.rollout.decode import Rollout
from listopd_jax.train.opd_step import OpdBatch, make_opd_step
from listopd_jax.train.optimizer import init_state

VOCAB, PAD = 16, 0
EXACT = Variant("none", estimator="full_vocab")
B, P, N, T = 4, 6, 2, 5
PROMPT_LENGTHS = np.array([6, 2, 3, 5])
LENGTHS = np.array([[5, 2], [1, 3], [4, 5], [2, 0]])
MASK = np.arange(T) < LENGTHS[..., None]


def tiny(vocab_size, hidden_size, num_layers, seed):
    """(graphdef, params) of a decoder with random weights, large enough for peaked distributions."""
    config = ModelConfig(vocab_size, hidden_size, 2 * hidden_size, num_layers, 2, 1, 8, tied=seed % 2 == 0)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    return graphdef, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), shapes)


STUDENT_DEF, STUDENT = tiny(20, 8, 1, seed=0)
_, BASE = tiny(20, 8, 1, seed=2)
TEACHER_DEF, TEACHER = tiny(24, 16, 2, seed=1)  # another size, another padded vocabulary, an untied head
MODELS, FROZEN = Models(STUDENT_DEF, TEACHER_DEF, STUDENT_DEF), Frozen(TEACHER, BASE)


def hyper(lam=1.0, clip=5.0, beta=0.0, gamma=0.0, epsilon=0.2) -> Hyper:
    scalars = Hyper(lam=lam, clip=clip, kl_to_base=beta, entropy_bonus=gamma, ppo_clip=epsilon)
    return jax.tree.map(jnp.float32, scalars)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(3)
    prompts = rng.integers(VOCAB, size=(B, P)).astype(np.int32)
    tokens = np.where(MASK, rng.integers(1, VOCAB, size=MASK.shape), PAD).astype(np.int32)
    logprobs = np.where(MASK, -3 * rng.random(MASK.shape), 0).astype(np.float32)
    return OpdBatch(prompts, PROMPT_LENGTHS, Rollout(tokens, logprobs, LENGTHS))


RECORD = optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda grads, state, params: (grads, grads),
)
TX = optax.chain(RECORD, optax.scale_by_adam())
"""Adam that keeps the last gradient as the first part of its state."""


def own(tree):
    return jax.tree.map(jnp.copy, tree)


@functools.cache
def compiled(variant, microbatch=0):
    return make(variant, microbatch)


def make(variant, microbatch, grammar=None):
    return make_opd_step(MODELS, TX, variant, vocab=VOCAB, chunk=7, microbatch=microbatch, grammar=grammar)


def run(batch, hyper, variant, microbatch=0, student=STUDENT, frozen=FROZEN, grammar=None):
    """Metrics, per-token values and gradient of one step."""
    state = init_state(own(student), TX)
    step = compiled(variant, microbatch) if grammar is None else make(variant, microbatch, grammar)
    state, metrics, per_token = step(state, frozen, batch, hyper, 0.0)
    return jax.tree.map(np.asarray, (metrics, per_token, state.opt_state[0]))


# ---- the naive step


def naive_logp(graphdef, params, batch):
    """log π over the vocabulary at every completion position [B, n, T, VOCAB]; one plain pass a sequence."""
    rows = []
    for prompt, length, completions in zip(*batch[:2], batch.rollout.tokens, strict=True):
        for completion in completions:
            sequence = np.concatenate([prompt[:length], completion, np.zeros(P - length, np.int32)])
            rows.append(sequence)
    return of_sequences(graphdef, params, np.stack(rows))


@functools.partial(jax.jit, static_argnums=0)
def of_sequences(graphdef, params, rows):
    decoder = nnx.merge(graphdef, params)
    hidden = decoder(rows, np.repeat(PROMPT_LENGTHS, N) + T)
    at = np.repeat(PROMPT_LENGTHS, N)[:, None] - 1 + np.arange(T)
    hidden = jnp.take_along_axis(hidden, at[..., None], 1)
    return jax.nn.log_softmax(hidden @ decoder.head_weight()[:VOCAB].T).reshape(B, N, T, VOCAB)


def naive_loss(params, teacher, base, batch, lam, clip, beta, gamma, epsilon, variant):
    """The objective of EC §2 as it is written, over all tokens at once."""
    student = naive_logp(STUDENT_DEF, params, batch)
    entropy = -(jnp.exp(student) * student).sum(-1)
    if variant.estimator == "full_vocab":
        target = jax.nn.log_softmax(lam * teacher + (1 - lam) * base)
        loss = (jnp.exp(student) * (student - target + beta * (student - base))).sum(-1)
    else:
        onehot = jax.nn.one_hot(batch.rollout.tokens, VOCAB)
        s, t, b = ((x * onehot).sum(-1) for x in (student, teacher, base))
        d = jax.lax.stop_gradient(s)
        adv = lam * t - d if variant.advantage == "no_base" else lam * (t - b) - (d - b)
        w = jnp.exp(t - d)
        if variant.ratio == "aspo":
            w = jnp.where(adv > 0, 1 / w, w)
        elif variant.ratio == "trainer_rollout":
            w = jnp.exp(d - batch.rollout.logprobs)
        weight = jnp.minimum(clip, w) * adv - beta * (d - b)
        change = jnp.exp(s - batch.rollout.logprobs)
        bounded = weight * jnp.clip(change, 1 - epsilon, 1 + epsilon)
        loss = -jnp.minimum(weight * change, bounded) if variant.ppo else -weight * s
    loss = loss - gamma * entropy
    if variant.aggregate == "token":
        return (loss * MASK).sum() / MASK.sum()
    lengths = MASK.sum(-1)
    return ((loss * MASK).sum(-1) / np.maximum(lengths, 1)).sum() / (lengths > 0).sum()


CASES = {  # the variant, prompts a microbatch, and λ, c, β, γ, ε
    "paper": (Variant(), 0, (1.2, 5.0, 0.0, 0.1, 0.2)),
    "sampled": (Variant("aspo", "no_base", "sampled", "sequence", ppo=True), 2, (1.3, 1.5, 0.1, 0.2, 0.2)),
    "exact": (EXACT, 1, (1.5, 5.0, 0.1, 0.2, 0.2)),
}


def assert_close(ours, theirs, tolerance=1e-4):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(np.abs(b).max(), 1e-3))


@pytest.fixture(scope="module")
def frozen_logps(batch):
    """log π of teacher and base at every position."""
    return naive_logp(TEACHER_DEF, TEACHER, batch), naive_logp(STUDENT_DEF, BASE, batch)


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_that_of_the_naive_loss(batch, frozen_logps, name):
    """Also in microbatches, whose rows have 7, 4, 9 and 2 tokens: a mean of means would be wrong."""
    variant, microbatch, setting = CASES[name]
    metrics, per_token, grads = run(batch, hyper(*setting), variant, microbatch)
    loss = jax.jit(jax.value_and_grad(lambda p: naive_loss(p, *frozen_logps, batch, *setting, variant)))
    expected, expected_grads = loss(STUDENT)
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(expected_grads)), rel=1e-4)
    assert_close(grads, expected_grads)
    for name, logp in zip(("teacher", "base"), frozen_logps, strict=True):
        picked = np.take_along_axis(np.asarray(logp), batch.rollout.tokens[..., None], -1)[..., 0]
        np.testing.assert_allclose(per_token[name], picked * MASK, atol=1e-4)


@pytest.fixture(scope="module")
def whole(batch):
    variant, microbatch, setting = CASES["paper"]
    return run(batch, hyper(*setting), variant, microbatch)


def test_rows_of_the_head_that_are_no_tokens_get_no_gradient(whole):
    embed = whole[2]["embed"][...]
    assert (embed[VOCAB:] == 0).all() and (embed[:VOCAB] != 0).any(-1).all()


def test_what_lies_after_the_end_changes_nothing(batch, whole):
    """Other tokens, other rollout log-probabilities after EOS, other padding of the prompt."""
    rng = np.random.default_rng(4)
    prompts = np.where(
        np.arange(P) < PROMPT_LENGTHS[:, None], batch.prompts, rng.integers(VOCAB, size=(B, P))
    )
    tokens = np.where(MASK, batch.rollout.tokens, rng.integers(VOCAB, size=MASK.shape))
    logprobs = np.where(MASK, batch.rollout.logprobs, 77).astype(np.float32)
    rollout = Rollout(tokens.astype(np.int32), logprobs, LENGTHS)
    other = OpdBatch(prompts.astype(np.int32), PROMPT_LENGTHS, rollout)
    assert_close(run(other, hyper(1.2, gamma=0.1), Variant()), whole, 1e-6)


def test_first_token_and_eos_count(batch, whole):
    """No one-off mask: a change of the first or of the last token of any completion changes its loss."""
    for b, j in np.argwhere(LENGTHS > 0):
        for t in {0, LENGTHS[b, j] - 1}:
            tokens = batch.rollout.tokens.copy()
            tokens[b, j, t] = (tokens[b, j, t] + 1) % VOCAB
            changed = batch._replace(rollout=batch.rollout._replace(tokens=tokens))
            metrics, _, _ = run(changed, hyper(1.2, gamma=0.1), Variant())
            assert abs(metrics["loss"] - whole[0]["loss"]) > 1e-5, (b, j, t)


def test_metrics_are_what_their_names_say(batch, frozen_logps, whole):
    metrics, per_token, grads = whole
    assert all((v[~MASK] == 0).all() for v in per_token.values())
    everywhere = np.asarray(naive_logp(STUDENT_DEF, STUDENT, batch))
    student, teacher, base = (
        np.take_along_axis(np.asarray(x), batch.rollout.tokens[..., None], -1)[..., 0][MASK]
        for x in (everywhere, *frozen_logps)
    )
    advantage = 1.2 * (teacher - base) - (student - base)
    np.testing.assert_allclose(per_token["student"][MASK], student, atol=1e-4)
    np.testing.assert_allclose(per_token["advantage"][MASK], advantage, atol=1e-4)
    expected = {
        "advantage_mean": advantage.mean(),
        "log_ratio_variance": (teacher - base).var(),
        "ratio_max": min(5, np.exp(teacher - student).max()),
        "clip_fraction": (np.exp(teacher - student) >= 5).mean(),
        "reverse_kl": (student - teacher).mean(),
        "entropy": -(np.exp(everywhere) * everywhere).sum(-1)[MASK].mean(),
        "completion_length": LENGTHS.sum() / (LENGTHS > 0).sum(),
        "sampler_trainer_gap": np.abs(student - batch.rollout.logprobs[MASK]).max(),
        "grad_norm": np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(grads))),
    }
    assert 0 < expected["clip_fraction"] < 1
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_a_reward_is_that_of_its_completion(batch, whole):
    """Also in microbatches."""
    reward = np.random.default_rng(5).normal(size=(B, N)).astype(np.float32)
    _, per_token, _ = run(batch._replace(reward=reward), hyper(1.2, gamma=0.1), Variant(), microbatch=2)
    np.testing.assert_allclose(
        per_token["advantage"], whole[1]["advantage"] + reward[..., None] * MASK, atol=1e-5
    )


# ---- the step as an update


def test_exact_step_at_lambda_1_approaches_the_teacher(batch):
    """20 updates on a fixed batch: the reverse KL to the teacher falls; teacher and base stay as they are."""
    state, kls = init_state(own(STUDENT), TX), []
    before = [np.array(x, copy=True) for x in jax.tree.leaves(FROZEN)]
    for _ in range(20):
        state, metrics, _ = compiled(EXACT, 1)(state, FROZEN, batch, hyper(1.0), 0.02)
        kls.append(float(metrics["loss"]))
    assert kls[-1] < 0.5 * kls[0] and np.mean(np.diff(kls) < 0) > 0.8
    for a, b in zip(before, jax.tree.leaves(FROZEN), strict=True):
        np.testing.assert_array_equal(a, b)


def test_at_the_target_the_exact_gradient_vanishes(batch):
    """λ = 0 and student = base: the student is at the target."""
    metrics, _, grads = run(batch, hyper(0.0), EXACT, 1, student=BASE)
    assert abs(metrics["loss"]) < 1e-6
    assert max(np.abs(x).max() for x in jax.tree.leaves(grads)) < 1e-6


def test_a_sweep_never_recompiles(batch):
    step = compiled(Variant())
    before = step._cache_size()
    for setting in ((0.5, 5, 0, 0, 0.2), (1.5, np.inf, 0.1, 0, 0.2), (1.2, 1.5, 0, 0.2, 0.1)):
        for lr in (1e-6, 1e-3):
            step(init_state(own(STUDENT), TX), FROZEN, batch, hyper(*setting), lr)
    assert step._cache_size() <= max(before, 1)


def test_the_second_step_runs_the_program_of_the_first(batch):
    """Also from a student that was read from a checkpoint, whose arrays are committed to a device."""
    step, restored = compiled(Variant()), jax.device_put(own(STUDENT), jax.devices()[0])
    state, *_ = step(init_state(restored, TX), FROZEN, batch, hyper(), 1e-3)
    before = step._cache_size()
    step(state, FROZEN, batch, hyper(), 1e-3)
    assert step._cache_size() == before


def test_positions_after_the_end_cannot_poison_the_gradient(batch):
    """Without a clip π_T/π_S may overflow at a position that is not part of the completion."""
    sharp = jax.tree.map(lambda x: x * (60 if x.shape[0] == 20 else 1), STUDENT)
    tokens = np.zeros((B, N, T), np.int32)
    for t in range(2):  # the likeliest first token, then one that the teacher finds e^100 times likelier
        rollout = Rollout(tokens, np.zeros((B, N, T), np.float32), np.ones_like(LENGTHS))
        ended = batch._replace(rollout=rollout)
        student, teacher = naive_logp(STUDENT_DEF, sharp, ended), naive_logp(TEACHER_DEF, TEACHER, ended)
        wanted = (student, teacher - student)[t][:, :, t]
        tokens[..., t] = np.asarray(wanted.argmax(-1))
    assert wanted.max() > 100
    metrics, _, grads = run(ended, hyper(1.2, np.inf), Variant(), student=sharp)
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
