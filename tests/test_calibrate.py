"""Calibration: against full softmaxes and decoding from the target, and on positions with known answers."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import oracles
import pytest
from flax import nnx

from listopd_jax.models.config import ModelConfig
from listopd_jax.models.decoder import Decoder
from listopd_jax.ops.guard import flip_lambda
from listopd_jax.ops.opd_loss import Frozen
from listopd_jax.records import read_calibration
from listopd_jax.rollout.decode import generate
from listopd_jax.stages import positions as module
from listopd_jax.stages.calibrate import calibrate_forecasts, calibrate_stage
from listopd_jax.stages.evaluate import Answer
from listopd_jax.stages.positions import Positions, measure
from listopd_jax.stages.thresholds import calibrate, forecast_row
from listopd_jax.task.contract import TOKEN_CLASSES
from listopd_jax.theory import thresholds

VOCAB, EOS, PAD = 16, 1, 0
B, P, T = 4, 6, 7
LENGTHS = np.array([6, 2, 5, 3], np.int32)
COMMA, DIGIT, BRACKET = (TOKEN_CLASSES.index(name) for name in ("comma", "digit", "bracket"))


def tiny(vocab_size, hidden_size, num_layers, seed):
    config = ModelConfig(vocab_size, hidden_size, 2 * hidden_size, num_layers, 4, 2, 8, tied=True)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    return graphdef, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.6, x.shape), x.dtype), shapes)


def classes(tokens, lengths):
    """Even tokens are commas, odd ones digits."""
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    return np.where(inside, np.where(tokens % 2, DIGIT, COMMA), -1)


DECODING = dict(max_tokens=T, vocab=VOCAB, eos=(EOS,), pad=PAD)
CODEC = types.SimpleNamespace(
    vocab=VOCAB, ends=(EOS,), pad=PAD, classes=classes, text=lambda ids: str(ids[0])
)


@pytest.fixture(scope="module")
def models():
    """(graphdef, params) of a teacher and of a smaller base with another padded vocabulary."""
    return tiny(24, 24, 2, seed=1), tiny(20, 16, 1, seed=0)


@pytest.fixture(scope="module")
def batch():
    rows = np.random.default_rng(2).integers(2, VOCAB, size=(B, P)).astype(np.int32)
    index, weight = np.array([5, 0, 3, 0], np.int32), np.array([1, 1, 1, 0], np.float32)
    return {"prompt": rows, "prompt_length": LENGTHS, "index": index, "weight": weight}


def look(models, batch, chunk=5):
    (graph_t, teacher), (graph_b, base) = models
    return measure({"teacher": graph_t, "student": graph_b}, teacher, base, [batch], CODEC, DECODING, chunk)


@pytest.fixture(scope="module")
def measured(models, batch):
    return look(models, batch)


def greedy(models, weights, batch):
    graphdefs, params = zip(*models, strict=True)
    options = dict(greedy=True, **DECODING)
    key, weights = jax.random.key(0), jnp.asarray(weights, jnp.float32)
    rollout = generate(graphdefs, params, weights, batch["prompt"], LENGTHS, key, **options)
    return np.asarray(rollout.tokens), np.asarray(rollout.lengths)


def full_log_probs(model, batch, tokens, lengths):
    """log π [positions, VOCAB] in float64 by one plain pass over each whole sequence, real rows only."""
    graphdef, params = model
    rows = np.zeros((B, P + T), np.int32)
    for b, n in enumerate(LENGTHS):
        rows[b, :n], rows[b, n : n + T] = batch["prompt"][b, :n], tokens[b]
    decoder = nnx.merge(graphdef, params)
    hidden = np.asarray(decoder(jnp.asarray(rows), jnp.asarray(LENGTHS + T)), np.float64)
    logits = hidden @ np.asarray(decoder.head_weight(), np.float64)[:VOCAB].T
    at = [(b, n - 1 + t) for b, n in enumerate(LENGTHS[:3]) for t in range(lengths[b])]
    logits = np.stack([logits[i] for i in at])
    return logits - np.logaddexp.reduce(logits, -1)[:, None]


def test_measure_agrees_with_full_softmaxes(models, batch, measured):
    tokens, lengths = (x[:, 0] for x in greedy(models[:1], np.ones((1, 1)), batch))
    log_t, log_b = (full_log_probs(m, batch, tokens, lengths) for m in models)
    mode = log_t.argmax(-1)
    every = np.arange(len(mode))
    np.testing.assert_allclose(measured.p, np.exp(log_t[every, mode]), rtol=1e-4)
    np.testing.assert_allclose(measured.b, np.exp(log_b[every, mode]), rtol=1e-4)
    np.testing.assert_allclose(measured.log_ratio, (log_t - log_b)[every, mode], atol=1e-4)
    oracle = oracles.log_odds(log_t, mode)
    np.testing.assert_allclose(measured.logit_p, oracle, rtol=1e-4, atol=1e-4)
    flip = oracles.flip_lambda(log_t, log_b)
    np.testing.assert_allclose(1 / measured.flip, 1 / flip, atol=1e-4)
    assert np.isfinite(flip).any()
    written = np.concatenate([tokens[i, : lengths[i]] for i in range(3)])
    np.testing.assert_array_equal(written, mode)
    np.testing.assert_array_equal(measured.token_class, np.where(written % 2, DIGIT, COMMA))
    np.testing.assert_array_equal(measured.prompt, np.repeat([5, 0, 3], lengths[:3]))


def test_measure_does_not_depend_on_the_chunk(models, batch, measured):
    for a, b in zip(look(models, batch, chunk=1024), measured, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_lists_with_a_flip_are_those_that_the_target_answers_differently(models, batch, measured):
    lambdas = (1.05, 1.1, 1.3, 1.7, 2.5, 3.0)
    tokens, _ = greedy(models, np.array([lambdas, 1 - np.array(lambdas)]), batch)
    alone, _ = greedy(models[:1], np.ones((1, 1)), batch)
    changed = (tokens != alone).any(-1)[:3]
    curve = calibrate(measured, 5.0, tau=0.1, bootstrap=0).curve
    np.testing.assert_allclose([x.all for x in curve if x.lam in lambdas], changed.mean(0))
    assert 0 < changed.mean() < 1


LAMBDAS = (1.0, 1.7, 2.5)


@pytest.fixture(scope="module")
def forecast(models, batch):
    """(tokens, lengths) of the greedy answers at LAMBDAS."""
    return greedy(models, np.array([LAMBDAS, 1 - np.array(LAMBDAS)]), batch)


def test_along_the_forecasts_answers_lambda_flip_is_that_of_full_softmaxes(models, batch, forecast):
    tokens, lengths = forecast
    graphdefs, params = zip(*models, strict=True)
    parts = module.along(graphdefs, params, batch, tokens, lengths, CODEC, chunk=5)
    alone = greedy(models[:1], np.ones((1, 1)), batch)[0][:3, 0]
    for i, (lam, found) in enumerate(zip(LAMBDAS, parts, strict=True)):
        log_t, log_b = (full_log_probs(m, batch, tokens[:, i], lengths[:, i]) for m in models)
        np.testing.assert_array_equal(found.token, log_t.argmax(-1))
        np.testing.assert_allclose(1 / found.flip, 1 / oracles.flip_lambda(log_t, log_b), atol=1e-4)
        structural = (found.token % 2 == 0) | (found.written % 2 == 0)
        np.testing.assert_array_equal(found.token_class, np.where(structural, COMMA, DIGIT))
        np.testing.assert_array_equal(
            found.token != found.written, found.flip < lam, "it leaves the mode where that flips"
        )
        row = forecast_row(lam, found)
        assert row.agreement == (tokens[:3, i] == alone).all(-1).mean()
        first = [found.flip[(found.prompt == p) & structural].min(initial=np.inf) for p in (0, 3, 5)]
        assert row.flipped == np.mean(np.array(first) < lam)
        assert row.min == (pytest.approx(min(first)) if np.isfinite(min(first)) else None)
    assert forecast_row(1.0, parts[0]).agreement == 1 and forecast_row(1.0, parts[0]).flipped == 0


def test_a_position_is_structural_if_the_teachers_token_or_the_one_in_its_place_is():
    """The teacher's is judged after what was written before it."""
    seen = []

    def classes(tokens, lengths):
        seen.append(tokens.tolist())
        return np.where(tokens % 2, DIGIT, COMMA)

    answers, modes = np.array([[4, 6, 7, 9]]), np.array([[4, 7, 8, 5]])
    found = module._classes(types.SimpleNamespace(classes=classes), answers, modes, np.array([4]))
    assert seen == [answers.tolist(), [[4, 7]], [[4, 6, 8]], [[4, 6, 7, 5]]]
    assert found.tolist() == [[COMMA, COMMA, COMMA, DIGIT]]


