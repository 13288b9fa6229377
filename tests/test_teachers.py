"""Several teachers, each of its records, and prompts that teachers alone read: the update, then whole runs."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_opd_step import BASE, STUDENT, STUDENT_DEF, TEACHER, TEACHER_DEF, hyper, own, tiny
from test_reference import save_random

from configs.fashion import tiny as tiny_config
from listopd_jax.config import to_json, validate
from listopd_jax.data.tokenizer import load_tokenizer, train_tokenizer
from listopd_jax.errors import UserError
from listopd_jax.files import write_json
from listopd_jax.metrics_log import read_metrics
from listopd_jax.models.config import num_params
from listopd_jax.ops.objective import Variant
from listopd_jax.ops.opd_loss import Frozen, Models
from listopd_jax.parallel.mesh import AXES, make_mesh
from listopd_jax.plan.arithmetic import Layout, Load, memory_estimate, step_flops
from listopd_jax.plan.compile import compile_update, state_memory
from listopd_jax.plan.search import shapes_of
from listopd_jax.report.write import write_report
from listopd_jax.rollout.decode import Rollout
from listopd_jax.stages.evaluate import greedy_answers
from listopd_jax.stages.pipeline import frozen_models, run_stages
from listopd_jax.stages.prepare import job_on_mesh, open_job
from listopd_jax.train.opd_step import OpdBatch, make_opd_step
from listopd_jax.train.optimizer import init_state

# ---- the update

VOCAB = 16
EXPERTS = (tiny(18, 12, 1, seed=3), tiny(24, 16, 2, seed=5))
TEACHERS = ((TEACHER_DEF, TEACHER), *EXPERTS)
RECORD = optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda grads, state, params: (grads, grads),
)
VARIANTS = {
    "sampled": Variant(),
    "guarded": Variant("aspo", aggregate="sequence", normalize=True, guard="teacher", floor=1.0, flips=True),
    "controlled": Variant(control_variate="optimal"),
    "exact": Variant("none", estimator="full_vocab"),
}


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(3)
    prompts = rng.integers(VOCAB, size=(4, 6)).astype(np.int32)
    lengths = np.array([[5, 2], [1, 3], [4, 5], [2, 0]], np.int32)
    tokens = rng.integers(VOCAB, size=(4, 2, 5)).astype(np.int32)
    logprobs = (-3 * rng.random(tokens.shape)).astype(np.float32)
    return OpdBatch(prompts, np.array([6, 2, 3, 5], np.int32), Rollout(tokens, logprobs, lengths))


@functools.cache
def step_of(variant, microbatch, *teachers):
    graphs = Models(
        STUDENT_DEF, TEACHERS[teachers[0]][0], STUDENT_DEF, tuple(TEACHERS[i][0] for i in teachers[1:])
    )
    return make_opd_step(graphs, RECORD, variant, vocab=VOCAB, chunk=7, microbatch=microbatch)


def run(batch, variant, teachers, microbatch=0):
    """Metrics, per-token values and gradient of one step with those of TEACHERS."""
    first, *others = (TEACHERS[i][1] for i in teachers)
    state, frozen = init_state(own(STUDENT), RECORD), Frozen(first, BASE, tuple(others))
    step, scalars = step_of(variant, microbatch, *teachers), hyper(1.3, gamma=0.1)
    state, metrics, per_token = step(state, frozen, batch, scalars, 0.0)
    return jax.tree.map(np.asarray, (metrics, per_token, state.opt_state))


def assert_equal(a, b, tolerance=0.0):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max()))


@pytest.mark.parametrize(("name", "microbatch"), [*((name, 0) for name in VARIANTS), ("sampled", 1)])
def test_gradients_are_those_of_a_run_per_teacher_on_its_rows(batch, name, microbatch):
    """Each weighted by its share of the tokens, or of the completions; every token's scores are its own teacher's."""
    variant, total, scores = VARIANTS[name], jax.tree.map(np.zeros_like, STUDENT), {}
    lengths = batch.rollout.lengths
    of_row = lengths.sum(1) if variant.aggregate == "token" else (lengths > 0).sum(1)
    whose = np.array([0, 2, 1, 0] if name == "sampled" else [0, 1, 1, 0], np.int32)
    teachers = tuple(np.unique(whose).tolist())
    for i in teachers:
        rows = whose == i
        part = jax.tree.map(lambda x, rows=rows: x[rows], batch)
        _, scores[i], gradient = run(part, variant, (i,))
        share = of_row[rows].sum() / of_row.sum()
        total = jax.tree.map(lambda t, g, share=share: t + share * g, total, gradient)
    _, per_token, gradient = run(batch._replace(own_teacher=whose), variant, teachers, microbatch)
    assert_equal(gradient, total, 1e-6)
    for quantity, values in per_token.items():
        for i, of_teacher in scores.items():
            np.testing.assert_allclose(values[whose == i], of_teacher[quantity], atol=2e-6, err_msg=quantity)
    assert not np.allclose(per_token["teacher"], run(batch, variant, (0,))[1]["teacher"])


def test_experts_without_rows_and_the_same_prompts_change_nothing(batch):
    """Bit for bit: what one teacher gives is what it gave before there could be more."""
    plain = run(batch, Variant(), (0,))
    same = batch._replace(teacher_prompts=batch.prompts, teacher_prompt_lengths=batch.prompt_lengths)
    assert_equal(run(same, Variant(), (0,)), plain)
    assert_equal(run(batch._replace(own_teacher=np.zeros(4, np.int32)), Variant(), (0, 1, 2)), plain)


def test_teachers_score_after_their_own_prompts(batch):
    """The teacher as in a run on its prompts, of another width; student and base as in one on theirs."""
    rng = np.random.default_rng(8)
    prompts, lengths = rng.integers(VOCAB, size=(4, 9)).astype(np.int32), np.array([9, 1, 4, 7], np.int32)
    ours = run(batch._replace(teacher_prompts=prompts, teacher_prompt_lengths=lengths), Variant(), (0,))[1]
    theirs = run(batch._replace(prompts=prompts, prompt_lengths=lengths), Variant(), (0,))[1]
    plain = run(batch, Variant(), (0,))[1]
    np.testing.assert_allclose(ours["teacher"], theirs["teacher"], atol=1e-6)
    assert np.abs(ours["teacher"] - plain["teacher"]).max() > 0.1
    for name in ("student", "base", "entropy"):
        np.testing.assert_allclose(ours[name], plain[name], atol=1e-6)


# ---- whole runs

WIDTHS = {"teacher": 24, "student": 16, "hats": 32, "other": 24}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A file of records of two kinds, and checkpoints of one tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    lines = [
        {
            "prompt": f"order {i}",
            "answer": {"n": i % 10},
            "kind": ("hats", "shoes")[i % 3 == 0],
            "teacher_prompt": f"the answer is {i % 10}; order {i}",
        }
        for i in range(24)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    (folder / "schema.json").write_text(json.dumps(schema))
    train_tokenizer([json.dumps(line) for line in lines], 300, folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    for seed, (name, width) in enumerate(WIDTHS.items()):
        save_random(folder / name, width, tokenizer, seed)
    return folder


def config_of(models, route="", **fields):
    config = tiny_config()
    config.task.update(name="json", schema=str(models / "schema.json"), max_prompt=64, max_response=16)
    config.data.update(path=str(models / "data.jsonl"), validation_share=0.3)
    config.evaluation.update(batch_size=4, bootstrap=10)
    for role in ("teacher", "student"):
        config[role].weights = str(models / role)
        config.sft[role].update(steps=0, epochs=0.0, noise="")
    config.tokenizer.path = str(models / "tokenizer")
    config.forecast.lambdas = ()
    config.opd.update(lambdas=(1.0,), steps=2, batch_size=4, rollouts=2, estimator="sampled")
    config.train.export = False
    if route:
        config.teachers.update(field="kind", route=route.replace("MODELS", str(models)))
    config.update_from_flattened_dict(fields)
    return validate(config)


ROUTE = "hats=MODELS/hats,shoes=teacher"


def reported(config, workdir):
    """A whole run, to its report; the page."""
    run_stages(config, workdir)
    write_json(workdir / "config.json", {"config": to_json(config), "versions": {}, "notes": []})
    return write_report(workdir).read_text()


def left(workdir):
    """What a run leaves, but for its speed."""
    rows = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(workdir)]
    return rows, *(json.loads((workdir / f"{name}.json").read_text()) for name in ("calibration", "results"))


def test_a_route_to_one_teacher_is_the_run_without_a_route(models, tmp_path):
    run_stages(config_of(models), tmp_path / "plain")
    run_stages(config_of(models, "hats=teacher,shoes=teacher"), tmp_path / "routed")
    assert left(tmp_path / "routed") == left(tmp_path / "plain")


def test_calibration_and_forecast_read_each_record_with_its_own_teacher(models, tmp_path):
    """At λ = 1 the forecast is the greedy answer of the record's own teacher."""
    config = config_of(models, ROUTE)
    assert f"The teacher {models}/hats alone, on its " in reported(config, tmp_path)
    rows, calibration, results = left(tmp_path)
    assert len(rows) == 2 and calibration["prompts"] == 7
    notes = [note for note in calibration["notes"] if "alone" in note]
    assert [note.split(" alone")[0] for note in notes] == ["The teacher", f"The teacher {models}/hats"]
    with job_on_mesh(config, tmp_path) as job:
        frozen, kinds = frozen_models(job), [r.others["kind"] for r in job.records["validation"]]
        params = dict(zip(("teacher", f"teacher {models}/hats"), frozen.teachers, strict=True))
        seen, failures = [], {}
        for role, batches in job.by_teacher():
            target = (job.graphs[role],), (params[role],), jnp.ones((1, 1))
            (answers,) = greedy_answers(*target, batches, job.codec, job.decoding, job.judge("validation"))
            seen += [(a.index, kinds[a.index], role) for a in answers]
            for answer in answers:
                failures[answer.parsed.failure] = failures.get(answer.parsed.failure, 0) + 1
    assert sorted(i for i, *_ in seen) == list(range(7))
    assert {(kind, role == "teacher") for _, kind, role in seen} == {("hats", False), ("shoes", True)}
    (forecast,) = (r for r in results if r["stage"] == "forecast")
    assert {k: v for k, v in forecast["failures"].items() if v} == failures


