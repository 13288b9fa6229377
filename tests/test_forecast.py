"""The training-free forecast: greedy decoding from the extrapolated target, for a grid of λ and models of two sizes."""

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

from listopd_jax.data.tokenizer import train_tokenizer
from listopd_jax.models.config import ModelConfig
from listopd_jax.models.decoder import Decoder
from listopd_jax.ops.grammar import START, Grammar
from listopd_jax.ops.guard import Guard
from listopd_jax.stages.evaluate import greedy_answers
from listopd_jax.task.codec import Codec
from listopd_jax.task.contract import Parsed

LAMBDAS = [0.5, 1.0, 1.7]
WIDTH = 16  # of the longest sequence, so that it takes one program


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Teacher and base of different sizes, a codec, and one batch of ragged prompts whose last row is a filler."""
    tokenizer = train_tokenizer(
        ['[{"review_id":"r1","score":7}]'] * 3, 280, tmp_path_factory.mktemp("t") / "t"
    )
    codec = Codec(tokenizer)
    shapes = [ModelConfig(codec.vocab, 32, 48, layers, 2, 1, 16) for layers in (2, 1)]
    decoders = [Decoder(shape, rngs=nnx.Rngs(seed)) for seed, shape in enumerate(shapes)]
    rng = np.random.default_rng(0)
    batch = {
        "prompt": rng.integers(2, codec.vocab, (3, 9)).astype(np.int32),
        "prompt_length": np.array([9, 4, 6], np.int32),
        "index": np.array([5, 3, 3], np.int32),
        "weight": np.array([1, 1, 0], np.float32),
    }
    return decoders, codec, batch


def decoding(codec):
    return dict(max_tokens=6, vocab=codec.vocab, eos=codec.ends, pad=codec.pad)


def judge(text, row):
    return Parsed("ok", (row, text))


@nnx.jit
def hidden_states(decoder, tokens, length):
    return decoder(tokens[None], length[None])[0]


def target_greedy(decoders, lam, prompt, codec, steps, guarded=lambda written, logps, lam: lam):
    """Brute force: the whole sequence through both models for every token; `guarded` gives each position its λ."""
    tokens = list(prompt)
    for _ in range(steps):
        logps, padded = [], np.pad(tokens, (0, WIDTH - len(tokens)))
        for d in decoders:
            hidden = hidden_states(d, padded, np.int32(len(tokens)))[len(tokens) - 1]
            logits = np.asarray(hidden @ d.head_weight().T, np.float64)
            logps.append(logits - np.logaddexp.reduce(logits))
        own = guarded(tokens[len(prompt) :], logps, lam)
        tokens.append(int(np.argmax(own * logps[0] + (1 - own) * logps[1])))
        if tokens[-1] in codec.ends:
            break
    return tokens[len(prompt) :]


def test_every_lambda_is_decoded_from_its_own_target(setting):
    decoders, codec, batch = setting
    graphdefs, params = zip(*(nnx.split(d) for d in decoders), strict=True)
    lam = jnp.array(LAMBDAS)
    columns = greedy_answers(
        graphdefs, params, jnp.stack([lam, 1 - lam]), [batch], codec, decoding(codec), judge
    )
    assert [[a.index for a in column] for column in columns] == [[5, 3]] * len(LAMBDAS), "no filler rows"
    for value, column in zip(LAMBDAS, columns, strict=True):
        for row, answer in enumerate(column):
            prompt = batch["prompt"][row, : batch["prompt_length"][row]].tolist()
            tokens = target_greedy(decoders, value, prompt, codec, 6)
            assert answer.parsed.value == (answer.index, answer.text), "judged by its own row"
            assert answer.text == codec.text(tokens) and answer.ended == (tokens[-1] in codec.ends)


def test_lambda_one_is_the_teacher(setting):
    decoders, codec, batch = setting
    graphdefs, params = zip(*(nnx.split(d) for d in decoders), strict=True)
    (target,) = greedy_answers(
        graphdefs, params, jnp.array([[1.0], [0.0]]), [batch], codec, decoding(codec), judge
    )
    (teacher,) = greedy_answers(
        graphdefs[:1], params[:1], jnp.ones((1, 1)), [batch], codec, decoding(codec), judge
    )
    assert target == teacher


def tables(codec, seed):
    """A grammar of five states whose content is drawn: whatever it says, decoding must follow it."""
    rng = np.random.default_rng(seed)
    arrays = rng.integers(0, 5, (5, 3)), rng.integers(0, 3, codec.vocab), rng.random((5, 3)) < 0.5
    return [np.asarray(x, t) for x, t in zip(arrays, (np.int32, np.int32, bool), strict=True)]


@pytest.mark.parametrize("draft_tokens", [0, 3])
@pytest.mark.parametrize("scope", ["all", "structure"])
def test_under_a_guard_every_position_is_decoded_at_its_own_lambda(setting, scope, draft_tokens):
    decoders, codec, batch = setting
    graphdefs, params = zip(*(nnx.split(d) for d in decoders), strict=True)
    step, column, content = tables(codec, seed=1)
    lams = []

    def guarded(written, logps, lam):
        state = START
        for token in written:
            state = step[state, column[token]]
        harmless = content[state][column] & (scope == "structure")
        others = harmless & (np.arange(codec.vocab) != np.argmax(logps[0]))
        flip = oracles.flip_lambda(*(np.where(others, -np.inf, x[: codec.vocab]) for x in logps))
        lams.append(lam if 1.2 * lam <= flip else 1.0)
        return lams[-1]

    grammar = Grammar(*map(jnp.asarray, (step, column, content))) if scope == "structure" else None
    guard, lam = Guard(jnp.float32(1.2), "teacher", grammar, scope), jnp.array([1.0, 6.0])
    how = decoding(codec) | {"draft_tokens": draft_tokens}
    columns = greedy_answers(
        graphdefs, params, jnp.stack([lam, 1 - lam]), [batch], codec, how, judge, guard=guard
    )
    for value, answers in zip((1.0, 6.0), columns, strict=True):
        for row, answer in enumerate(answers):
            prompt = batch["prompt"][row, : batch["prompt_length"][row]].tolist()
            assert answer.text == codec.text(target_greedy(decoders, value, prompt, codec, 6, guarded))
    assert set(lams) >= {1.0} and (6.0 in lams or scope == "all")