def test_flip_and_log_odds_agree_with_the_theory_on_any_distributions():
    rng = np.random.default_rng(0)
    log_t, log_b = np.log(rng.dirichlet(np.full(9, 0.3), size=(2, 300)) + 1e-12)
    log_b[0] = log_t[0]  # one model: no rival
    log_t[1, :2] = log_t[1].max() + 1.0  # a tie of the teacher's
    log_t[2, 3], log_b[2, 3] = -np.inf, -np.inf  # forbidden by both
    log_b[3, log_t[3].argsort()[-2]] = -np.inf  # a rival that only the base forbids
    log_t, log_b = (x.astype(np.float32) for x in (log_t, log_b))
    mode = jnp.asarray(log_t.argmax(-1))
    flip = flip_lambda(jnp.asarray(log_t), jnp.asarray(log_b), mode)
    np.testing.assert_allclose(1 / flip, 1 / oracles.flip_lambda(log_t, log_b), atol=1e-4)
    assert np.isinf(flip[0]) and flip[3] <= 1
    odds = module._log_odds(jnp.asarray(log_b), mode)
    np.testing.assert_allclose(odds, oracles.log_odds(log_b, mode), rtol=1e-4, atol=1e-4)


def test_log_odds_keep_digits_where_p_rounds_to_one():
    logits = jnp.array([[40.0, 0.0, 0.0]])
    odds = module._log_odds(jax.nn.log_softmax(logits), jnp.array([0]))
    np.testing.assert_allclose(odds, 40 - np.log(2), rtol=1e-6)