def test_batches_say_whose_each_row_is(models, tmp_path):
    job = open_job(config_of(models, ROUTE, **{"teachers.max_prompt": 64}), tmp_path)
    batch, records = next(job.opd_batches(0)), job.records["train"]
    for i, row in enumerate(batch["index"]):
        assert batch["own_teacher"][i] == (records[row].others["kind"] == "hats")
        read = batch["teacher_prompt"][i, : batch["teacher_prompt_length"][i]]
        assert job.codec.text(read) == records[row].teacher_prompt
    assert "own_teacher" not in next(job.sft_batches("teacher"))


def test_self_distillation_as_a_control(models, tmp_path):
    """The same weights, as they are, for both, if that is asked for: nothing to learn, at any λ."""
    student = config_of(models).student.to_dict()
    same = {f"teacher.{field}": value for field, value in student.items() if field != "lora"}
    with pytest.raises(UserError, match="same model; give another, or set opd.self_distillation=True"):
        run_stages(config_of(models, **same), tmp_path / "by_mistake")
    asked = {"opd.self_distillation": True, "opd.lambdas": (1.0, 2.0)}
    run_stages(config_of(models, **same, **asked), tmp_path)
    rows, _, results = left(tmp_path)
    first = [row for row in rows if "reverse_kl" in row and row["step"] == 1]
    assert len(first) == 2 and all(abs(row["reverse_kl"]) < 1e-5 for row in first)
    assert len({r["parse"] for r in results}) == 1


