"""Drafted tokens: what is drafted, and that no draft changes what a row says."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_rollout import EOS, PAD, VOCAB, Scripted, chi_square_pvalue, tiny

from listopd_jax.rollout import decode as module
from listopd_jax.rollout.decode import decode, generate
from listopd_jax.rollout.draft import draft

T, P = 24, 5
SKELETON = [7, 8, 9, 2, 10, 7, 8, 9, 3, 10, 7, 8, 9, 4, 10, EOS]  # three objects, each with a slot


def drafted(hint, written, size, source=0):
    """What is drafted after `written`, and from where it is copied."""
    tokens = np.full((1, 1, T), PAD)
    tokens[0, 0, : len(written)] = written
    tokens, where = draft(
        jnp.array([hint], jnp.int32), jnp.asarray(tokens, jnp.int32), jnp.array([[len(written)]]),
        jnp.array([[source]]), size,
    )  # fmt: skip
    return tokens[0, 0].tolist(), int(where[0, 0])


def test_a_draft_continues_where_the_last_was_copied_from():
    assert drafted(SKELETON, SKELETON[:2], 4, source=2) == (SKELETON[2:6], 2)


@pytest.mark.parametrize("slot", [2, 3, 11])
def test_a_slot_filled_otherwise_does_not_lose_the_place(slot):
    """After its own token in the slot, the row is drafted on behind the slot."""
    written = [*SKELETON[:3], slot]
    assert drafted(SKELETON, written, 5, source=4)[0] == SKELETON[4:9]


def test_a_row_that_left_the_skeleton_is_found_again():
    """The place that was copied from says nothing any more; the last tokens do."""
    written = [12, 13, 12, *SKELETON[:8]]
    assert drafted(SKELETON, written, 4, source=3) == (SKELETON[8:12], 8)


def test_without_a_hint_a_row_is_drafted_from_itself():
    written = [5, 6, 7, 8, 9, 5, 6, 7]
    assert drafted([], written, 2)[0] == [8, 9]


def test_a_text_that_repeats_itself_keeps_repeating():
    assert drafted([], [5, 6, 5, 6, 5, 6], 6, source=4)[0] == [5, 6] * 3


def test_what_is_not_written_yet_is_never_copied():
    """The buffer behind a row's end holds what other rows' widths left there."""
    tokens = jnp.full((1, 1, T), 11).at[0, 0, :3].set(jnp.array([5, 6, 5]))
    for source in range(T):
        found, where = draft(jnp.zeros((1, 0), jnp.int32), tokens, jnp.array([[3]]), jnp.array([[source]]), 6)
        assert 11 not in found.tolist()[0][0] and where[0, 0] < 3


# ---- scripted decoders: how many steps a draft saves


def follow(script, hint, draft_tokens, budgets=None, greedy=True):
    graph, params = nnx.split(Scripted(np.array(script), lambda: None))
    B, n, length = np.shape(script)
    rollout = decode(
        (graph,), (params,), jnp.ones((1, n)), np.zeros((B, 1), np.int32), np.ones(B, np.int32), jax.random.key(0),
        max_tokens=length, vocab=VOCAB, eos=(EOS,), pad=PAD, greedy=greedy, budgets=budgets,
        hint=jnp.array([hint], jnp.int32), draft_tokens=draft_tokens,
    )  # fmt: skip
    return jax.tree.map(np.asarray, rollout)


@pytest.mark.parametrize("greedy", [True, False])
def test_a_hint_that_is_right_is_confirmed_whole(greedy):
    rollout = follow([[SKELETON]], SKELETON, draft_tokens=4, greedy=greedy)
    assert rollout.tokens[0, 0].tolist() == SKELETON
    assert rollout.steps.tolist() == [[3]]  # the first token by the prefill, then five in each step


def test_each_row_takes_the_steps_that_its_own_text_needs():
    other = [7, 4, 13, 6, 5, 11, 3, 2, 14, 15, 6, 3, 13, 5, 9, EOS]
    rollout = follow([[SKELETON, other]], SKELETON, draft_tokens=15)
    assert rollout.tokens.tolist() == [[SKELETON, other]]
    assert rollout.steps[0, 0] == 1 and 10 <= rollout.steps[0, 1] <= 15


def test_nothing_stands_after_an_eos_or_beyond_the_budget():
    """Though the draft goes on, and the decoder would too."""
    ended = [*SKELETON[:4], EOS, *SKELETON[5:]]
    rollout = follow([[ended, SKELETON]], ended, draft_tokens=12, budgets=jnp.array([[16, 7]]))
    assert rollout.lengths.tolist() == [[5, 7]]
    assert rollout.tokens[0, 0].tolist() == [*ended[:5], *[PAD] * 11]
    assert rollout.tokens[0, 1].tolist() == [*SKELETON[:7], *[PAD] * 9]
    assert (rollout.logprobs[rollout.tokens == PAD] == 0).all()


# ---- real decoders: the same tokens with and without drafts


@pytest.fixture(scope="module")
def models():
    return tiny(20, 16, 1, seed=0), tiny(24, 24, 2, seed=1, tied=False)


def case(models, seed, B, n, **options):
    graphs, params = zip(*models, strict=True)
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 1.5, (len(models), n)) if len(models) > 1 else np.ones((1, n))
    arguments = graphs, params, jnp.asarray(weights, jnp.float32), rng.integers(VOCAB, size=(B, P))
    arguments += rng.integers(1, P + 1, B), jax.random.key(seed)
    return arguments, dict(max_tokens=T, vocab=VOCAB, eos=(EOS,), pad=PAD) | options


CASES = {
    "one model, warm": dict(count=1, B=3, n=4, temperature=1.7),
    "one model, greedy": dict(count=1, B=6, n=1, greedy=True),
    "mixture": dict(count=2, B=3, n=3),
}


@pytest.mark.parametrize(
    ("name", "draft_tokens", "pass_tokens"),
    [("one model, warm", 7, 24), ("one model, greedy", 7, 1024), ("mixture", 3, 1024)],
)
def test_drafts_change_no_token(models, name, draft_tokens, pass_tokens, monkeypatch):
    """Nor a log-probability, in segments that grow and shrink against one; some are confirmed, many are not.

    With 24 tokens per pass three are drafted at first, and seven once three rows are left.
    """
    shape = dict(CASES[name])
    arguments, options = case(models[: shape.pop("count")], seed=len(name), **shape)
    plain = jax.tree.map(np.asarray, generate(*arguments, **options))
    monkeypatch.setattr(module, "LEAST_ROWS", 2)
    monkeypatch.setattr(module, "LEAST_CAPACITY", 8)
    monkeypatch.setattr(module, "LEAST_PARAMETERS", 0)
    hint = plain.tokens[:, 0]  # of one row of each prompt: right for it, and hardly for the others
    ours = jax.tree.map(
        np.asarray,
        generate(*arguments, **options, hint=hint, draft_tokens=draft_tokens, pass_tokens=pass_tokens),
    )
    np.testing.assert_array_equal(ours.tokens, plain.tokens)
    np.testing.assert_array_equal(ours.lengths, plain.lengths)
    np.testing.assert_allclose(ours.logprobs, plain.logprobs, atol=1e-4)
    assert (plain.steps == np.maximum(plain.lengths - 1, 0)).all()
    assert (ours.steps <= plain.steps).all() and ours.steps[:, 0].sum() < 0.6 * plain.steps[:, 0].sum()


@pytest.mark.parametrize("budget", [2, 48, 256, 512])
@pytest.mark.parametrize("drafts", [1, 7, 8, 64])
def test_caches_have_room_for_drafts_at_widths_that_need_no_padding(budget, drafts):
    sizes = module.cache_sizes(budget, drafts)
    assert sizes == sorted(set(sizes)) and len(sizes) <= 4
    assert sizes[-1] >= budget + drafts and all(size % 16 == 0 for size in sizes)


def test_a_million_drafted_tokens_have_the_models_frequencies():
    """χ² over all texts of three tokens, of which EOS ends some early; the second and third are drafted."""
    graph, params = tiny(6, 8, 1, seed=4)
    prompt, n, vocab = [2, 3, 4], 500_000, 5
    texts = np.array(list(itertools.product(range(vocab), repeat=3)))
    decoder, rows = nnx.merge(graph, params), np.array([[*prompt, *text] for text in texts])
    hidden = decoder(rows, np.full(len(rows), 6))[:, 2:5]
    logp = jax.nn.log_softmax(hidden @ decoder.head_weight()[:vocab].T)
    logp = np.take_along_axis(np.asarray(logp, np.float64), texts[..., None], -1)[..., 0]
    # A text that has ended is one text, whatever would follow.
    ended = np.cumsum(texts == EOS, -1) - (texts == EOS) > 0
    texts, chance = np.where(ended, PAD, texts), np.exp(np.where(ended, 0, logp).sum(-1))
    names, first = np.unique(texts @ [25, 5, 1], return_index=True)

    write = jax.jit(
        functools.partial(
            decode, (graph,), max_tokens=3, vocab=vocab, eos=(EOS,), pad=PAD, draft_tokens=2,
            hint=jnp.array([[3, 2, 4, 3]]),
        ),
        compiler_options={"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False},
    )  # fmt: skip
    rollout = write((params,), jnp.ones((1, n)), np.array([prompt]), np.array([3]), jax.random.key(7))
    tokens, lengths, steps = (np.asarray(x)[0] for x in (rollout.tokens, rollout.lengths, rollout.steps))
    assert lengths.sum() > 1e6 and 0.1 < (steps[lengths == 3] == 1).mean() < 0.9
    drawn, counts = np.unique(tokens @ [25, 5, 1], return_counts=True)
    found = np.zeros(len(names))
    found[np.searchsorted(names, drawn)] = counts
    assert np.isin(drawn, names).all() and chance[first].sum() == pytest.approx(1, abs=1e-5)
    assert chi_square_pvalue(found, n * chance[first]) > 1e-3