# ---- positions made by hand


def logit(p):
    with np.errstate(divide="ignore"):
        return np.log(p) - np.log1p(-np.asarray(p, float))


def positions(p, b, flip=np.inf, token_class=COMMA, prompt=0):
    columns = np.broadcast_arrays(logit(p), logit(b), flip, token_class, prompt, 0, 0)
    return Positions(*(np.atleast_1d(x) for x in columns))


@pytest.mark.parametrize(
    ("p", "b", "c", "lam", "digits"),
    [(0.9993, 0.8105, 5, 1.2771, 4), (0.9993, 0.99, 5, 1.6033, 4), (0.9993, 0.81, 1.5, 1.070, 3)]
    + [(0.9993, 0.5, 5, 1.2216, 4), (0.9984, 0.81, 5, 1.32, 2), (0.99996, 0.8105, 5, 1.186, 3)],
)
def test_the_table_of_ec(p, b, c, lam, digits):
    found = calibrate(positions(np.full(6, p), b, prompt=[0, 0, 0, 1, 1, 1]), c, bootstrap=50)
    for name in ("typ_measured", "typ_implied", "safe_measured", "safe_implied"):
        assert getattr(found, f"lambda_{name}") == pytest.approx(lam, abs=0.5 * 10**-digits)
    assert found.b_implied == pytest.approx(b) and found.p_typ == pytest.approx(p)
    np.testing.assert_allclose(found.intervals["lambda_typ_measured"], found.lambda_typ_measured)
    assert found.classes[0].lam == pytest.approx(found.lambda_typ_measured)


def test_the_aggregators_of_p_and_b():
    p = np.array([0.99, 0.95, 0.97, 0.999, 0.6])  # the last one is below τ
    b = np.array([0.9, 0.8, 0.7, 0.6, 0.95])
    found = calibrate(positions(p, b, prompt=[0, 0, 1, 1, 1], token_class=[COMMA] * 3 + [DIGIT] * 2), 5.0)
    kept = p[:4]
    typ = (kept[:2].mean() + kept[2:].mean()) / 2
    assert (found.positions, found.kept, found.prompts) == (5, 4, 2)
    assert found.p_typ == pytest.approx(typ)
    assert found.p_safe == pytest.approx(kept[2:].mean())
    assert found.p_max == pytest.approx(0.999) and found.p_min == pytest.approx(0.95)
    assert found.p_geometric_mean == pytest.approx(np.exp(np.log(kept).mean()))
    assert found.p_percentile_5 == pytest.approx(np.percentile(kept, 5))
    assert found.b_measured == pytest.approx(b[:4].mean())
    assert found.b_implied == pytest.approx(typ * np.exp(-np.log(kept / b[:4]).mean()))
    safe = thresholds.clip_safe_lambda(found.p_safe, found.b_implied, 5)
    assert found.lambda_safe_implied == pytest.approx(safe)
    digit = next(row for row in found.classes if row.token_class == "digit")
    assert (digit.positions, digit.kept, digit.p) == (2, 1, pytest.approx(0.999))
    assert "Only 2 prompts" in found.notes[0]
    json.dumps(found.to_json(), allow_nan=False)


