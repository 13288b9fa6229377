"""Folders of checkpoints as people have them: other names, adapters, two models in one, blocks that do nothing."""

import json
import logging
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

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


def edit_tensors(folder, change):
    """Rewrite model.safetensors by a function from its tensors to others."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def same(a, b):
    """Whether two checkpoints are one model, bit by bit."""
    (config_a, params_a), (config_b, params_b) = a, b
    leaves = map(jax.tree.leaves, (params_a, params_b))
    return config_a == config_b and all(np.array_equal(x, y) for x, y in zip(*leaves, strict=True))


# --- names

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: HEAD if name == EMBED else name,
        lambda name: name.removeprefix("model."),
        lambda name: HEAD if name == EMBED else name.removeprefix("model."),
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: "module.lm_head.weight" if name == EMBED else f"module.{name}",
    ],
    ids=["head alone", "bare decoder", "bare decoder with head alone", "wrapped", "compiled", "wrapped head"],
)
def test_a_tied_checkpoint_loads_under_other_names(folder, rename):
    before = hf.load_hf(folder)
    edit_tensors(folder, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    assert same(hf.load_hf(folder), before)


def test_an_embedding_models_config_loads_where_it_has_a_head(folder):
    before = hf.load_hf(folder)
    edit(folder / "config.json", architectures=["Qwen3Model"])
    assert same(hf.load_hf(folder), before)
    edit(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(UserError, match="architectures"):
        hf.load_hf(folder)
    edit(folder / "config.json", architectures=["Qwen3ForCausalLM"])
    with pytest.raises(UserError, match="lm_head.weight is missing"):
        hf.load_hf(folder)


def test_a_tensor_of_another_model_is_still_unexpected(folder):
    edit_tensors(folder, lambda tensors: tensors | {"visual.layers.0.norm.weight": np.ones(3, np.float32)})
    for load in (hf.load_hf, hf.check_hf):
        with pytest.raises(UserError, match="tensor visual.layers.0.norm.weight is unexpected"):
            load(folder)


# --- what is no whole model, or more than one


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside whole weights"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_the_folder_of_an_adapter_is_named_as_such(folder, tmp_path, name, beside):
    place = folder if beside else tmp_path
    (place / name).write_text("{}")
    for load in (hf.load_hf, hf.check_hf):
        with pytest.raises(UserError, match=f"{place}: holds {name}, a LoRA or other adapter.*merge it") as e:
            load(place)
        assert "\n" not in str(e.value)


def test_weights_with_an_adapter_not_yet_merged_are_named_as_such(folder):
    edit_tensors(folder, lambda t: t | {"model.layers.0.self_attn.q_proj.lora_A.weight": t[EMBED]})
    with pytest.raises(UserError, match="lora_A.weight is of a LoRA adapter; merge it"):
        hf.load_hf(folder)


def test_an_old_single_file_does_not_win_over_newer_shards(folder, tmp_path):
    """transformers reads the single file without a word."""
    config, params = hf.load_hf(folder)
    hf.save_hf(tmp_path / "sharded", config, params, max_shard_bytes=10_000)
    for path in (tmp_path / "sharded").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="holds model.safetensors, and model.safetensors.index.json .*delete"):
        hf.load_hf(folder)
    (folder / "model.safetensors").unlink()
    assert same(hf.load_hf(folder), (config, params))


def test_an_index_of_the_single_file_is_no_second_model(folder):
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    edit(folder / "model.safetensors.index.json", weight_map=weight_map)
    assert hf.load_hf(folder)[0] == TIED


# --- blocks that do nothing


@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.down_proj"])
def test_an_identity_block_loads_with_a_warning(folder, name, caplog):
    """So models are made deeper: a copied block, its last projections zero."""
    layers = [f"model.layers.{i}.{name}.weight" for i in range(2)]
    edit_tensors(folder, lambda t: t | {layers[1]: 0 * t[layers[1]]})
    with caplog.at_level(logging.WARNING, "absl"):
        hf.load_hf(folder)
    assert f"tensor {layers[1]} is all zeros, of layers 1: blocks that change nothing" in caplog.text
    edit_tensors(folder, lambda t: t | {layers[0]: 0 * t[layers[0]]})
    with pytest.raises(UserError, match="blank weights"):
        hf.load_hf(folder)


# --- exports


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_an_export_is_readable_for_whom_the_umask_says(folder, tmp_path, mask):
    """safetensors writes by way of a temporary file, which only its owner can read."""
    config, params = hf.load_hf(folder)
    before = os.umask(mask)
    try:
        hf.save_hf(tmp_path / "out", config, params, max_shard_bytes=10_000)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert len(modes) > 3 and set(modes.values()) == {0o666 & ~mask}, modes
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask


# --- ids that end a turn


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
