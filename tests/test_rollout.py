"""Decoding and scoring against plain passes over whole sequences, enumeration, and scripted decoders."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from listopd_jax.models.config import ModelConfig
from listopd_jax.models.decoder import Decoder, KVCache
from listopd_jax.rollout.decode import completion_mask, decode, generate, segment
from listopd_jax.rollout.scoring import completion_hidden, completion_logprobs

VOCAB, EOS, OTHER_EOS, PAD = 16, 1, 8, 0
B, P, N, T = 3, 7, 3, 8
LENGTHS = np.array([7, 2, 5])
LAMBDAS = np.array([0.5, 1.2, 2.5])


def tiny(vocab_size, hidden_size, num_layers, seed, tied=True):
    """(graphdef, params) of a decoder with random weights, large enough for peaked distributions."""
    config = ModelConfig(vocab_size, hidden_size, 2 * hidden_size, num_layers, 4, 2, 8, tied=tied)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    return graphdef, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.6, x.shape), x.dtype), shapes)


@pytest.fixture(scope="module")
def student():
    return tiny(20, 16, 1, seed=0)


@pytest.fixture(scope="module")
def teacher():
    """Larger than the student, another padded vocabulary, an untied head."""
    return tiny(24, 24, 2, seed=1, tied=False)


@pytest.fixture(scope="module")
def prompts():
    return np.random.default_rng(2).integers(VOCAB, size=(B, P)).astype(np.int32)


def run(models, weights, prompts, key=0, **options):
    graphdefs, params = zip(*models, strict=True)
    options = dict(max_tokens=T, vocab=VOCAB, eos=(EOS,), pad=PAD) | options
    weights = jnp.asarray(weights, jnp.float32)
    rollout = generate(graphdefs, params, weights, prompts, LENGTHS, jax.random.key(key), **options)
    return jax.tree.map(np.asarray, rollout)


@pytest.fixture(scope="module")
def sampled(student, prompts):
    return run([student], np.ones((1, N)), prompts, temperature=1.0)


@jax.jit(static_argnums=0)
def log_softmax_everywhere(graphdef, params, tokens, lengths):
    decoder = nnx.merge(graphdef, params)
    return jax.nn.log_softmax(decoder(tokens, lengths) @ decoder.head_weight()[:VOCAB].T)


def whole_sequences(prompts, completions):
    """Prompts and completions joined [B·n, P+T], their lengths, where each token is predicted [B·n, T]."""
    rows = np.full((B, completions.shape[1], P + T), PAD, np.int32)
    for b, length in enumerate(LENGTHS):
        rows[b, :, :length] = prompts[b, :length]
        rows[b, :, length : length + T] = completions[b]
    at = np.repeat(LENGTHS, completions.shape[1])[:, None] - 1 + np.arange(T)
    return rows.reshape(-1, P + T), at[:, -1] + 2, at


def plain_logp(model, prompts, completions):
    """log π at every completion position [B, n, T, VOCAB], by one plain pass over each sequence."""
    rows, lengths, at = whole_sequences(prompts, completions)
    logp = log_softmax_everywhere(*model, rows, lengths)
    return np.asarray(jnp.take_along_axis(logp, at[..., None], 1)).reshape(*completions.shape, VOCAB)


def picked(logp, tokens):
    return np.take_along_axis(logp, tokens[..., None], -1)[..., 0]


def brute_force_greedy(models, weights, prompts):
    """Greedy completions of the mixture, one plain pass over the whole sequence for every token."""
    tokens = np.full((B, len(weights[0]), T), PAD, np.int32)
    done = np.zeros(tokens.shape[:2], bool)
    for t in range(T):
        mixed = sum(
            w[:, None] * plain_logp(m, prompts, tokens)[:, :, t] for m, w in zip(models, weights, strict=True)
        )
        tokens[..., t] = np.where(done, PAD, mixed.argmax(-1))
        done |= tokens[..., t] == EOS
    return tokens


# ---- the end of a completion, with decoders that follow a script


class Scripted(nnx.Module):
    """A decoder that (nearly) surely writes script[b, j], and tells each step; `script` is [B, n, T]."""

    def __init__(self, script, tell):
        self.script, self.tell = nnx.Variable(jnp.asarray(script)), tell

    def prefill(self, prompts, lengths):
        return self._state(self.script[...][:, 0, 0]), None

    def init_cache(self, B, n, C):
        return KVCache(jnp.zeros((1, B, n, 1, 1, C)), jnp.zeros((1, B, n, 1, C, 1)))

    def decode_step(self, prompt, lengths, cache, cached, tokens):
        jax.debug.callback(self.tell)
        script = self.script[...]
        place = jnp.atleast_2d(cached)[..., None] + 1 + jnp.arange(tokens.shape[-1])
        place = jnp.broadcast_to(jnp.minimum(place, script.shape[-1] - 1), tokens.shape)
        return self._state(jnp.take_along_axis(script, place, axis=-1)), cache

    def head_weight(self):
        return 50 * jnp.eye(VOCAB)

    def _state(self, next_token):
        return jax.nn.one_hot(next_token, VOCAB)


def follow(script, max_tokens=6, budgets=None, greedy=True, eos=(EOS,)):
    script = np.array(script)
    steps = itertools.count()
    graph, params = nnx.split(Scripted(script, lambda: next(steps)))
    prompts = np.zeros((len(script), 1), np.int32)
    rollout = decode(
        (graph,),
        (params,),
        jnp.ones((1, script.shape[1])),
        prompts,
        np.ones(len(script), np.int32),
        jax.random.key(0),
        max_tokens=max_tokens,
        vocab=VOCAB,
        eos=eos,
        pad=PAD,
        greedy=greedy,
        budgets=None if budgets is None else jnp.array(budgets),
    )
    jax.effects_barrier()
    return jax.tree.map(np.asarray, rollout), next(steps)


SCRIPT = [
    [[3, 4, EOS, 5, 6, 7], [3, EOS, 5, 5, 5, 5]],
    [[EOS, 4, 4, 4, 4, 4]] * 2,
    [[PAD, 2, 2, 2, 2, EOS]] * 2,
]


@pytest.mark.parametrize("greedy", [True, False])
def test_a_completion_ends_with_its_eos(greedy):
    """EOS is written and counted, nothing after it; before it a pad id is a token like any other."""
    rollout, _ = follow(SCRIPT, greedy=greedy)
    assert rollout.lengths.tolist() == [[3, 2], [1, 1], [6, 6]]
    assert rollout.tokens[0].tolist() == [[3, 4, EOS, PAD, PAD, PAD], [3, EOS, PAD, PAD, PAD, PAD]]
    assert rollout.tokens[1].tolist() == [[EOS, PAD, PAD, PAD, PAD, PAD]] * 2
    assert rollout.tokens[2].tolist() == SCRIPT[2]


def test_each_of_several_eos_ends_a_completion():
    rollout, _ = follow([[[3, 4, OTHER_EOS, 5, 6, 7], [3, EOS, OTHER_EOS, 5, 5, 5]]], eos=(EOS, OTHER_EOS))
    assert rollout.lengths.tolist() == [[3, 2]]
    assert rollout.tokens[0, 0].tolist() == [3, 4, OTHER_EOS, PAD, PAD, PAD]
    rollout, _ = follow([[[3, EOS, 4, 4, 4, 4]]], eos=())
    assert rollout.lengths.tolist() == [[6]], "without an EOS only the budget ends it"


def test_budgets_bound_each_row():
    rollout, _ = follow(SCRIPT, budgets=[[0, 1], [0, 9], [5, 9]])
    assert rollout.lengths.tolist() == [[0, 1], [0, 1], [5, 6]]
    assert rollout.tokens[0].tolist() == [[PAD] * 6, [3] + [PAD] * 5]
    assert rollout.tokens[2].tolist() == [[PAD, 2, 2, 2, 2, PAD], SCRIPT[2][1]]


def test_max_tokens_bounds_every_row():
    rollout, steps = follow(SCRIPT, max_tokens=2, budgets=[[9, 9]] * 3)
    assert rollout.tokens.shape == (3, 2, 2)
    assert rollout.lengths.tolist() == [[2, 2], [1, 1], [2, 2]]
    assert steps <= 2


@pytest.mark.parametrize(
    ("budgets", "longest"),
    [(None, 6), ([[9, 9], [9, 9], [4, 2]], 4), ([[1, 9], [9, 9], [0, 0]], 2), ([[0, 0]] * 3, 0)],
)
def test_the_loop_stops_when_all_have_ended(budgets, longest):
    rollout, steps = follow(SCRIPT, budgets=budgets)
    assert rollout.lengths.max() == longest
    assert steps <= longest


def test_mask_covers_eos_and_nothing_after_it():
    rollout, _ = follow(SCRIPT)
    mask = np.asarray(completion_mask(rollout.lengths, 6))
    for row, tokens in zip(mask.reshape(-1, 6), rollout.tokens.reshape(-1, 6), strict=True):
        assert row.tolist() == [t <= tokens.tolist().index(EOS) for t in range(6)]
    assert not np.asarray(completion_mask(jnp.array([0]), 3)).any()


# ---- sampler against teacher-forced and plain passes


def test_completions_end_at_different_lengths(sampled):
    """What the tests below rest on: ragged, some with EOS mid-way, some without EOS."""
    assert len(np.unique(sampled.lengths)) >= 4 and sampled.lengths.min() < T == sampled.lengths.max()


def test_sampler_and_scorer_agree(student, prompts, sampled):
    decoder = nnx.merge(*student)
    logprobs, entropy = completion_logprobs(decoder, prompts, LENGTHS, sampled.tokens, VOCAB, chunk=16)
    plain = plain_logp(student, prompts, sampled.tokens)
    mask = np.asarray(completion_mask(sampled.lengths, T))
    assert np.abs(sampled.logprobs - logprobs)[mask].max() < 1e-4
    assert np.abs(sampled.logprobs - picked(plain, sampled.tokens))[mask].max() < 1e-4
    assert np.abs(entropy + (np.exp(plain) * plain).sum(-1))[mask].max() < 1e-4
    assert (sampled.logprobs[~mask] == 0).all() and (sampled.tokens[~mask] == PAD).all()
    last = picked(sampled.tokens, sampled.lengths - 1)
    assert ((last == EOS) | (sampled.lengths == T)).all() and (sampled.tokens[mask] == EOS).sum() == (
        last == EOS
    ).sum()


def test_shared_prefix_equals_whole_sequences_in_value_and_gradient(teacher, prompts, sampled):
    graphdef, params = teacher
    rows, lengths, at = whole_sequences(prompts, sampled.tokens)
    weights = np.random.default_rng(3).normal(size=sampled.tokens.shape) * completion_mask(sampled.lengths, T)

    def shared(params):
        logp, _ = completion_logprobs(
            nnx.merge(graphdef, params), prompts, LENGTHS, sampled.tokens, VOCAB, 16
        )
        return (logp * weights).sum()

    def plain(params):
        logp = log_softmax_everywhere(graphdef, params, rows, lengths)
        logp = jnp.take_along_axis(logp, at[..., None], 1).reshape(*sampled.tokens.shape, VOCAB)
        return (jnp.take_along_axis(logp, sampled.tokens[..., None], -1)[..., 0] * weights).sum()

    (value, grad), (value2, grad2) = (jax.jit(jax.value_and_grad(f))(params) for f in (shared, plain))
    assert float(value) == pytest.approx(float(value2), rel=1e-5)
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(grad2), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_one_token_completions_can_be_scored(student, prompts, sampled):
    first = sampled.tokens[..., :1]
    logprobs, _ = completion_logprobs(nnx.merge(*student), prompts, LENGTHS, first, VOCAB, chunk=4)
    np.testing.assert_allclose(logprobs, sampled.logprobs[..., :1], atol=1e-4)


def test_the_prompts_padding_is_never_read(student, prompts, sampled):
    other = np.where(np.arange(P) < LENGTHS[:, None], prompts, (prompts + 3) % VOCAB)
    again = run([student], np.ones((1, N)), other, temperature=1.0)
    jax.tree.map(np.testing.assert_array_equal, again, sampled)
    hidden = [completion_hidden(nnx.merge(*student), x, LENGTHS, sampled.tokens) for x in (prompts, other)]
    np.testing.assert_array_equal(*hidden)


def test_a_key_names_its_completions(student, prompts, sampled):
    again = run([student], np.ones((1, N)), prompts, temperature=1.0)
    jax.tree.map(np.testing.assert_array_equal, again, sampled)
    other = run([student], np.ones((1, N)), prompts, key=1, temperature=1.0)
    assert (other.tokens != sampled.tokens).any()
    assert any((sampled.tokens[b, 0] != sampled.tokens[b, 1]).any() for b in range(B))


def test_tokens_beyond_the_vocabulary_are_never_written(student, prompts):
    """Rows of the head that are no tokens: even with a huge logit nobody samples them."""
    graphdef, params = student
    params = jax.tree.map(lambda x: x.at[VOCAB:].multiply(1e3) if x.shape[0] == 20 else x, params)
    rollout = run([(graphdef, params)], np.ones((1, N)), prompts, temperature=1.0)
    assert rollout.tokens.max() < VOCAB and (rollout.logprobs <= 0).all()
    greedy = run([(graphdef, params)], np.ones((1, N)), prompts, greedy=True)
    assert greedy.tokens.max() < VOCAB


# ---- greedy and mixtures


def test_greedy_is_the_argmax_of_plain_passes(student, prompts):
    rollout = run([student], np.ones((1, N)), prompts, greedy=True)
    np.testing.assert_array_equal(rollout.tokens, brute_force_greedy([student], np.ones((1, N)), prompts))
    mask = np.asarray(completion_mask(rollout.lengths, T))
    plain = picked(plain_logp(student, prompts, rollout.tokens), rollout.tokens)
    assert np.abs(rollout.logprobs - plain)[mask].max() < 1e-4


@pytest.fixture(scope="module")
def extrapolated(student, teacher, prompts):
    """Greedy from λ log π_T + (1−λ) log π_B, completion j under λ_j."""
    return run([teacher, student], np.stack([LAMBDAS, 1 - LAMBDAS]), prompts, greedy=True)


def test_mixture_is_the_argmax_of_the_extrapolated_target(student, teacher, prompts, extrapolated):
    weights = np.stack([LAMBDAS, 1 - LAMBDAS])
    np.testing.assert_array_equal(
        extrapolated.tokens, brute_force_greedy([teacher, student], weights, prompts)
    )
    assert len({row.tobytes() for row in extrapolated.tokens.reshape(B * N, T)}) > B  # λ matters


def test_mixture_logprobs_are_those_of_the_normalised_target(student, teacher, prompts, extrapolated):
    mask = np.asarray(completion_mask(extrapolated.lengths, T))
    teacher, base = (plain_logp(m, prompts, extrapolated.tokens) for m in (teacher, student))
    lam = LAMBDAS[:, None, None]
    target = jax.nn.log_softmax(lam * teacher + (1 - lam) * base)
    assert np.abs(extrapolated.logprobs - picked(np.asarray(target), extrapolated.tokens))[mask].max() < 1e-4


def test_a_grid_of_lambda_equals_one_call_per_lambda(student, teacher, prompts, extrapolated):
    for j, lam in enumerate(LAMBDAS):
        alone = run([teacher, student], [[lam], [1 - lam]], prompts, greedy=True)
        np.testing.assert_array_equal(alone.tokens[:, 0], extrapolated.tokens[:, j])
        np.testing.assert_array_equal(alone.lengths[:, 0], extrapolated.lengths[:, j])


def test_the_ends_of_the_grid_are_the_models_themselves(student, teacher, prompts, extrapolated):
    for weights, model in (([[0.0], [1.0]], student), ([[1.0], [0.0]], teacher)):
        mixed = run([teacher, student], weights, prompts, greedy=True)
        np.testing.assert_array_equal(mixed.tokens, brute_force_greedy([model], np.ones((1, 1)), prompts))


def test_keys_weights_and_temperatures_share_one_program(student, prompts):
    before = segment._cache_size()
    for key, weight, temperature in ((0, 1.0, 1.0), (1, 0.5, 0.7), (2, 1.2, 2.0)):
        run([student], np.full((1, N), weight), prompts, key=key, temperature=temperature)
    assert segment._cache_size() <= before + 1


# ---- frequencies


@pytest.fixture(scope="module")
def exact_pairs():
    """A model of 5 tokens, a prompt, and log π of the first token and of the second after each first."""
    model = tiny(6, 8, 1, seed=4)
    decoder, prompt = nnx.merge(*model), np.array([[2, 3, 4]], np.int32)
    rows = np.array([[2, 3, 4, a] for a in range(5)])
    hidden = decoder(rows, np.full(5, 4))
    logp = jax.nn.log_softmax(hidden @ decoder.head_weight()[:5].T)
    return model, prompt, np.asarray(logp[0, 2]), np.asarray(logp[:, 3])


def chi_square_pvalue(counts, expected):
    """Pearson's test; cells with fewer than 5 expected are one cell."""
    rare = expected < 5
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    terms = (counts - expected) ** 2 / np.maximum(expected, 1e-9)
    return scipy.stats.chi2.sf(terms.sum(), len(terms) - 1)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_sampling_frequencies_are_the_models_probabilities(exact_pairs, temperature):
    """χ² over all completions of at most two tokens, of which EOS ends some early."""
    (graphdef, params), prompt, first, second = exact_pairs
    first, second = (np.asarray(jax.nn.log_softmax(x / temperature)) for x in (first, second))
    n = 20_000
    options = dict(max_tokens=2, vocab=5, eos=(EOS,), pad=PAD, temperature=temperature)
    rollout = generate(
        (graphdef,), (params,), jnp.ones((1, n)), prompt, np.array([3]), jax.random.key(5), **options
    )
    a, b = np.asarray(rollout.tokens)[0].T
    expected = np.exp(first[:, None] + second)
    expected[EOS] = 0
    expected[EOS, PAD] = np.exp(first[EOS])
    counts = np.bincount(5 * a + b, minlength=25).reshape(5, 5)
    assert counts[expected == 0].sum() == 0
    assert chi_square_pvalue(counts[expected > 0], n * expected[expected > 0]) > 1e-3
    ended = a == EOS
    np.testing.assert_allclose(np.asarray(rollout.logprobs)[0, :, 0], first[a], atol=1e-4)
    np.testing.assert_allclose(
        np.asarray(rollout.logprobs)[0, :, 1], np.where(ended, 0, second[a, b]), atol=1e-4
    )