def test_thresholds_next_to_one_keep_their_digits():
    P, Bl = np.array([30.0, 45.0]), np.array([20.0, 20.0])
    flat = np.zeros(2, int)
    found = calibrate(Positions(P, Bl, np.full(2, np.inf), flat, np.arange(2), flat, flat), 5.0)
    tail = thresholds.probability(-P).mean()  # p_typ itself is 1 but for its last digits
    expected = thresholds.clip_safe_lambda_log_odds(-np.log(tail), 20.0, 5.0)
    assert found.lambda_typ_measured == pytest.approx(expected, rel=1e-9)
    assert found.p_max == 1.0 and found.lambda_safe_measured == pytest.approx(1 + np.log(5) / 25, rel=1e-9)


def test_flips_by_list_and_by_class():
    flip = [1.3, 1.1, np.inf, 2.0, np.inf, np.inf]
    kind = [COMMA, DIGIT, COMMA, BRACKET, COMMA, COMMA]
    at = positions(np.full(6, 0.95), 0.5, flip, kind, [0, 0, 1, 1, 2, 3])
    found = calibrate(at, 5.0)
    curve = [point for point in found.curve if point.lam in (1.0, 1.1, 1.2, 1.5, 3.0)]
    structural, every = found.flips
    assert (structural.min, structural.percentile_25, structural.percentile_50) == (1.3, 1.3, 2.0)
    assert (every.min, every.never, structural.never) == (1.1, 0.5, 0.5)
    assert [x.structural for x in curve] == [0, 0, 0, 0.25, 0.5]
    assert [x.all for x in curve] == [0, 0, 0.25, 0.25, 0.5]
    rows = {row.token_class: row for row in found.classes}
    assert list(rows) == ["bracket", "comma", "digit"]
    assert rows["comma"].flip_min == 1.3 and rows["comma"].flip_percentile_50 is None


def test_flips_count_where_the_teacher_is_unsure():
    found = calibrate(positions([0.95, 0.684], [0.5, 0.988], [np.inf, 1.226]), 5.0)
    assert found.kept == 1 and found.flips[0].min == 1.226


@pytest.mark.parametrize(
    ("at", "clip", "name", "why"),
    [
        (positions([0.6, 0.7], 0.5), 5.0, "lambda_typ_measured", "no position has p ≥ 0.9"),
        (positions([1.0, 1.0], 0.5), 5.0, "lambda_typ_measured", "strictly between 0 and 1"),
        (positions([0.99, 0.99], [0.0, 0.0], prompt=[0, 1]), 5.0, "lambda_typ_implied", "strictly between"),
        (positions([0.95, 0.96], 0.99), 5.0, "lambda_typ_measured", "b < p"),
        (positions([0.99, 0.99], 0.5), np.inf, "lambda_safe_measured", "without a clip"),
        (positions([0.99, 0.99], 0.5), 0.8, "lambda_safe_measured", "c > 1"),
    ],
)
def test_what_is_undefined_is_null_with_its_reason(at, clip, name, why):
    found = calibrate(at, clip, bootstrap=100)
    assert getattr(found, name) is None and why in found.reasons[name]
    assert found.intervals.get(name) is None
    json.dumps(found.to_json(), allow_nan=False)


def test_a_single_impossible_base_does_not_spoil_the_measured_reading():
    found = calibrate(positions([0.99, 0.98], [0.0, 0.8], prompt=[0, 1]), 5.0, bootstrap=200)
    assert found.b_measured == pytest.approx(0.4) and found.lambda_typ_measured > 1
    assert found.b_implied == 0 and found.lambda_typ_implied is None
    assert found.intervals["lambda_typ_implied"] is None


@pytest.mark.parametrize(("clip", "tau"), [(0.0, 0.9), (5.0, 1.0), (float("nan"), 0.9)])
def test_impossible_arguments_are_refused(clip, tau):
    with pytest.raises(ValueError, match="must be positive"):
        calibrate(positions([0.99], 0.5), clip, tau)


