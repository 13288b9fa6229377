"""Constrained decoding: masks against llguidance, jsonschema and the automaton, the sampler against enumeration."""

import dataclasses
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from flax import nnx
from small import small_config, start_from
from test_evaluate import save_random, settings
from test_rollout import chi_square_pvalue, tiny
from test_tasks import opened

from listopd_jax.data.tokenizer import load_tokenizer, train_tokenizer
from listopd_jax.errors import UserError
from listopd_jax.metrics_log import read_metrics
from listopd_jax.ops.grammar import DEAD, START, Grammar, allowed_tokens, states
from listopd_jax.records import FREE, Decoding, Result, read_results
from listopd_jax.report.inputs import Inputs
from listopd_jax.report.write import render, write_report
from listopd_jax.rollout import decode as module
from listopd_jax.rollout.decode import generate
from listopd_jax.rollout.sampling import unpacked
from listopd_jax.rollout.scoring import completion_hidden
from listopd_jax.stages.checkpoint import evaluate_checkpoint
from listopd_jax.stages.opd import sample
from listopd_jax.stages.pipeline import run_stages
from listopd_jax.stages.prepare import open_job
from listopd_jax.task.codec import Codec
from listopd_jax.task.contract import strict_parse
from listopd_jax.task.prompt import render_answer, review_ids
from listopd_jax.task.schema_masks import Schema, SchemaMasks
from listopd_jax.task.strict_json import loads
from listopd_jax.tasks.listwise import list_schema

pytest.importorskip("llguidance", reason="the extra 'constrained'")

PAD, EOS, V = 0, 1, 5
STEP = np.array([[0] * 5, [0, 0, 2, 3, 0], [0, 1, 0, 2, 3], [0, 4, 2, 0, 3], [0] * 5], np.int32)
GRAMMAR = Grammar(
    jnp.asarray(STEP), jnp.arange(V, dtype=jnp.int32), jnp.zeros(STEP.shape, bool)
)  # each token is a kind of its own


def host_masks(grammar=GRAMMAR):
    """What `grammar` lets through, as the host says it."""
    step, column = np.asarray(grammar.step), np.asarray(grammar.column)
    state = {}

    def masks(rows, last):
        bits = []
        for i, row in enumerate(rows.tolist()):
            state[row] = START if last is None else step[state[row], column[last[i]]]
            allowed = (step[state[row]] != DEAD)[column]
            allowed |= ~allowed.any()
            bits.append(np.packbits(np.pad(allowed, (0, -len(allowed) % 32)), bitorder="little"))
        return np.stack(bits).view(np.uint32)

    return masks


# --- the sampler


def renormalised(logp, allowed):
    """log of the distribution `logp` [V] over what is allowed, in float64."""
    p = np.where(allowed, np.exp(np.asarray(logp, np.float64)), 0)
    with np.errstate(divide="ignore", invalid="ignore"):  # nothing is allowed: NaN
        return np.log(p / p.sum())


@pytest.fixture(scope="module")
def texts():
    """A model of 5 tokens, a prompt, all texts of 3 tokens that GRAMMAR lets through, their log-probabilities."""
    model = tiny(6, 8, 1, seed=4)
    prompt, every = [2, 3, 4], np.array(list(itertools.product(range(V), repeat=3)))
    decoder = nnx.merge(*model)
    hidden = decoder(np.array([[*prompt, *t] for t in every]), np.full(len(every), 6))[:, 2:5]
    plain = np.asarray(jax.nn.log_softmax(hidden @ decoder.head_weight()[:V].T))
    found = {}
    for text, logp in zip(every.tolist(), plain, strict=True):
        state, said = START, []
        for t, token in enumerate(text):
            said.append(renormalised(logp[t], STEP[state] != DEAD)[token])
            state = STEP[state, token]
            if token == EOS:
                break
        if np.isfinite(said).all():
            found[tuple(text[: len(said)] + [PAD] * (3 - len(said)))] = [*said, *[0.0] * (3 - len(said))]
    assert sum(np.exp(np.sum(said)) for said in found.values()) == pytest.approx(1, abs=1e-6)
    return model, np.array([prompt]), found


