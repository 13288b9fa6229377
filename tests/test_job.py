"""What is looked at before anything is computed: tokenizers and checkpoints, and whether a workdir is of these."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from listopd_jax import config as config_module
from listopd_jax.data.tokenizer import load_tokenizer, train_tokenizer
from listopd_jax.errors import UserError
from listopd_jax.models import hf
from listopd_jax.models.config import ModelConfig
from listopd_jax.models.decoder import abstract
from listopd_jax.stages.job import open_job, refuse_other_data
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


def test_another_data_set_is_refused_once_models_are_trained(tmp_path):
    refuse_other_data(tmp_path, "a")
    refuse_other_data(tmp_path, "b")  # nothing trained yet
    (tmp_path / "checkpoints").mkdir()
    refuse_other_data(tmp_path, "b")
    with pytest.raises(UserError, match="data files changed") as error:
        refuse_other_data(tmp_path, "a")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        refuse_other_data(tmp_path, "a")  # still refused the second time
