"""The supervised step against torch's cross-entropy on Hugging Face's labels, AdamW against torch's."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax import nnx

from listopd_jax.models.config import ModelConfig
from listopd_jax.models.decoder import Decoder
from listopd_jax.train.optimizer import (
    TrainState,
    adamw,
    apply_gradients,
    cosine_lr,
    init_state,
    stochastic_round,
)
from listopd_jax.train.sft_step import make_sft_step

VOCAB, EOS, PAD = 13, 1, 0
B, P, T = 3, 6, 5
PROMPT_LENGTHS, ANSWER_LENGTHS = np.array([6, 2, 4], np.int32), np.array([3, 5, 1], np.int32)
CONFIG = ModelConfig(16, 8, 16, 1, 2, 1, 4)
IGNORED = -100  # Hugging Face's label of a token without loss


@pytest.fixture(scope="module")
def model():
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), shapes)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    prompt, answer = (rng.integers(2, VOCAB, size=(B, n)).astype(np.int32) for n in (P, T))
    answer[np.arange(B), ANSWER_LENGTHS - 1] = EOS
    prompt = np.where(np.arange(P) < PROMPT_LENGTHS[:, None], prompt, PAD)
    answer = np.where(np.arange(T) < ANSWER_LENGTHS[:, None], answer, PAD)
    return dict(prompt=prompt, prompt_length=PROMPT_LENGTHS, answer=answer, answer_length=ANSWER_LENGTHS)


RECORD = optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda grads, state, params: (grads, grads),
)
"""Plain gradient descent that keeps the last gradient as its state."""


@pytest.fixture(scope="module")
def step(model):
    compiled = make_sft_step(model[0], RECORD, VOCAB, chunk=4)

    def run(batch, lr=0.0):
        """New parameters, metrics and gradient of one step from the same start."""
        state, metrics = compiled(init_state(jax.tree.map(jnp.copy, model[1]), RECORD), batch, lr)
        return jax.tree.map(np.asarray, (state.params, metrics, state.opt_state))

    return run


def joined(batch):
    """Prompt and answer in one row, and Hugging Face's labels: the row itself, IGNORED outside the answer."""
    tokens, labels = np.full((B, P + T), PAD), np.full((B, P + T), IGNORED)
    for row in range(B):
        n, m = PROMPT_LENGTHS[row], ANSWER_LENGTHS[row]
        tokens[row, :n] = batch["prompt"][row, :n]
        tokens[row, n : n + m] = labels[row, n : n + m] = batch["answer"][row, :m]
    return tokens, labels


def test_loss_is_torch_cross_entropy_of_shifted_labels(model, batch, step):
    torch = pytest.importorskip("torch", reason="needs torch, the oracle")
    tokens, labels = joined(batch)
    decoder = nnx.merge(*model)
    hidden = decoder(tokens, PROMPT_LENGTHS + ANSWER_LENGTHS)
    logits = torch.tensor(np.asarray(hidden @ decoder.head_weight()[:VOCAB].T, np.float64))
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, VOCAB), torch.tensor(labels[:, 1:].reshape(-1)), ignore_index=IGNORED
    )
    _, metrics, _ = step(batch)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["tokens"] == ANSWER_LENGTHS.sum() == (labels != IGNORED).sum()
    counted = logits[:, :-1][torch.tensor(labels[:, 1:] != IGNORED)]
    entropy = torch.distributions.Categorical(logits=counted).entropy().mean()
    assert metrics["entropy"] == pytest.approx(entropy.item(), rel=1e-5)
    right = logits[:, :-1].argmax(-1) == torch.tensor(labels[:, 1:])
    assert 0 < metrics["accuracy"] == pytest.approx(right.sum().item() / ANSWER_LENGTHS.sum())


def test_gradient_is_that_of_the_whole_sequence(model, batch, step):
    graphdef, params = model
    tokens, labels = joined(batch)

    def naive(params):
        decoder = nnx.merge(graphdef, params)
        logits = decoder(tokens, PROMPT_LENGTHS + ANSWER_LENGTHS)[:, :-1] @ decoder.head_weight()[:VOCAB].T
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, np.maximum(labels[:, 1:], 0))
        counted = labels[:, 1:] != IGNORED
        return (losses * counted).sum() / counted.sum()

    expected = jax.jit(jax.grad(naive))(params)
    _, metrics, grads = step(batch)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(expected)), rel=1e-5)