@pytest.mark.parametrize("way", ["constraint", "drafts", "masks"])
def test_samples_and_log_probabilities_are_of_the_renormalised_model(texts, way):
    """χ² over all texts of three tokens that are allowed, and the sampler's log-probabilities of each."""
    (graph, params), prompt, found = texts
    n = 20_000
    constrained = {"masks": host_masks()} if way == "masks" else {"constraint": GRAMMAR}
    drafts = {"draft_tokens": 2, "hint": jnp.array([[3, 3, 4, 2]])} if way == "drafts" else {}
    rollout = generate(
        (graph,), (params,), jnp.ones((1, n)), prompt, np.array([3]), jax.random.key(5),
        max_tokens=3, vocab=V, eos=(EOS,), pad=PAD, **constrained, **drafts,
    )  # fmt: skip
    tokens = list(map(tuple, np.asarray(rollout.tokens)[0].tolist()))
    assert set(tokens) <= found.keys()
    np.testing.assert_allclose(np.asarray(rollout.logprobs)[0], [found[t] for t in tokens], atol=1e-4)
    counts = np.array([tokens.count(t) for t in found])
    assert chi_square_pvalue(counts, n * np.exp(np.sum(list(found.values()), -1))) > 1e-3


@pytest.mark.parametrize("greedy", [True, False])
def test_the_host_the_device_and_drafts_write_the_same(monkeypatch, greedy):
    """While rows leave and caches grow."""
    monkeypatch.setattr(module, "LEAST_ROWS", 2)
    monkeypatch.setattr(module, "LEAST_CAPACITY", 4)
    monkeypatch.setattr(module, "LEAST_PARAMETERS", 0)
    graph, params = tiny(6, 8, 1, seed=4)
    rng = np.random.default_rng(0)
    step = np.zeros((13, V), int)
    for state in range(START, 11):  # on to one of the next three; an end from the third on
        step[state] = np.where(rng.random(V) < 0.8, rng.integers(state + 1, min(state + 4, 12), V), DEAD)
        step[state, EOS] = 12 if state > 2 and rng.random() < 0.6 else DEAD
    step[11, EOS] = 12
    grammar = Grammar(jnp.asarray(step, jnp.int32), GRAMMAR.column, jnp.zeros(step.shape, bool))
    arguments = (
        (graph,),
        (params,),
        jnp.ones((1, 3)),
        rng.integers(V, size=(4, 3)),
        np.full(4, 3),
        jax.random.key(1),
    )
    options = dict(max_tokens=12, vocab=V, eos=(EOS,), pad=PAD, greedy=greedy)
    device = generate(*arguments, **options, constraint=grammar)
    host = generate(*arguments, **options, masks=host_masks(grammar), draft_tokens=3)
    drafted = generate(*arguments, **options, constraint=grammar, draft_tokens=3, hint=device.tokens[:, 0])
    for other in (host, drafted):
        np.testing.assert_array_equal(other.tokens, device.tokens)
        np.testing.assert_allclose(other.logprobs, device.logprobs, atol=1e-4)
    np.testing.assert_array_equal(host.steps, device.steps)
    assert len(set(np.asarray(device.lengths).ravel().tolist())) > 1


@pytest.mark.parametrize("vocab", [5, 32, 70])
def test_a_packed_mask_is_unpacked(vocab):
    mask = np.random.default_rng(vocab).random((3, 2, vocab)) < 0.5
    bits = np.packbits(np.pad(mask, ((0, 0), (0, 0), (0, -vocab % 32))), axis=-1, bitorder="little")
    np.testing.assert_array_equal(unpacked(jnp.asarray(bits.view(np.uint32)), vocab), mask)


# --- masks of schemas

K = 3
ORDER = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,5}$"},
        "count": {"type": "integer", "minimum": 1, "maximum": 40},
        "tags": {"type": "array", "items": {"enum": ["new", "used"]}, "maxItems": 3},
        "place": {"$ref": "#/$defs/place"},
    },
    "required": ["name", "count"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": ["object", "null"],
            "properties": {"city": {"const": "Oslo é"}},
            "additionalProperties": False,
        }
    },
}


def item(name):
    """The schema of the object of one id."""
    schema = list_schema(1, "review_id", 10)["items"]
    return schema | {"properties": schema["properties"] | {"review_id": {"const": name}}}


ORDERS = [list(map(item, order)) for order in itertools.permutations(review_ids(K))]
PERMUTATIONS = {"anyOf": [{"type": "array", "prefixItems": o, "items": False, "minItems": K} for o in ORDERS]}


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    answers = [render_answer((7, 10, 0)), json.dumps({"name": "Anna", "count": 3, "tags": ["new"]}), "Oslo é"]
    train_tokenizer(answers * 9, 400, folder)
    tokenizer = load_tokenizer(folder)
    return Codec(tokenizer, also_end=[tokenizer.pad_token_id])


@pytest.fixture(scope="module")
def compiler(codec):
    return SchemaMasks(codec.tokenizer, codec.vocab, codec.ends)


