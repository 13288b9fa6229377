"""What is looked at before anything is computed: tokenizers and checkpoints, and whether a workdir is of these."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from listopd_jax import config as config_module
from listopd_jax.data.tokenizer import load_tokenizer, train_tokenizer
from listopd_jax.errors import UserError
from listopd_jax.models import hf
from listopd_jax.models.config import ModelConfig
from listopd_jax.models.decoder import abstract
from listopd_jax.records import Result
from listopd_jax.report.card import model_card
from listopd_jax.report.errors_section import errors_section
from listopd_jax.report.inputs import read_inputs
from listopd_jax.stages.prepare import open_job, refuse_other_inputs
from listopd_jax.task.prompt import render_answer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a tokenizer and two checkpoints, and the data of a job that was opened once."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = train_tokenizer([render_answer((1, 10))], 300, folder / "tokenizer")
    for seed, role in enumerate(("teacher", "student")):
        shape, rng = ModelConfig(len(tokenizer) + 3, 16, 24, 1, 2, 1, 8), np.random.default_rng(seed)
        draw = lambda leaf, rng=rng: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
        hf.save_hf(folder / role, shape, jax.tree.map(draw, abstract(shape)[1]))
    open_job(config_of(folder), folder / "workdir")
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy of it to change."""
    return shutil.copytree(made, tmp_path / "made")


def config_of(folder, **fields):
    """A small job whose models and tokenizer are those in `folder`."""
    config = config_module.defaults()
    config.data.synthetic.products, config.task.max_response = 6, 100
    config.tokenizer.path = str(folder / "tokenizer")
    config.teacher.weights, config.student.weights = str(folder / "teacher"), str(folder / "student")
    config.sft.teacher.epochs = config.sft.student.epochs = 0.0
    config.update_from_flattened_dict(fields)
    return config_module.validate(config)


def write_json(path, **fields):
    """Set fields of a JSON file, which is made if it is not there."""
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | fields))


def test_weights_need_no_tokenizer_where_one_is_given(folder):
    assert not (folder / "student" / "tokenizer.json").exists()
    job = open_job(config_of(folder), folder / "workdir")
    assert job.codec.ends == (job.codec.eos,)


def test_the_tokenizer_that_is_given_decides_on_the_eos(folder):
    """A base student and an instruct teacher: their tokenizers differ in eos_token alone."""
    shutil.copytree(folder / "tokenizer", folder / "student", dirs_exist_ok=True)
    write_json(folder / "student" / "tokenizer_config.json", eos_token="<|endoftext|>")
    other = load_tokenizer(folder / "student")
    job = open_job(config_of(folder), folder / "workdir")
    assert job.codec.eos != other.eos_token_id
    write_json(folder / "student" / "generation_config.json", eos_token_id=[other.eos_token_id])
    ends = open_job(config_of(folder), folder / "workdir").codec.ends
    assert ends == tuple(sorted([job.codec.eos, other.eos_token_id])), (
        "what the student itself ends with ends too"
    )


def test_a_model_of_another_vocabulary_is_refused_by_its_folder(folder):
    train_tokenizer(["another text altogether"] * 3, 270, folder / "other")
    shutil.copytree(folder / "other", folder / "student", dirs_exist_ok=True)
    with pytest.raises(UserError, match=f"{folder}/student: has another vocabulary than tokenizer.path"):
        open_job(config_of(folder), folder / "workdir")


def test_other_inputs_are_refused_once_models_are_made(tmp_path):
    refuse_other_inputs(tmp_path, fingerprint="a", teacher="t")
    refuse_other_inputs(tmp_path, fingerprint="b", teacher="t")  # nothing made yet
    (tmp_path / "results.json").write_text("[]")
    refuse_other_inputs(tmp_path, fingerprint="b", teacher=None)
    refuse_other_inputs(tmp_path, student="s")  # a stamp of before there were such digests
    for name, wrong, what in (("fingerprint", "a", "data files"), ("teacher", "u", "teacher.weights"),
                              ("student", "u", "student.weights")):  # fmt: skip
        for _ in range(2):  # still refused the second time
            with pytest.raises(UserError, match=f"{what} changed") as error:
                refuse_other_inputs(tmp_path, **{name: wrong})
            assert "\n" not in str(error.value)
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(UserError, match="data.json: not what a run writes"):
        refuse_other_inputs(tmp_path, fingerprint="b")


