"""`listopd_jax.forecast`: what it says of a pair is what a run's stages say, and mistakes are one line of its flags."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import fashion
from listopd_jax import forecast as module
from listopd_jax.config import validate
from listopd_jax.data.tokenizer import train_tokenizer
from listopd_jax.errors import UserError, exit_code
from listopd_jax.models import hf
from listopd_jax.models.config import ModelConfig
from listopd_jax.models.decoder import abstract
from listopd_jax.records import read_calibration, read_recommendation, read_results
from listopd_jax.report.write import write_report
from listopd_jax.stages.pipeline import run_stages

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
LINES = [{"prompt": f"say {i}", "answer": {"n": i}, "fold": "validation"} for i in range(5)]
OTHERS = [{"prompt": f"tell {i}", "answer": {"n": i}, "fold": "train"} for i in range(3)]
LAMBDAS = (1.0, 1.5, 3.0)


def save_random(folder, tokenizer, layers, seed):
    """A checkpoint of random weights, in the style of Qwen3."""
    shape = ModelConfig(len(tokenizer), 16, 24, layers, 2, 1, 8, qk_norm=True)
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    hf.save_hf(folder, shape, jax.tree.map(draw, abstract(shape)[1]), tokenizer)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a teacher, a smaller base, prompts, a contract, and what the command left in `out`."""
    folder = tmp_path_factory.mktemp("made")
    texts = ['say 0 tell 1 {"n":2}', '[{"review_id":"r1","score":10}]'] * 5
    tokenizer = train_tokenizer(texts, 280, folder / "tokenizer")
    save_random(folder / "teacher", tokenizer, 2, seed=0)
    save_random(folder / "base", tokenizer, 1, seed=1)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    module.main([*arguments(folder), f"--contract={folder / 'schema.json'}", f"--out={folder / 'out'}"])
    return folder


def arguments(folder, **other):
    """The command's flags; `other` replaces or extends them."""
    flags = {
        "teacher": folder / "teacher", "base": folder / "base", "prompts": folder / "prompts.jsonl",
        "lambdas": "3,1.5", "max_tokens": 12, "batch_size": 3,
    } | other  # fmt: skip
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


def test_it_finds_what_the_stages_of_a_run_find(made, tmp_path):
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES + OTHERS))
    config = fashion.tiny()
    config.update_from_flattened_dict({
        "teacher.weights": str(made / "teacher"), "student.weights": str(made / "base"),
        "tokenizer.path": str(made / "teacher"), "data.path": str(tmp_path / "lines.jsonl"),
        "data.split_field": "fold", "task.name": "json", "task.schema": str(made / "schema.json"),
        "task.max_response": 12, "sft.teacher.steps": 0, "sft.teacher.epochs": 0.0,
        "sft.student.steps": 0, "sft.student.epochs": 0.0, "sft.teacher.noise": "",
        "sft.student.noise": "", "train.export": False, "evaluation.batch_size": 3,
        "forecast.batch_size": 3, "opd.lambdas": (), "forecast.lambdas": LAMBDAS,
    })  # fmt: skip
    run_stages(validate(config), tmp_path / "run")
    run, own = (
        [r for r in read_results(f / "results.json") if r.stage == "forecast"]
        for f in (tmp_path / "run", made / "out")
    )
    counted = ("lam", "n", "parse", "useful", "ended", "failures", "guard")
    of = lambda records: {r.lam: [getattr(r, name) for name in counted] for r in records}  # noqa: E731
    assert of(own).keys() == set(LAMBDAS) and of(own) == {
        lam: row for lam, row in of(run).items() if lam in LAMBDAS
    }
    a, b = (read_calibration(f / "calibration.json") for f in (tmp_path / "run", made / "out"))
    assert (a.positions, a.prompts, len(a.forecasts)) == (b.positions, b.prompts, len(b.forecasts))
    assert [row.lam for row in b.forecasts] == list(LAMBDAS)
    inverse = lambda flip: 0 if flip is None else 1 / flip  # noqa: E731
    for one, other in zip((*a.flips, *a.forecasts), (*b.flips, *b.forecasts), strict=True):
        assert inverse(one.min) == pytest.approx(inverse(other.min), abs=1e-3)
        assert getattr(one, "agreement", None) == getattr(other, "agreement", None)