def walk(compiler, codec, schema, seed, see=lambda tokens, allowed: None, most=400):
    """A random answer under the masks of a schema, its end left out; `see` is told what may come at each step."""
    rng, tokens = np.random.default_rng(seed), []
    masks, row = compiler.rows([Schema(schema, "record 1")]), np.array([0])
    bits = masks(row, None)
    while len(tokens) < most:
        allowed = np.asarray(unpacked(bits, codec.vocab))[0]
        see(tokens, allowed)
        tokens.append(int(rng.choice(np.flatnonzero(allowed))))
        if tokens[-1] in codec.ends:
            return codec.text(tokens)
        bits = masks(row, np.array(tokens[-1:]))
    raise AssertionError("no end")


@pytest.mark.parametrize(
    "schema", [ORDER, list_schema(K, "passage_id", 4), PERMUTATIONS], ids=["order", "list", "ids"]
)
@pytest.mark.parametrize("seed", range(20))
def test_every_answer_under_masks_is_compact_json_that_the_schema_accepts(compiler, codec, schema, seed):
    text = walk(compiler, codec, schema, seed)
    value = loads(text)
    jsonschema.validate(value, schema)
    assert text == json.dumps(value, separators=(",", ":"), ensure_ascii=False) or "\\" in text


@pytest.mark.parametrize("schema", [ORDER, list_schema(K, "review_id", 10)], ids=["order", "list"])
def test_at_every_step_the_mask_is_llguidances_own(compiler, codec, schema):
    import llguidance

    tokenizer = llguidance.hf.from_tokenizer(codec.tokenizer, n_vocab=codec.vocab, eos_token=list(codec.ends))
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})

    def see(tokens, allowed):
        own = llguidance.LLMatcher(tokenizer, grammar)
        assert own.consume_tokens(tokens)
        assert (
            np.frombuffer(own.compute_logit_bias(), np.uint8)[: codec.vocab] > 0
        ).tolist() == allowed.tolist()

    for seed in range(5):
        walk(compiler, codec, schema, seed, see)


def test_the_automaton_allows_what_llguidance_allows_under_all_permutations(compiler, codec):
    """Two implementations of one contract: the ids once each, in any order.

    Where there is no choice but of spelling, llguidance takes the tokenizer's.
    """
    tables, seen = codec.automaton(K, compact=True), set()

    def see(tokens, allowed):
        state = START
        for token in tokens:
            state = int(tables.step[state, tables.column[token]])
        ours = (tables.step[state] != DEAD)[tables.column]
        assert (ours >= allowed).all() and (allowed.sum() == 1 or (ours == allowed).all()), codec.text(tokens)
        seen.add(state)

    texts = [walk(compiler, codec, PERMUTATIONS, seed, see) for seed in range(40)]
    assert all(strict_parse(text, review_ids(K)).ok for text in texts)
    assert len(seen) > 100


def test_rows_have_the_schemas_that_they_were_given(compiler, codec):
    schemas = [Schema({"const": text}, "record 1") for text in ("a", "b", "a")]
    masks = compiler.rows(schemas)
    said = [[], [], []]
    bits, rows = masks(np.arange(3), None), np.array([2, 0, 1])
    at = dict(zip(range(3), np.asarray(unpacked(bits, codec.vocab)), strict=True))
    while True:
        last = np.array([int(np.flatnonzero(at[row])[-1]) for row in rows.tolist()])
        for row, token in zip(rows.tolist(), last.tolist(), strict=True):
            said[row].append(token)
        going = np.array([token not in codec.ends for token in last])
        if not going.any():
            break
        rows = rows[going]
        found = np.asarray(unpacked(masks(rows, last[going]), codec.vocab))
        at = dict(zip(rows.tolist(), found, strict=True))
    assert list(map(codec.text, said)) == ['"a"', '"b"', '"a"']


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "string", "not": {"const": "a"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"type": "string", "pattern": "(a)\\1"}, "record 7"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_one_line(compiler, schema, why):
    with pytest.raises(UserError, match="record 7: llguidance") as error:
        compiler.compile(Schema(schema, "record 7"))
    assert why in str(error.value) and "\n" not in str(error.value)


