"""`teacher.server`: a teacher over HTTP, from a real server on loopback that runs a model of ours and misbehaves."""

import json

import jax
import numpy as np
import pytest
from model_server import serving
from test_reference import save_random
from test_teachers import config_of, reported

from listopd_jax.config import changed_field, to_json
from listopd_jax.data.tokenizer import load_tokenizer, train_tokenizer
from listopd_jax.errors import UserError
from listopd_jax.metrics_log import read_metrics
from listopd_jax.models.build import graph_of
from listopd_jax.models.hf import load_hf
from listopd_jax.stages.pipeline import run_stages
from listopd_jax.stages.teacher_server import KEY, PROBE, SAME, TeacherServer, check_server, repeated
from listopd_jax.train.preflight import answer_logprobs


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Records, and a teacher and a student of one tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    lines = [
        {"prompt": f"order {i}", "answer": {"n": i % 10}, "teacher_prompt": f"it is {i % 10}; order {i}"}
        for i in range(24)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "schema.json").write_text('{"type": "object", "required": ["n"]}')
    train_tokenizer([*map(json.dumps, lines), PROBE], 320, folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    for seed, (name, width) in enumerate({"teacher": 24, "student": 16}.items()):
        save_random(folder / name, width, tokenizer, seed)
    return folder


@pytest.fixture(scope="module")
def teacher(models):
    """Static half, parameters and tokenizer of the teacher."""
    config, params = load_hf(models / "teacher", jax.numpy.float32)
    return graph_of(config, "float32", "none", "xla"), params, load_tokenizer(models / "tokenizer")


@pytest.fixture
def server(teacher):
    with serving(*teacher) as running:
        yield running


def client(server, **settings):
    return TeacherServer(server.url, "teacher", **{"timeout": 30.0, "attempts": 4, "wait": 0.01} | settings)


@pytest.fixture(scope="module")
def batch(teacher):
    """Twenty prompts with answers: three requests."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 9, size=(2, 20)).astype(np.int32)
    return {
        "prompt": rng.integers(2, 300, size=(20, 8)).astype(np.int32),
        "prompt_length": lengths[0],
        "answer": rng.integers(2, 300, size=(20, 8)).astype(np.int32),
        "answer_length": lengths[1],
    }


def asked_of(server, batch, **settings):
    prompts, answers = (
        [row[:n].tolist() for row, n in zip(batch[name], batch[f"{name}_length"], strict=True)]
        for name in ("prompt", "answer")
    )
    return np.concatenate(client(server, **settings).logprobs(prompts, answers))


def test_scores_are_the_models_own(server, teacher, batch):
    graph, params, tokenizer = teacher
    ours = answer_logprobs(graph, params, batch, len(tokenizer), 64)
    np.testing.assert_allclose(asked_of(server, batch), ours, atol=1e-4)
    sizes = [len(body["prompt"]) for _, _, body in server.asked]
    assert sorted(sizes) == [4, 8, 8] and all(body["model"] == "teacher" for *_, body in server.asked)


FAULTS = [500, 503, 429, 408, "truncated", "cut", "short", "fewer", "nan", "positive", "text", "deep", "list"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_changes_nothing(server, batch, fault):
    """Also three in a row, which the first three requests get or one of them thrice."""
    right = asked_of(server, batch)
    server.faults.extend([fault] * 3)
    np.testing.assert_array_equal(asked_of(server, batch), right)
    assert not server.faults


@pytest.mark.parametrize("fault", [500, 429, "truncated", "nan", "short"])
def test_a_fault_that_stays_is_one_line(server, batch, fault):
    server.faults.extend([fault] * 100)
    with pytest.raises(UserError) as error:
        asked_of(server, batch, attempts=2)
    assert f"{server.url}/v1/completions: 2 attempts failed, the last with" in str(error.value)
    assert "\n" not in str(error.value)


def test_no_answer_fills_the_memory(server, batch):
    """48 MiB of empty objects would be a gigabyte of dictionaries."""
    server.faults.extend(["flood"] * 3)
    with pytest.raises(UserError, match="1 attempts failed, the last with an answer of more than .* bytes"):
        asked_of(server, batch, attempts=1)


def test_a_server_that_hangs_or_is_not_there_is_given_up(server, batch):
    server.faults.extend(["hang"] * 3)
    with pytest.raises(UserError, match="1 attempts failed, the last with timed out"):
        asked_of(server, batch, timeout=0.2, attempts=1)
    server.faults.clear()
    gone = TeacherServer("http://127.0.0.1:1", "teacher", timeout=1.0, attempts=2, wait=0.01)
    with pytest.raises(UserError, match="2 attempts failed, the last with .*refused"):
        gone.logprobs([[1]], [[2]])


def test_what_is_refused_for_good_is_asked_once_and_the_key_is_not_shown(server, batch, monkeypatch, capsys):
    monkeypatch.setenv(KEY, "sesame")
    for status in (400, 401, 302):
        server.asked.clear()
        server.faults.extend([status] * 9)
        with pytest.raises(UserError, match=f"HTTP {status}: .*as told, Bearer ") as error:
            asked_of(server, batch)
        server.faults.clear()
        assert "sesame" not in str(error.value) and "sesame" not in "".join(capsys.readouterr())
        assert len(server.asked) == 3 and {path for path, *_ in server.asked} == {"/v1/completions"}
        assert {headers["Authorization"] for _, headers, _ in server.asked} == {"Bearer sesame"}
    with pytest.raises(UserError, match="HTTP 400: .*longer than the maximum model length"):
        client(server).logprobs([[5] * 90], [[5] * 20])


@pytest.mark.parametrize("key", ["open sesame", "sesame\nX-Other: 1", "s\u00e9same"])
def test_a_key_that_cannot_stand_in_a_header_is_one_line_and_not_shown(server, batch, monkeypatch, key):
    monkeypatch.setenv(KEY, key)
    with pytest.raises(UserError, match=f"{KEY}: holds a character that no key has") as error:
        asked_of(server, batch)
    assert "same" not in str(error.value)


def test_a_key_is_read_without_the_line_break_of_its_file(server, batch, monkeypatch):
    monkeypatch.setenv(KEY, "sesame\n")
    asked_of(server, batch)
    assert {headers["Authorization"] for _, headers, _ in server.asked} == {"Bearer sesame"}


# --- before a run


def test_the_name_and_the_tokenizer_are_looked_at(server, teacher, tmp_path):
    texts = ['{"n":3}', "order 7"]
    check_server(client(server), teacher[2], texts)
    with pytest.raises(UserError, match="teacher.served_name='teachr' is unknown; did you mean 'teacher'"):
        check_server(TeacherServer(server.url, "teachr"), teacher[2], texts)
    train_tokenizer(["another text altogether"] * 3, 270, tmp_path)
    for no_tokenize in (False, True):  # then by the text that the server makes of our ids
        server.no_tokenize = no_tokenize
        check_server(client(server), teacher[2], texts)
        with pytest.raises(UserError, match="has another tokenizer than tokenizer.path"):
            check_server(client(server), load_tokenizer(tmp_path), texts)


def test_a_server_must_repeat_itself(server, batch):
    assert repeated(client(server), batch) == 0
    server.noise = 4 * SAME
    with pytest.raises(UserError, match="two identical requests differ by 0.* nats, more than 0.05"):
        repeated(client(server), batch)


# --- whole runs


def served_config(models, server, **fields):
    served = {"teacher.weights": "", "teacher.server": f"{server.url}/v1", "teacher.served_name": "teacher"}
    return config_of(models, **served | fields)


@pytest.mark.parametrize("own_prompts", [False, True])
def test_a_run_is_that_of_the_same_teacher_here(models, server, tmp_path, capsys, own_prompts):
    fields = {"opd.lambdas": (1.3,), "teachers.max_prompt": 64 if own_prompts else 0}
    run_stages(config_of(models, **fields), tmp_path / "here")
    server.faults.extend([503, "truncated"])
    reported(served_config(models, server, **fields), tmp_path / "served")
    here, served = (list(read_metrics(tmp_path / name)) for name in ("here", "served"))
    assert len(here) == len(served) == 2
    for ours, theirs in zip(here, served, strict=True):
        for name in ("loss", "reverse_kl", "advantage_mean", "grad_norm", "ratio_max"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-5), name
    stages = {r["stage"] for r in json.loads((tmp_path / "served" / "results.json").read_text())}
    planned = {r["stage"] for r in json.loads((tmp_path / "served" / "runs.json").read_text())}
    assert stages == planned == {"sft_student", "opd"}
    assert not (tmp_path / "served" / "calibration.json").exists()
    said = capsys.readouterr().err
    assert "two identical requests differ by at most 0 nats" in said
    assert said.count("no calibration, no forecast: teacher.server gives no full distributions") == 1


def test_a_served_student_is_refused(models, tmp_path):
    """The server has the student's own weights: nothing to distil."""
    config, params = load_hf(models / "student", jax.numpy.float32)
    student = graph_of(config, "float32", "none", "xla"), params, load_tokenizer(models / "tokenizer")
    with (
        serving(*student) as server,
        pytest.raises(UserError, match="student and teacher give the same|broken"),
    ):
        run_stages(served_config(models, server), tmp_path)


def test_a_server_may_move_but_is_another_teacher(models, server):
    here, served = (to_json(c) for c in (config_of(models), served_config(models, server)))
    moved = to_json(served_config(models, server, **{"teacher.server": "https://elsewhere/v1"}))
    assert changed_field(served, moved) is None
    assert changed_field(here, served)[0] == "teacher.served_name"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"teacher.server": "http://me:secret@host:1"}, "teacher.server: write http"),
        (
            {"teacher.server": "http://host:1/v1?key=secret"},
            "a key goes into the environment as LISTOPD_TEACHER_KEY",
        ),
        ({"teacher.server": "host:1"}, "teacher.server: write http"),
        ({"teacher.server": "http://host:99999"}, "teacher.server: write http"),
        ({"teacher.server": "http://[:::]:1"}, "teacher.server: write http"),
        ({"teacher.served_name": ""}, "set both, or neither"),
        ({"teacher.weights": "x"}, "teacher.server is the only teacher"),
        (
            {"opd.estimator": "full_vocab", "opd.ratio": "none"},
            "opd.estimator needs the teacher's full distribution",
        ),
        ({"opd.guard.margin": 1.25}, "opd.guard needs"),
        ({"opd.normalize": True}, "opd.normalize needs"),
        ({"opd.control_variate": "kl"}, "opd.control_variate needs"),
        ({"opd.on_collapse": "warn"}, "opd.on_collapse needs"),
        ({"sft.continued": True}, "sft.continued"),
    ],
)
def test_what_a_served_teacher_cannot_is_one_line(models, server, fields, says):
    with pytest.raises(UserError, match=says) as error:
        served_config(models, server, **fields)
    assert "\n" not in str(error.value) and "secret" not in str(error.value)
