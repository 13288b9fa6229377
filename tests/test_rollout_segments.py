"""`generate`, which shrinks the batch and grows the cache as it goes, against `decode`, one plain loop."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from listopd_jax.models.config import ModelConfig
from listopd_jax.models.decoder import abstract
from listopd_jax.rollout import decode as module
from listopd_jax.rollout.decode import capacities, decode, generate
from listopd_jax.rollout.sampling import categorical, row_keys
from listopd_jax.rollout.state import fitting, longest

VOCAB, EOS, PAD, P, T = 37, 1, 0, 5, 16
LEAST_ROWS, LEAST_CAPACITY = 4, 8


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Limits at which even small rollouts grow and shrink to few rows."""
    monkeypatch.setattr(module, "LEAST_ROWS", LEAST_ROWS)
    monkeypatch.setattr(module, "LEAST_CAPACITY", LEAST_CAPACITY)
    monkeypatch.setattr(module, "LEAST_PARAMETERS", 0)


@functools.cache
def model(seed, hidden=8):
    config = ModelConfig(40, hidden, 2 * hidden, 1 + seed, 2, 1, 4, tied=True)
    graphdef, shapes = abstract(config)
    rng = np.random.default_rng(seed)
    return graphdef, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.6, x.shape), x.dtype), shapes)


def case(B, n, models, seed, eos):
    """Arguments of a rollout whose rows end anywhere between 0 and T tokens; most end early."""
    rng = np.random.default_rng(seed)
    graphdefs, params = zip(*(model(i, 8 + 4 * i) for i in range(models)), strict=True)
    weights = rng.uniform(0.5, 1.5, (models, n)) if models > 1 else np.ones((1, n))
    prompts, lengths = rng.integers(2, VOCAB, (B, P)), rng.integers(1, P + 1, B)
    arguments = graphdefs, params, jnp.asarray(weights, jnp.float32), prompts, lengths, jax.random.key(seed)
    budgets = np.minimum(T, rng.geometric(0.12, (B, n)) - 1)
    budgets[rng.integers(B), rng.integers(n)] = T
    return arguments, dict(budgets=budgets, max_tokens=T, vocab=VOCAB, eos=eos, pad=PAD)


@jax.jit(static_argnames=("graphs", "max_tokens", "vocab", "eos", "pad", "greedy"))
def _plain(graphs, params, *arguments, **options):
    return decode(graphs, params, *arguments, **options)


def plain(arguments, options):
    return jax.tree.map(np.asarray, _plain(*arguments, **options))


def watched(arguments, options, monkeypatch):
    """The rollout, and (prompts, completions, capacity, step) at the start of every segment."""
    seen, segment = [], module.segment

    def watch(sampler, prompts, state, least):
        seen.append((*state.caches[0].k.shape[1:3], state.caches[0].capacity, int(longest(state.rows))))
        assert len(prompts.lengths) == prompts.caches[0].k.shape[1] == seen[-1][0]
        return segment(sampler, prompts, state, least)

    monkeypatch.setattr(module, "segment", watch)
    return jax.tree.map(np.asarray, generate(*arguments, **options)), seen


CASES = {
    "n=1": dict(B=11, n=1, models=1, eos=()),
    "n=4, eos": dict(B=5, n=4, models=1, eos=(EOS,)),
    "mixture": dict(B=6, n=4, models=2, eos=()),
    "mixture, greedy, eos": dict(B=3, n=5, models=2, eos=(EOS,), greedy=True),
}


@pytest.mark.parametrize("name", CASES)
def test_shrinking_writes_what_the_plain_loop_writes(name, monkeypatch):
    shape = dict(CASES[name])
    greedy = shape.pop("greedy", False)
    arguments, options = case(seed=len(name), **shape)
    options["greedy"] = greedy
    ours, seen = watched(arguments, options, monkeypatch)
    theirs = plain(arguments, options)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.lengths, theirs.lengths)
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
    assert len(np.unique(theirs.lengths)) > 3
    check_segments(seen, theirs.lengths)