def test_self_distillation_with_a_hint(models, tmp_path, capsys):
    """The student's SFT is the teacher, and differs from the base by what it reads alone."""
    student = config_of(models).student.to_dict()
    same = {f"teacher.{field}": value for field, value in student.items() if field != "lora"}
    same |= {
        "sft.continued": True,
        "sft.student.steps": 1,
        "sft.student.batch_size": 4,
        "sft.student.lr": 1e-3,
    }
    with pytest.raises(UserError, match="student and teacher give the same log-probabilities"):
        run_stages(config_of(models, **same), tmp_path / "without")
    assert "teachers read the student's prompts" in capsys.readouterr().err
    reported(config_of(models, **same, **{"teachers.max_prompt": 64}), tmp_path / "hint")
    rows, _, results = left(tmp_path / "hint")
    first = next(row for row in rows if "reverse_kl" in row)
    assert abs(first["reverse_kl"]) > 1e-3
    assert not [r for r in results if r["stage"] == "forecast"]
    assert "no forecast: teachers read prompts of their own" in capsys.readouterr().err


# ---- mistakes


@pytest.mark.parametrize(
    ("route", "fields", "says"),
    [
        ("hats", {}, "teachers.route='hats': write VALUE=WEIGHTS"),
        ("hats=teacher,", {}, "write VALUE=WEIGHTS"),
        ("hats=a,hats=teacher", {}, "no value twice"),
        ("hats=MODELS/hats", {}, "no record goes to section teacher; write VALUE=teacher"),
        (ROUTE, {"teachers.field": ""}, "set both, or neither"),
        ("", {"teachers.field": "kind"}, "set both, or neither"),
        (
            ROUTE,
            {"tokenizer.path": "", "teacher.weights": "", "student.weights": ""},
            "tokenizer.path is empty",
        ),
        ("", {"teachers.max_prompt": -1}, "teachers.max_prompt=-1: must be >= 0"),
    ],
)
def test_a_wrong_config_is_one_line(models, route, fields, says):
    with pytest.raises(UserError, match=says) as error:
        config_of(models, route, **fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("route", "fields", "says"),
    [
        (
            ROUTE,
            {"teachers.field": "knd"},
            r"field='knd': json data.jsonl:\d+ has no such field; did you mean",
        ),
        (
            "hats=teacher",
            {},
            r"json data.jsonl:\d+ has kind='shoes', which has no teacher; add VALUE=WEIGHTS",
        ),
        (
            "",
            {"teachers.max_prompt": 4},
            r"json data.jsonl:\d+: the teacher's prompt takes \d+ tokens, above teachers",
        ),
        ("hats=MODELS/absent,shoes=teacher", {}, "absent"),
    ],
)
def test_wrong_records_are_one_line(models, tmp_path, route, fields, says):
    with pytest.raises(UserError, match=says) as error:
        open_job(config_of(models, route, **fields), tmp_path)
    assert "\n" not in str(error.value)