def test_nothing_measured_is_refused():
    with pytest.raises(ValueError, match="no positions"):
        calibrate(positions([], []), 5.0)


def test_intervals_cover_and_narrow_with_prompts():
    rng = np.random.default_rng(3)

    def widths(n):
        p, b = 1 - rng.uniform(0.001, 0.05, n), rng.uniform(0.6, 0.9, n)
        found = calibrate(positions(p, b, prompt=np.arange(n)), 5.0, seed=1)
        for name in ("p_typ", "b_measured", "b_implied", "lambda_typ_measured", "lambda_typ_implied"):
            low, high = found.intervals[name]
            assert low < getattr(found, name) < high
        assert found.intervals["p_safe"][1] == pytest.approx(found.p_safe)
        assert any("prompts" in note for note in found.notes) == (n < 200)
        low, high = found.intervals["lambda_typ_measured"]
        return high - low

    assert widths(1000) < 0.6 * widths(100)


def test_the_interval_is_that_of_a_plain_bootstrap():
    rng = np.random.default_rng(5)
    p = 1 - rng.uniform(0.001, 0.08, 60)
    found = calibrate(positions(p, 0.7, prompt=np.arange(60)), 5.0, bootstrap=4000)
    means = p[rng.integers(60, size=(4000, 60))].mean(1)
    np.testing.assert_allclose(found.intervals["p_typ"], np.percentile(means, [2.5, 97.5]), atol=6e-4)


# ---- the stage


def job_of(models, batch, workdir):
    (graph_t, _), (graph_b, _) = models
    opd = dict(head_chunk=8, clip=5.0, ratio="aspo", advantage="base_relative", estimator="sampled")
    sections = {"opd": opd, "evaluation": {"bootstrap": 50}, "forecast": {"batch_size": B}, "seed": 0}
    config = ml_collections.FrozenConfigDict(sections)
    graphs, calls = {"teacher": graph_t, "student": graph_b}, []

    def batches(size=0):
        calls.append(1)
        return [batch]

    return types.SimpleNamespace(
        workdir=workdir,
        config=config,
        graphs=graphs,
        codec=CODEC,
        decoding=DECODING,
        calls=calls,
        models=graphs,
        by_teacher=lambda size=0: [("teacher", batches())],
    )


def test_the_stage_writes_once_and_then_reads(models, batch, tmp_path):
    job, frozen = job_of(models, batch, tmp_path), Frozen(models[0][1], models[1][1])
    found = calibrate_stage(job, frozen)
    text = (tmp_path / "calibration.json").read_text("utf-8")
    assert json.loads(text) == found.to_json() and found.prompts == 3
    assert any("this run has aspo" in note for note in found.notes)
    assert {token.token_class for token in found.strip} <= {"comma", "digit"} and found.strip
    flips = [token.flip for token in found.strip if token.token_class == "comma" and token.flip is not None]
    assert min(flips, default=None) == found.flips[0].min  # the answer that flips first, of all
    assert calibrate_stage(job, frozen) == found and len(job.calls) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]


def test_the_forecasts_rows_are_added_and_replaced_by_lambda(models, batch, forecast, tmp_path):
    job, frozen = job_of(models, batch, tmp_path), Frozen(models[0][1], models[1][1])
    before, (tokens, lengths) = calibrate_stage(job, frozen), forecast
    columns = [
        [
            Answer(index, "", None, True, tuple(tokens[row, i, : lengths[row, i]].tolist()))
            for row, index in ((0, 5), (1, 0), (2, 3))
        ]
        for i in range(len(LAMBDAS))
    ]
    for some in (slice(1, 3), slice(0, 2)):
        calibrate_forecasts(job, frozen, LAMBDAS[some], columns[some])
    found = read_calibration(tmp_path / "calibration.json")
    assert dataclasses.replace(found, forecasts=()) == before, "nothing else changes"
    assert tuple(row.lam for row in found.forecasts) == LAMBDAS and found.forecasts[0].agreement == 1
    graphdefs, params = zip(*models, strict=True)
    parts = module.along(graphdefs, params, batch, tokens, lengths, CODEC, chunk=5)
    for row, part in zip(found.forecasts, parts, strict=True):
        oracle = forecast_row(row.lam, part)
        assert (row.agreement, row.flipped, row.never) == (oracle.agreement, oracle.flipped, oracle.never)
        assert row.min == pytest.approx(oracle.min, rel=1e-4)