def test_without_llguidance_there_is_one_line(codec, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install 'listopd_jax\[constrained\]'"):
        SchemaMasks(codec.tokenizer, codec.vocab, codec.ends)


# --- jobs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The tokenizer of a job and a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("made")
    open_job(settings(), folder / "workdir")
    return save_random(folder / "mine", load_tokenizer(folder / "workdir" / "tokenizer"))


def test_a_policy_is_evaluated_under_masks_beside_itself(checkpoint, tmp_path):
    """Random weights: nothing parses, until only the contract can be written."""
    room = {"task.max_response": 128}
    plain = evaluate_checkpoint(settings(**room), tmp_path / "plain", str(checkpoint))
    config = settings(**room, **{"evaluation.constrained": "schema,contract"})
    record = evaluate_checkpoint(config, tmp_path / "masks", str(checkpoint))
    assert dataclasses.replace(record, decodings=()) == plain and plain.parse == 0
    of = {d.decoding: d for d in record.decodings}
    assert list(of) == [FREE, "free_repaired", "schema", "schema_repaired", "contract"]
    assert (of[FREE].parse, of[FREE].failures, of[FREE].intervals["useful"]) == (
        plain.parse, plain.failures, plain.intervals["useful"],
    )  # fmt: skip
    assert of["contract"].parse == of["contract"].ended == of["schema"].ended == 1
    assert {name for name, n in of["schema"].failures.items() if n} <= {"ok", "duplicate_id"}
    assert of["schema"].parse <= of["schema_repaired"].parse
    assert all(of[name].ms_per_token > 0 for name in (FREE, "schema", "contract"))
    assert read_results(tmp_path / "masks" / "results.json") == [record]
    assert "decodings" not in json.loads((tmp_path / "plain" / "results.json").read_text())[0]


def replayed(job, name, rows, tokens):
    """What was allowed at each place of completions [N, T] of records `rows`: bool [N, T, V]."""
    if name == "contract":
        start = jnp.full(len(tokens), START)
        return np.asarray(allowed_tokens(job.compact_grammar, states(job.compact_grammar, start, tokens)))
    masks, every = job.constraint(name, "train", rows)["masks"], np.arange(len(tokens))
    found = [masks(every, None), *(masks(every, last) for last in tokens.T[:-1])]
    return np.stack([np.asarray(unpacked(bits, job.codec.vocab)) for bits in found], 1)


@pytest.mark.parametrize("name", ["schema", "contract"])
def test_constrained_rollouts_have_the_log_probabilities_of_the_renormalised_student(tmp_path, name):
    """At every position, against NumPy; so π_S/π_rollout, the ratio of a trainer, is the share that is allowed."""
    fields, n = {"opd.batch_size": 2, "opd.rollouts": 3, "task.max_response": 128}, 3
    job = open_job(settings(**fields), tmp_path)
    job.trained["student"], params = tiny(job.codec.vocab, 16, 1, seed=1)
    batch = next(job.opd_batches(0))
    prompts, lengths, rows = batch["prompt"], batch["prompt_length"], np.repeat(batch["index"], n).tolist()
    options = job.constraint(name, "train", batch["index"].tolist(), n)
    rollout = sample(job, params, prompts, lengths, jax.random.key(2), **options)
    tokens, ends = np.asarray(rollout.tokens).reshape(2 * n, -1), np.asarray(rollout.lengths).ravel()

    decoder = nnx.merge(job.trained["student"], params)
    hidden = completion_hidden(decoder, prompts, lengths, rollout.tokens).reshape(*tokens.shape, -1)
    logp = np.asarray(jax.nn.log_softmax(hidden @ decoder.head_weight()[: job.codec.vocab].T), np.float64)
    allowed = replayed(job, name, rows, tokens)
    share = np.where(allowed, np.exp(logp), 0).sum(-1)
    own = np.take_along_axis(logp, tokens[..., None], -1)[..., 0]
    written = np.arange(tokens.shape[1]) < ends[:, None]
    ours = np.asarray(rollout.logprobs).reshape(tokens.shape)
    assert np.take_along_axis(allowed, tokens[..., None], -1)[..., 0][written].all()
    np.testing.assert_allclose(ours[written], (own - np.log(share))[written], atol=1e-3)
    assert share[written].min() < 0.5, "the masks do something"
    said = {
        job.judge("train")(job.codec.text(t[:e].tolist()), r).failure
        for t, e, r in zip(tokens, ends, rows, strict=True)
    }
    assert said <= ({"ok"} if name == "contract" else {"ok", "duplicate_id"})


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"evaluation.constrained": "shema"}, "did you mean 'schema'"),
        ({"opd.constrained_rollouts": "free"}, "opd.constrained_rollouts='free'"),
        ({"evaluation.constrained": "contract", "task.name": "json", "data.path": "x"}, "use 'schema'"),
        ({"opd.constrained_rollouts": "schema", "opd.control_variate": "kl"}, "opd.control_variate"),
    ],
)
def test_a_constraint_that_makes_no_sense_is_refused(fields, what):
    with pytest.raises(UserError, match=what):
        settings(**fields)