def test_padding_of_prompt_and_answer_changes_nothing(batch, step):
    rng = np.random.default_rng(2)
    noise = {
        name: rng.integers(VOCAB, size=batch[name].shape).astype(np.int32) for name in ("prompt", "answer")
    }
    inside = {name: np.arange(x.shape[1]) < batch[f"{name}_length"][:, None] for name, x in noise.items()}
    other = batch | {name: np.where(inside[name], batch[name], x) for name, x in noise.items()}
    assert (other["prompt"] != batch["prompt"]).any() and (other["answer"] != batch["answer"]).any()
    for a, b in zip(jax.tree.leaves(step(batch)), jax.tree.leaves(step(other)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)


@pytest.mark.parametrize("row", range(B))
def test_every_answer_token_from_the_first_to_eos_counts(batch, step, row):
    """No one-off mask; and with a longer answer_length the token after EOS would count."""
    loss = step(batch)[1]["loss"]
    for t in range(ANSWER_LENGTHS[row]):
        answer = batch["answer"].copy()
        answer[row, t] = (answer[row, t] + 1) % VOCAB
        assert abs(step(batch | {"answer": answer})[1]["loss"] - loss) > 1e-5, t


def test_prompt_tokens_are_read_but_carry_no_loss(model, batch, step):
    """The loss is the mean over the answers' tokens and no more, but it depends on the prompt."""
    logp = -np.array([step(only(batch, row))[1]["loss"] for row in range(B)])
    expected = -(logp * ANSWER_LENGTHS).sum() / ANSWER_LENGTHS.sum()
    assert step(batch)[1]["loss"] == pytest.approx(expected, rel=1e-5)
    prompt = batch["prompt"].copy()
    prompt[0, 0] = (prompt[0, 0] + 1) % VOCAB
    assert abs(step(batch | {"prompt": prompt})[1]["loss"] - step(batch)[1]["loss"]) > 1e-5


def only(batch, row):
    """The batch with the answer of one row alone."""
    return batch | {"answer_length": np.where(np.arange(B) == row, ANSWER_LENGTHS, 0).astype(np.int32)}


def test_descent_learns_the_answers(model, batch):
    tx = adamw(ml_collections.ConfigDict(dict(b1=0.9, weight_decay=0.0, max_grad_norm=1.0)), b2=0.95)
    train = make_sft_step(model[0], tx, VOCAB, chunk=4)
    state, losses = init_state(jax.tree.map(jnp.copy, model[1]), tx), []
    for i in range(60):
        state, metrics = train(state, batch, cosine_lr(i, 60, 0.05, 5))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.1 < losses[0]
    assert train._cache_size() == 1  # the schedule does not recompile


# ---- the optimizer


def optimizer_config(**changes):
    return ml_collections.ConfigDict(dict(b1=0.9, b2=0.95, weight_decay=0.1, max_grad_norm=0.0) | changes)


def descend(params, gradients, lrs, config):
    tx = adamw(config, config.b2)
    state = init_state({"x": jnp.asarray(params)}, tx)
    for grad, lr in zip(gradients, lrs, strict=True):
        state = apply_gradients(state, {"x": jnp.asarray(grad)}, jnp.float32(lr), tx)
    return np.asarray(state.params["x"])


@pytest.fixture(scope="module")
def walk():
    rng = np.random.default_rng(3)
    return (
        rng.normal(size=7).astype(np.float32),
        rng.normal(size=(5, 7)).astype(np.float32),
        np.geomspace(1e-3, 1e-1, 5),
    )


def test_adamw_is_torch_adamw(walk):
    torch = pytest.importorskip("torch", reason="needs torch, the oracle")
    params, gradients, lrs = walk
    x = torch.tensor(params, requires_grad=True)
    theirs = torch.optim.AdamW([x], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for grad, lr in zip(gradients, lrs, strict=True):
        theirs.param_groups[0]["lr"] = lr
        x.grad = torch.tensor(grad)
        theirs.step()
    np.testing.assert_allclose(descend(*walk, optimizer_config()), x.detach(), rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped_by_their_global_norm(walk):
    params, gradients, lrs = walk
    scale = np.minimum(1, 0.5 / np.linalg.norm(gradients, axis=-1, keepdims=True))
    expected = descend(params, gradients * scale, lrs, optimizer_config())
    clipped = descend(params, gradients, lrs, optimizer_config(max_grad_norm=0.5))
    np.testing.assert_allclose(clipped, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(clipped - descend(params, gradients, lrs, optimizer_config())).max() > 1e-4


def test_rounding_at_random_is_right_on_the_average():
    """One of the two neighbours, with the probability that makes the mean right; what bfloat16 has stays."""
    x = jnp.float32([1.0, 1 + 2**-9, -3.7, 1e-30, 0.0])
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = np.asarray(jax.vmap(stochastic_round, (0, None))(keys, x).astype(jnp.float32))
    gap = np.float32([2**-7, 2**-7, 2**-6, 2**-106, 0])
    assert (np.abs(drawn - np.asarray(x)) < gap + 1e-38).all()
    np.testing.assert_allclose(drawn.mean(0), x, atol=0.02 * gap.max(), rtol=2e-4)
    assert (drawn[:, 0] == 1).all() and len(np.unique(drawn[:, 1])) == 2


def test_moments_in_bfloat16_walk_where_float32_walks():
    """Thousands of small steps of b2 = .999: rounded to nearest, the second moment would never leave its start."""
    config, rng = optimizer_config(b2=0.999, weight_decay=0.0), np.random.default_rng(0)
    gradients = rng.normal(1.0, 0.1, (3000, 4)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def after(moments, gradients):
        tx = adamw(config, config.b2, moments)
        params = {"x": jnp.zeros(4)}
        state = TrainState(params, tx.init(params))
        walk = lambda state, g: (apply_gradients(state, {"x": g}, jnp.float32(1e-3), tx), None)  # noqa: E731
        return jax.lax.scan(walk, state, gradients)[0]

    exact, ours = after("float32", gradients), after("bfloat16", gradients)
    moments = ours.opt_state[1]
    assert moments.mu["x"].dtype == moments.nu["x"].dtype == jnp.bfloat16
    np.testing.assert_allclose(moments.nu["x"].astype(jnp.float32), exact.opt_state[1].nu["x"], rtol=0.1)
    np.testing.assert_allclose(ours.params["x"], exact.params["x"], rtol=0.05)


@pytest.mark.parametrize(("steps", "warmup"), [(20, 0), (20, 5), (1, 0), (3, 3)])
def test_cosine_schedule_is_optax(steps, warmup):
    ours = [cosine_lr(i, steps, 0.3, warmup) for i in range(steps)]
    cosine = optax.cosine_decay_schedule(0.3, max(1, steps - warmup))
    theirs = [0.3 * (i + 1) / warmup if i < warmup else float(cosine(i - warmup)) for i in range(steps)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-8)
    assert min(ours) > 0  # no step of a run is wasted