def check_segments(seen, lengths):
    """Few, no cache longer than needed, no batch that could be half."""
    B, n = lengths.shape
    assert len(seen) <= len(capacities(T)) + math.ceil(math.log2(B)) + math.ceil(math.log2(n)) + 1
    assert min(b * k for b, k, *_ in seen) < B * n
    for b, k, capacity, step in seen:
        assert capacity == min(size for size in capacities(T) if size >= step)
        left = (lengths > step).sum(1)
        need = int((left > 0).sum()), int(left.max())
        assert need[0] <= b and need[1] <= k
        if step > 1:
            assert fitting((b, k), *need, LEAST_ROWS) == (b, k)


def test_rows_of_one_length_take_a_segment_for_each_capacity(monkeypatch):
    arguments, options = case(4, 2, models=1, seed=0, eos=())
    rollout, seen = watched(arguments, options | {"budgets": None, "max_tokens": 24}, monkeypatch)
    assert (rollout.lengths == 24).all()
    assert [capacity for _, _, capacity, _ in seen] == [8, 16, 24]
    assert {(b, k) for b, k, *_ in seen} == {(4, 2)}


def test_a_row_says_the_same_whatever_becomes_of_the_others():
    arguments, options = case(5, 4, models=1, seed=1, eos=(EOS,))
    full = generate(*arguments, **options | {"budgets": None})
    rollout = generate(*arguments, **options)
    for b, j in np.ndindex(5, 4):
        end = min(options["budgets"][b, j], full.lengths[b, j])
        np.testing.assert_array_equal(rollout.tokens[b, j, :end], full.tokens[b, j, :end])
        assert (np.asarray(rollout.tokens[b, j, end:]) == PAD).all()


def test_nothing_to_write(monkeypatch):
    arguments, options = case(3, 2, models=1, seed=2, eos=())
    rollout, seen = watched(arguments, options | {"budgets": np.zeros((3, 2), int)}, monkeypatch)
    assert (rollout.lengths == 0).all() and (rollout.tokens == PAD).all() and len(seen) == 1


@pytest.mark.parametrize(
    ("shape", "left", "expected"),
    [
        ((8, 8), (8, 8), (8, 8)),
        ((8, 8), (8, 4), (8, 4)),
        ((8, 8), (4, 8), (4, 8)),
        ((8, 8), (1, 1), (8, 1)),
        ((11, 3), (6, 2), (6, 2)),
        ((11, 3), (7, 3), (11, 3)),
        ((64, 1), (3, 1), (8, 1)),
        ((4, 2), (1, 1), (4, 2)),
    ],
)
def test_batches_are_halved_while_the_rows_fit(shape, left, expected):
    assert fitting(shape, *left, least=8) == expected


@pytest.mark.parametrize("budget", [1, 7, 64, 65, 200, 512])
def test_capacities_are_few_and_end_with_the_budget(budget, monkeypatch):
    monkeypatch.setattr(module, "LEAST_CAPACITY", 64)
    sizes = capacities(budget)
    assert sizes == sorted(set(sizes)) and sizes[-1] == budget and len(sizes) <= 4
    assert (len(sizes) == 1) == (budget <= 64)


@pytest.mark.parametrize("vocab", [1, 2, 5, 37, 64, 96, 300])
def test_two_stages_draw_from_the_distribution(vocab):
    """χ² of 30,000 rows, each with a key of its own."""
    rows = 30_000
    logp = jax.nn.log_softmax(2 * jax.random.normal(jax.random.key(vocab), (vocab,)))
    keys = row_keys(jax.random.key(0), jnp.int32(3), jnp.arange(rows))
    drawn = np.asarray(jax.jit(categorical)(keys, jnp.broadcast_to(logp, (rows, vocab))))
    counts, expected = np.bincount(drawn, minlength=vocab), rows * np.exp(np.asarray(logp, np.float64))
    assert len(counts) == vocab
    if vocab > 1:
        rare = expected < 5
        counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
        terms = (counts - expected) ** 2 / np.maximum(expected, 1e-9)
        assert scipy.stats.chi2.sf(terms.sum(), len(terms) - 1) > 1e-3


def test_impossible_tokens_are_never_drawn():
    logp = jnp.full((2000, 50), -jnp.inf).at[:, 41].set(jnp.log(0.5)).at[:, 7].set(jnp.log(0.5))
    keys = row_keys(jax.random.key(1), jnp.int32(0), jnp.arange(2000))
    assert set(np.unique(categorical(keys, logp))) == {7, 41}
