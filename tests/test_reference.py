"""`reference.weights`: the base of the objective is another model than the student's SFT, with its own architecture."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.fashion import tiny
from listopd_jax.config import changed_field, to_json, validate
from listopd_jax.data.tokenizer import load_tokenizer, train_tokenizer
from listopd_jax.errors import UserError
from listopd_jax.metrics_log import read_metrics
from listopd_jax.models import hf
from listopd_jax.models.config import ModelConfig, num_params
from listopd_jax.models.decoder import abstract
from listopd_jax.plan.arithmetic import Layout, Load, memory_estimate, persistent, step_flops
from listopd_jax.plan.search import shapes_of
from listopd_jax.stages.job import base_of
from listopd_jax.stages.pipeline import run_stages
from listopd_jax.stages.prepare import open_job

WIDTHS = {"teacher": 24, "student": 16, "other": 32}


def save_random(folder, width, tokenizer, seed):
    shape = ModelConfig(len(tokenizer) + seed, width, 2 * width, 1 + (width == 32), 2, 1, 8)
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32)  # noqa: E731
    hf.save_hf(folder, shape, jax.tree.map(draw, abstract(shape)[1]), tokenizer)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher, a student, and a third of another width, depth and padded vocabulary; one tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    text = 'Product: soap. Score each. [{"review_id":"r1","score":7},{"review_id":"r2","score":3}]'
    train_tokenizer([text] * 3, 320, folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    for seed, (name, width) in enumerate(WIDTHS.items()):
        save_random(folder / name, width, tokenizer, seed)
    shutil.copytree(folder / "student", folder / "copy")
    return folder


def config_of(models, reference="", **fields):
    config = tiny()
    config.task.update(k=2, max_prompt=256, max_response=40, max_review_words=4)
    config.data.synthetic.update(products=12, reviews_per_product=4)
    config.data.validation_share = 0.3
    config.evaluation.update(max_lists=3, batch_size=3, bootstrap=10)
    for role in ("teacher", "student"):
        config[role].weights = str(models / role)
        config.sft[role].update(steps=0, epochs=0.0)
    config.tokenizer.path = str(models / "tokenizer")
    config.forecast.lambdas = ()
    config.opd.update(lambdas=(2.0,), steps=2, batch_size=2, rollouts=2, estimator="sampled")
    config.train.export = False
    config.reference.weights = reference and str(models / reference)
    config.update_from_flattened_dict(fields)
    return validate(config)


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory):
    """What whole runs leave, by reference."""
    found = {}
    for reference in ("", "copy", "other"):
        workdir = tmp_path_factory.mktemp("run")
        run_stages(config_of(models, reference), workdir)
        rows = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(workdir)]
        calibration = json.loads((workdir / "calibration.json").read_text())
        found[reference] = rows, calibration, json.loads((workdir / "results.json").read_text())
    return found


def test_the_students_own_weights_as_reference_change_nothing(runs):
    assert runs["copy"] == runs[""]


def test_another_reference_is_the_base_of_everything(runs):
    """Of calibration and forecast, and of the objective; the student starts from its own weights all the same."""
    (rows, calibration, results), (other_rows, other_calibration, other_results) = runs[""], runs["other"]
    assert calibration["p_mean"] == other_calibration["p_mean"]
    assert calibration["flips"] != other_calibration["flips"]
    assert [r["reverse_kl"] for r in rows[:1]] == [r["reverse_kl"] for r in other_rows[:1]]
    assert rows[0]["advantage_mean"] != other_rows[0]["advantage_mean"]
    sft = [[r for r in x if r["stage"] == "sft_student"] for x in (results, other_results)]
    assert sft[0] == sft[1]


def test_it_is_another_run(models, runs):
    plain, other = (to_json(config_of(models, reference)) for reference in ("", "other"))
    assert changed_field(plain, other) == ("reference.weights", "", str(models / "other"))


def test_its_files_and_its_vocabulary_are_looked_at(models, tmp_path):
    shutil.copytree(models, tmp_path / "m")
    folder, workdir = tmp_path / "m", tmp_path / "workdir"
    job = open_job(config_of(folder, "other"), workdir)
    assert base_of(job.shapes) == job.shapes["reference"] != job.shapes["student"]
    (workdir / "results.json").write_text("[]")
    save_random(folder / "other", 32, load_tokenizer(folder / "tokenizer"), seed=7)
    with pytest.raises(UserError, match="the files of reference.weights changed"):
        open_job(config_of(folder, "other"), workdir)
    train_tokenizer(["another text altogether"] * 3, 270, folder / "strange")
    shutil.copytree(folder / "strange", folder / "other", dirs_exist_ok=True)
    with pytest.raises(UserError, match=f"{folder}/other: has another vocabulary than tokenizer.path"):
        open_job(config_of(folder, "other"), tmp_path / "new")


def test_the_teacher_as_reference_is_refused(models, tmp_path):
    with pytest.raises(UserError, match="reference and teacher give the same log-probabilities"):
        run_stages(config_of(models, "teacher"), tmp_path)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tokenizer.path": "", "teacher.weights": "", "student.weights": ""}, "tokenizer.path is empty"),
        ({"opd.advantage": "no_base"}, "does not use"),
    ],
)
def test_what_cannot_be_is_one_line(models, fields, says):
    with pytest.raises(UserError, match=says):
        config_of(models, "other", **fields)


def test_the_planner_counts_it_and_the_average(models):
    shapes = shapes_of(config_of(models, "other"))
    student, teacher, base = shapes["student"], shapes["teacher"], base_of(shapes)
    sizes = dict.fromkeys(("data", "fsdp", "tensor"), 1)
    load, layout = Load(2, 2, 64, 16), Layout(sizes, 2, "none", frozen="float32")
    plain = memory_estimate(student, teacher, load, layout)
    ours = memory_estimate(student, teacher, load, layout._replace(average=True), base)
    assert ours["base"] == 4 * num_params(base) and plain["base"] == 4 * num_params(student)
    assert ours["average"] == 4 * num_params(student) and "average" not in plain
    added = 4 * (num_params(base) - num_params(student)) + 4 * num_params(student)
    assert persistent(ours) - persistent(plain) == added
    assert (
        step_flops(student, teacher, load, "none", base)["base"]
        > step_flops(student, teacher, load, "none")["base"]
    )
    assert shapes_of(config_of(models)).keys() == {"student", "teacher"}
