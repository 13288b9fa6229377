"""Expected scores under the right answer's skeleton, against whole answers scored one by one."""

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
from listopd_jax.stages.expected import expected_scores, forced_answers
from listopd_jax.task.codec import Codec
from listopd_jax.task.prompt import render_answer

TRUE = np.array([[7, 10], [1, 0], [10, 3]], np.float32)
WIDTH = 64


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Teacher and base, a codec, and a batch of ragged prompts of three lists, the last twice to fill it up."""
    texts = [render_answer((7, 10))] * 3
    codec = Codec(train_tokenizer(texts, 290, tmp_path_factory.mktemp("t") / "t"))
    shapes = [ModelConfig(codec.vocab, 32, 48, layers, 2, 1, 16) for layers in (2, 1)]
    decoders = [Decoder(shape, rngs=nnx.Rngs(seed)) for seed, shape in enumerate(shapes)]
    for d in decoders:  # peaked distributions
        nnx.update(d, nnx.map_state(lambda p, v: v.replace(3 * v[...]) if v.ndim > 1 else v, nnx.state(d)))
    batch = {
        "prompt": np.random.default_rng(0).integers(2, codec.vocab, (4, 9)).astype(np.int32),
        "prompt_length": np.array([9, 4, 6, 6], np.int32),
        "index": np.array([2, 0, 1, 1], np.int32),
    }
    batch["prompt"][3] = batch["prompt"][2]
    return decoders, codec, batch


def distributions(decoder, prompt, answer):
    """log π before each token of `answer` after `prompt`, float64."""
    tokens = [*prompt, *answer]
    padded = np.pad(tokens, (0, WIDTH - len(tokens)))
    hidden = decoder(jnp.asarray(padded[None]), jnp.array([len(tokens)]))[
        0, len(prompt) - 1 : len(tokens) - 1
    ]
    logits = np.asarray(hidden @ decoder.head_weight().T, np.float64)
    return logits - np.logaddexp.reduce(logits, -1, keepdims=True)


def slow_mean(decoders, codec, prompt, true, i, lam_at):
    """Σ s P(s) / Σ P(s): each score's tokens read one by one, and after a 1 that it does not go on."""
    encode = lambda scores: codec.tokenizer.encode(render_answer(scores), add_special_tokens=False)  # noqa: E731
    answers = [encode([*true[:i], s, *true[i + 1 :]]) for s in range(11)]
    start = next(n for n, (a, b) in enumerate(zip(answers[3], answers[4], strict=True)) if a != b)
    logp = [
        lam_at(answers[1], *(distributions(d, prompt, answers[1]) for d in decoders), n)
        for n in (start, start + 1)
    ]
    p = np.array([np.exp(logp[0][answer[start]]) for answer in answers])
    zero = np.exp(logp[1][answers[10][start + 1]])
    p[1], p[10] = p[1] * (1 - zero), p[1] * zero
    return (p * np.arange(11)).sum() / p.sum()


def mixed(lam):
    def at(answer, teacher, base, n):
        logits = lam * teacher[n] + (1 - lam) * base[n]
        return logits - np.logaddexp.reduce(logits)

    return at


def test_they_are_the_means_over_answers_scored_one_by_one(setting):
    decoders, codec, batch = setting
    graphdefs, params = zip(*(nnx.split(d) for d in decoders), strict=True)
    forced, lam = forced_answers(TRUE, codec), jnp.array([1.0, 2.0])
    found = expected_scores(graphdefs, params, jnp.stack([lam, 1 - lam]), [batch], forced, codec.vocab)
    assert found.shape == (2, 3, 2) and np.ptp(found) > 1
    for row in range(3):
        prompt, index = batch["prompt"][row, : batch["prompt_length"][row]], batch["index"][row]
        for i in range(2):
            true = TRUE[index].astype(int).tolist()
            wanted = [slow_mean(decoders, codec, prompt, true, i, mixed(x)) for x in (1.0, 2.0)]
            np.testing.assert_allclose(found[:, index, i], wanted, rtol=1e-4)


def test_under_a_guard_they_are_of_each_positions_own_lambda(setting):
    decoders, codec, batch = setting
    graphdefs, params = zip(*(nnx.split(d) for d in decoders), strict=True)
    automaton = codec.automaton(2)
    guard = Guard(jnp.float32(1.25), "teacher", Grammar(*map(jnp.asarray, automaton)), "structure")

    def own(answer, teacher, base, n):
        state = START
        for token in answer[:n]:
            state = automaton.step[state, automaton.column[token]]
        harmless = automaton.content[state][automaton.column] & (
            np.arange(codec.vocab) != teacher[n].argmax()
        )
        flip = oracles.flip_lambda(*(np.where(harmless, -np.inf, x[n]) for x in (teacher, base)))
        return mixed(2.0 if flip >= 2.5 else 1.0)(answer, teacher, base, n)

    forced = forced_answers(TRUE, codec)
    lam = jnp.array([[2.0], [-1.0]])
    found = expected_scores(graphdefs, params, lam, [batch], forced, codec.vocab, guard)[0]
    prompt, true = batch["prompt"][0, :9], TRUE[2].astype(int).tolist()
    wanted = [slow_mean(decoders, codec, prompt, true, i, own) for i in range(2)]
    np.testing.assert_allclose(found[2], wanted, rtol=1e-4)


def test_the_skeleton_is_the_right_answer_but_for_the_score_that_is_asked_for(setting):
    codec = setting[1]
    forced = forced_answers(TRUE, codec)
    for scores, row, places in zip(TRUE.astype(int).tolist(), forced.tokens, forced.place, strict=True):
        for i, (tokens, place) in enumerate(zip(row.tolist(), places, strict=True)):
            text = render_answer([*scores[:i], 1, *scores[i + 1 :]])
            assert codec.text([t for t in tokens if t != codec.pad]) == text
            assert (
                codec.text(tokens[:place]) == text[: text.index(f'"r{i + 1}"') + len(f'"r{i + 1}","score":')]
            )