def test_prompts_for_teachers_must_be_there_and_be_prompts(models, tmp_path):
    lines = [json.loads(line) for line in (models / "data.jsonl").read_text().splitlines()]

    def opened(change):
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(change(dict(line))) + "\n" for line in lines))
        open_job(
            config_of(models, **{"data.path": str(tmp_path / "x.jsonl"), "teachers.max_prompt": 64}), tmp_path
        )

    opened(lambda line: line if line["prompt"] == "order 3" else {k: line[k] for k in ("prompt", "answer")})
    with pytest.raises(UserError, match="teachers.max_prompt=64: no json record has a prompt for teachers"):
        opened(lambda line: {k: v for k, v in line.items() if k != "teacher_prompt"})
    with pytest.raises(
        UserError, match="x.jsonl:1: the teacher's prompt: a prompt is a text or a list of messages"
    ):
        opened(lambda line: line | {"teacher_prompt": 3})


def test_the_files_and_vocabulary_of_every_teacher_are_looked_at(models, tmp_path):
    shutil.copytree(models, tmp_path / "m")
    folder, workdir = tmp_path / "m", tmp_path / "workdir"
    open_job(config_of(folder, ROUTE), workdir)
    (workdir / "results.json").write_text("[]")
    save_random(folder / "hats", 32, load_tokenizer(folder / "tokenizer"), seed=7)
    with pytest.raises(UserError, match="the files of teachers.route changed"):
        open_job(config_of(folder, ROUTE), workdir)
    train_tokenizer(["another text altogether"] * 3, 270, folder / "strange")
    shutil.copytree(folder / "strange", folder / "hats", dirs_exist_ok=True)
    with pytest.raises(UserError, match=f"{folder}/hats: has another vocabulary than tokenizer.path"):
        open_job(config_of(folder, ROUTE), tmp_path / "new")


# ---- the planner


def test_the_planner_counts_every_teacher(models):
    plain, routed = config_of(models), config_of(models, ROUTE, **{"teachers.max_prompt": 96})
    sizes = dict.fromkeys(AXES, 1)
    shapes, mesh = shapes_of(routed), make_mesh(sizes, jax.devices()[:1])
    expert = shapes.pop(f"teacher {models}/hats")
    assert shapes == shapes_of(plain)
    student, teacher = shapes["student"], shapes["teacher"]
    load, layout = Load(4, 2, 64, 16), Layout(sizes, 4, "none", frozen="float32")
    before, after = (memory_estimate(student, teacher, load, layout, experts=x) for x in ((), (expert,)))
    assert after["teacher"] - before["teacher"] == 4 * num_params(expert)
    before, after = (step_flops(student, teacher, load, "none", experts=x) for x in ((), (expert,)))
    assert after["teacher"] - before["teacher"] == step_flops(student, expert, load, "none")["teacher"]
    before, after = (state_memory(c, shapes_of(c), mesh, False) for c in (plain, routed))
    assert after["teacher"] - before["teacher"] == 4 * num_params(expert)
    vocab = len(load_tokenizer(models / "tokenizer"))
    before, after = (compile_update(c, shapes_of(c), vocab, mesh) for c in (plain, routed))
    assert after.arguments - before.arguments >= 4 * num_params(expert) + 4 * 4 * 96