def test_it_prints_a_row_for_each_lambda_the_thresholds_and_the_recommendation(made, capsys):
    kept = [f"--contract={made / 'schema.json'}", f"--out={made / 'out'}"]
    before = (made / "out" / "results.json").read_bytes()
    module.main([*arguments(made), *kept])
    said = capsys.readouterr().out.splitlines()
    assert (made / "out" / "results.json").read_bytes() == before, "what is there is only read"
    assert said[0].split() == "λ parse ended as the teacher useful structure flips".split()
    assert [line.split()[0] for line in said[1:4]] == ["1", "1.5", "3"] and said[1].split()[3] == "1.000"
    assert said[4].startswith("λ_flip of structural tokens, along 5 answers of the teacher: first ")
    assert said[6].startswith("λ* of Eq. 4, clip 5: typical ") and "note: Only 5 prompts" in said[7]
    assert said[-3:] == list(read_recommendation(made / "out" / "recommendation.json").lines)
    assert "Recommended: λ = 1" in write_report(made / "out").read_text("utf-8").replace("\u00a0", " ")


def test_without_contract_and_answers_parse_is_the_share_of_valid_json(made, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "say 1"}]}\n')
    one = arguments(made, prompts=tmp_path / "p.jsonl", lambdas="2", chat_template="False")
    module.main(one)
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == "λ parse ended as the teacher structure flips".split()
    assert [line.split()[0] for line in said[1:3]] == ["1", "2"]


def test_more_lambdas_are_added_in_the_same_folder(made, tmp_path):
    out = shutil.copytree(made / "out", tmp_path / "out")
    kept = [f"--contract={made / 'schema.json'}", f"--out={out}"]
    module.main([*arguments(made, lambdas="2"), *kept])
    assert {r.lam for r in read_results(out / "results.json")} == {*LAMBDAS, 2.0}
    assert [r.lam for r in read_calibration(out / "calibration.json").forecasts] == [1.0, 1.5, 2.0, 3.0]


def other_tokenizer(folder):
    tokenizer = train_tokenizer(["another text"] * 3, 270, folder / "other_tokenizer")
    save_random(folder / "other", tokenizer, 1, seed=1)


def bare(folder):
    shutil.copytree(folder / "base", folder / "other", ignore=shutil.ignore_patterns("tokenizer*"))


@pytest.mark.parametrize(
    ("make", "other", "says"),
    [
        (other_tokenizer, {"base": "other"}, "other: has another vocabulary than --teacher="),
        (bare, {"base": "other"}, "other: holds no tokenizer, so its ids cannot be compared"),
        (None, {"base": "teacher"}, "student and teacher give the same log-probabilities"),
        (None, {"base": "absent"}, "absent: no such folder"),
        (None, {"teacher": "absent"}, "absent: no such folder"),
        (None, {"prompts": "absent.jsonl"}, "--prompts=absent.jsonl: no such file"),
        (None, {"contract": "absent.json"}, "--contract=absent.json: cannot be read"),
        (None, {"chat_template": "True"}, "--chat-template=True, but "),
        (None, {"max_prompt": "1"}, "above --max-prompt=1"),
        (None, {"lambdas": "1,x"}, "argument --lambdas"),
        (None, {"lambdas": "-1"}, "--lambdas=(-1.0, 1.0): every lambda is a number >= 0"),
        (None, {"clip": "1"}, "--clip=1.0: the clip c must be > 1"),
        (None, {"out": "out", "clip": "3"}, "out/config.json: this workdir holds a run with "),
        (None, {"techer": "x"}, "--techer"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(made, tmp_path, monkeypatch, capsys, make, other, says):
    folder = shutil.copytree(made, tmp_path / "made")
    monkeypatch.chdir(folder)
    if make is not None:
        make(folder)
    capsys.readouterr()
    assert exit_code(module.main, arguments(folder, **other)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and says in errors[0]
    assert "--config." not in errors[0] and ".weights" not in errors[0]


def test_a_user_error_without_a_field_is_as_it_was():
    with pytest.raises(UserError, match=r"^plain data\.pathological$"), module._flags_in_messages():
        raise UserError("plain data.pathological")


def test_gguf_files_with_a_tokenizer_of_their_own_are_a_pair_too(tmp_path, capsys):
    pytest.importorskip("gguf")
    from test_gguf import spell, write

    spelled = spell(tmp_path / "tokenizer")
    for kind in ("qwen3", "llama"):
        write(tmp_path / f"{kind}.gguf", kind, spelled)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "more words"}\n')
    pair = {"teacher": tmp_path / "qwen3.gguf", "base": tmp_path / "llama.gguf", "lambdas": "2"}
    module.main(arguments(tmp_path, **pair))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == ["1", "2"]