def test_a_schema_that_cannot_be_kept_shows_before_anything_is_computed(tmp_path):
    lines = [
        {"prompt": f"{i}", "answer": [i], "schema": {"type": "array", "uniqueItems": True}} for i in range(9)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fields = {
        "task.name": "json",
        "data.path": str(tmp_path / "data.jsonl"),
        "evaluation.constrained": "schema",
    }
    with pytest.raises(UserError, match=r"record data.jsonl:[0-9]+: llguidance .*uniqueItems"):
        open_job(settings(**fields), tmp_path / "workdir")


def test_right_answers_that_are_masked_away_are_counted(tmp_path, caplog):
    """llguidance keeps fields in the order of the schema."""
    schema = {
        "type": "object",
        "properties": {"a": {}, "b": {}},
        "required": ["a"],
        "additionalProperties": False,
    }
    answers = [{"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1}, None]
    lines = [{"prompt": str(i), "answer": answers[i % 4], "schema": schema, "side": side}
             for i, side in enumerate(["train"] * 8 + ["validation"] * 4)]  # fmt: skip
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fields = {"task.name": "json", "data.path": str(tmp_path / "data.jsonl"), "data.split_field": "side"}
    open_job(settings(**fields, **{"opd.constrained_rollouts": "schema"}), tmp_path / "workdir")
    assert "masks 2 of 8 right answers of train away" in caplog.text


def test_a_task_without_a_schema_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("listopd_jax.tasks.listwise.Listwise.schema", lambda task, record: None)
    with pytest.raises(UserError, match="define Task.schema"):
        open_job(settings(**{"evaluation.constrained": "schema"}), tmp_path)


def test_a_whole_job_is_trained_and_evaluated_under_masks(finished_job, tmp_path):
    """Of models that have hardly learnt anything every answer keeps the schema."""
    fields = {"opd.constrained_rollouts": "schema", "evaluation.constrained": "schema", "opd.lambdas": (1.0,)}
    fields |= {"opd.advantage": "no_base"}  # nothing to forecast
    run_stages(small_config(**start_from(finished_job), **fields), tmp_path)
    steps = read_metrics(tmp_path)
    assert [row["ended"] for row in steps if row["stage"] == "opd"] == [1, 1, 1]
    trained = read_results(tmp_path / "results.json")
    for record in trained:
        under = next(d for d in record.decodings if d.decoding == "schema")
        assert under.ended == 1 and under.failures["ok"] + under.failures["duplicate_id"] == under.n
    assert [record.stage for record in trained] == ["sft_teacher", "sft_student", "opd", "opd"]
    assert "Constrained decoding" in write_report(tmp_path).read_text()


def test_the_report_has_a_row_a_decoding_and_trusts_none_of_them():
    rows = (
        Decoding(
            decoding=FREE, parse=0.335, useful=0.3, ms_per_token=2.5, failures={"ok": 67, "no_json": 133}
        ),
        Decoding(decoding="schema_repaired", parse=1.0, useful=0.823, failures={"ok": 200, "no_json": 0}),
        Decoding(decoding="<b>", parse=None),
    )
    page = render(Inputs(results=[Result(stage="sft_student", parse=0.335, decodings=rows)]))
    for text in ("unconstrained", "JSON Schema, repaired", "2.500", "133 no json", ".823", "&lt;b&gt;"):
        assert text in page
    assert "<b>" not in page
    assert "Constrained decoding" not in render(Inputs(results=[Result(stage="sft_student", parse=0.335)]))


# --- published tasks


def test_the_right_answers_of_published_tasks_are_never_masked_away(shared, compiler, codec, tmp_path):
    data = shared / "data"
    calls = {"data.path": data / "bfcl" / "BFCL_v4_simple_python.json"}
    calls["data.labels"] = data / "bfcl" / "possible_answer_BFCL_v4_simple_python.json"
    texts = {
        "data.path": data / "cranfield" / "cran.all.1400",
        "data.meta_path": data / "cranfield" / "cran.qry",
    }
    texts["data.labels"] = data / "cranfield" / "cranqrel"
    for name, files in (("bfcl", calls), ("cranfield", texts)):
        task, splits = opened(name, tmp_path / name, **files)
        answered = [r for r in (*splits.train, *splits.validation) if task.answer(r) is not None]
        assert len(answered) > 200
        for record in answered:
            ids = codec.tokenizer.encode(task.answer(record), add_special_tokens=False)
            matcher = compiler.compile(Schema(task.schema(record), record.key))
            assert matcher.consume_tokens(ids) and matcher.is_accepting(), record.key