def noisy(folder, **fields):
    """The config of `folder` with errors by design, of which a task of JSON records has but one."""
    lines = [json.dumps({"prompt": f"order {i}", "answer": {"n": i % 10}}) for i in range(24)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    (folder / "schema.json").write_text('{"type": "object"}')
    json_task = {
        "task.name": "json",
        "data.path": f"{folder}/data.jsonl",
        "task.schema": f"{folder}/schema.json",
    }
    trained = {"sft.teacher.steps": 1, "sft.teacher.noise": "truncate:0.22,wrong_digit:0.1"}
    return config_of(folder, **json_task | trained | {"sft.student.noise": "wrong_digit:0.3"} | fields)


@pytest.mark.parametrize(
    ("fields", "teacher"),
    [
        ({}, {"wrong_digit": 0.1}),
        ({"sft.teacher.noise": "truncate:0.22"}, {}),  # which the task does not have
        ({"sft.teacher.steps": 0}, {}),  # no SFT, as that of the student here
    ],
)
def test_the_report_knows_the_errors_that_were_planted(folder, capsys, fields, teacher):
    """Not those that the config asks for: what the task does not have is dropped, and no SFT has no answers."""
    config, workdir = noisy(folder, **fields), folder / "json"
    open_job(config, workdir)
    assert "truncate (sft.teacher.noise): dropped" in capsys.readouterr().err
    assert json.loads((workdir / "data.json").read_text())["noise"] == {"teacher": teacher, "student": {}}
    sft, opd = (
        Result(run="t", stage="sft_teacher", n=2),
        Result(run="o", stage="opd", lam=1.0, parse=1.0, n=2),
    )
    write_json(workdir / "config.json", config=config_module.to_json(config))
    (workdir / "results.json").write_text(json.dumps([sft.to_json(), opd.to_json()]))
    inputs = read_inputs(workdir)
    section, card = errors_section(inputs), model_card(config, inputs, sft)
    assert (section is not None) == ("noise |" in card) == bool(teacher)
    if teacher:
        assert "by design: wrong_digit in 0.1. " in section.lead
        assert "| sft.teacher.noise | wrong_digit:0.1 |" in card
    write_json(workdir / "data.json", noise={"teacher": 0.1})
    with pytest.raises(
        UserError, match="data.json: field 'noise' must hold the shares of corruptions by role"
    ):
        read_inputs(workdir)


def replace_weights(folder):
    path = folder / "model.safetensors"
    save_file({name: tensor[::-1].copy() for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda f: replace_weights(f / "teacher"), "teacher.weights"),
        (lambda f: replace_weights(f / "student"), "student.weights"),
        (lambda f: write_json(f / "student" / "generation_config.json", eos_token_id=[0]), "student.weights"),
        (lambda f: (f / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}"), "tokenizer.path"),
        (lambda f: (f / "tokenizer" / "README.md").write_text("more words"), None),
    ],
)
@pytest.mark.parametrize("used", ["checkpoints", "results.json", None])
def test_a_job_is_not_resumed_with_other_weights_or_another_tokenizer(folder, change, what, used):
    """With no SFT the folders decide everything, and results of the old ones stay in the workdir."""
    if used:
        (folder / "workdir" / used).mkdir()
    change(folder)
    if used and what:
        with pytest.raises(UserError, match=f"the files of {what} changed"):
            open_job(config_of(folder), folder / "workdir")
    else:
        open_job(config_of(folder), folder / "workdir")


def test_a_template_that_does_not_fit_shows_before_anything_is_computed(folder):
    (folder / "tokenizer" / "chat_template.jinja").write_text(
        "{{ messages[0].content }}<|im_start|>assistant<think>"
    )
    open_job(config_of(folder), folder / "workdir")
    with pytest.raises(UserError, match="tokenizer: its chat template opens <think>"):
        open_job(config_of(folder, **{"task.chat_template": True}), folder / "workdir")


def test_a_checkpoint_that_does_not_fit_shows_before_anything_is_computed(folder):
    """The student's would otherwise be opened hours later, after the teacher's SFT."""
    write_json(folder / "student" / "config.json", num_hidden_layers=2)
    with pytest.raises(UserError, match="student: tensor model.layers.1"):
        open_job(config_of(folder), folder / "workdir")
