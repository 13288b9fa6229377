"""What stands in a checkpoint's folder besides a whole model: the ids that end a turn."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from listopd_jax import config as config_module
from listopd_jax.errors import UserError
from listopd_jax.models import hf
from listopd_jax.models.build import model_ends
from listopd_jax.models.config import ModelConfig
from listopd_jax.models.decoder import abstract

TIED = ModelConfig(97, 32, 48, 2, 4, 2, 8)


@pytest.fixture
def folder(tmp_path):
    """A tied checkpoint that `save_hf` wrote."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), "float32"), abstract(TIED)[1])
    hf.save_hf(tmp_path / "model", TIED, params)
    return tmp_path / "model"


def edit(path, **fields):
    """Set fields of a JSON file, which is made if it is not there."""
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | fields))


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        ({"eos_token_id": [1, 0]}, 0, (1, 0)),
        ({"eos_token_id": 7}, 0, (7,)),
        ({}, 5, (5,)),
        (None, [3, 4], (3, 4)),
        (None, None, ()),
    ],
)
def test_every_id_that_ends_a_turn_is_read(folder, generation, config, ids):
    edit(folder / "config.json", eos_token_id=config)
    if generation is not None:
        edit(folder / "generation_config.json", **generation)
    assert hf.read_eos_ids(folder) == ids


@pytest.mark.parametrize("value", ["<|im_end|>", [1, None], -1, True])
def test_what_is_no_id_is_one_line(folder, value):
    edit(folder / "generation_config.json", eos_token_id=value)
    with pytest.raises(UserError, match="generation_config.json: eos_token_id") as e:
        hf.read_eos_ids(folder)
    assert "\n" not in str(e.value)


def test_an_end_that_the_tokenizer_lacks_is_refused(folder):
    edit(folder / "generation_config.json", eos_token_id=[1, 90])
    model = config_module.defaults().student
    assert model_ends(model, 50) == (), "a model made here has the tokenizer's"
    model.weights = str(folder)
    assert model_ends(model, 91) == (1, 90)
    with pytest.raises(UserError, match=r"generation_config.json .* 90, .* below 50"):
        model_ends(model, 50)


def test_the_ends_travel_with_the_export(tmp_path, folder):
    config, params = hf.load_hf(folder)
    hf.save_hf(tmp_path / "out", config, params, ends=(0, 1))
    assert hf.read_eos_ids(tmp_path / "out") == (0, 1)
