"""Named model shapes against the published ones, and refusal of impossible shapes."""

import dataclasses

import pytest

from listopd_jax.errors import UserError
from listopd_jax.models.config import NAMED_CONFIGS, ModelConfig, RopeScaling, named_config, num_params

TINY = ModelConfig(97, 64, 96, 2, 8, 2, 24)

# (parameters, without embedding tables) in billions, from the model cards of Qwen3 and of Llama 3.2, SmolLM2.
PUBLISHED = {
    "qwen3_0_6b": (0.6, 0.44),
    "qwen3_1_7b": (1.7, 1.4),  # printed with two digits
    "qwen3_4b": (4.0, 3.6),
    "qwen3_8b": (8.2, 6.95),
    "qwen3_14b": (14.8, 13.2),
    "qwen3_32b": (32.8, 31.2),
    "llama3_2_1b": (1.24, None),
    "llama3_2_3b": (3.21, None),
    "smollm2_135m": (0.135, None),
}


@pytest.mark.parametrize("name", NAMED_CONFIGS)
def test_sizes_are_those_of_the_model_cards(name):
    config, (total, body) = named_config(name), PUBLISHED[name]
    assert num_params(config) / 1e9 == pytest.approx(total, rel=0.02)
    if body is not None:
        tables = config.vocab_size * config.hidden_size * (1 if config.tied else 2)
        assert (num_params(config) - tables) / 1e9 == pytest.approx(body, rel=0.02)


@pytest.mark.parametrize("name", NAMED_CONFIGS)
def test_count_equals_transformers(name):
    """Built on torch's meta device from the config.json that we would export."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    from listopd_jax.models.hf.config import config_json

    raw = config_json(named_config(name), "bfloat16", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    assert num_params(named_config(name)) == model.num_parameters()


def test_named_config_suggests_the_closest():
    with pytest.raises(UserError, match="did you mean 'qwen3_1_7b'.*known: qwen3_0_6b, "):
        named_config("qwen3-1.7b")
    with pytest.raises(UserError, match=r"model='x' is unknown; known"):
        named_config("x")


def test_hashable_and_frozen():
    assert hash(TINY) == hash(dataclasses.replace(TINY))
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.num_layers = 3


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 0},
        {"hidden_size": -64},
        {"vocab_size": 2**40},
        {"vocab_size": 97.0},
        {"vocab_size": "97"},
        {"num_heads": True},
        {"num_heads": 7},
        {"head_dim": 23},
        {"rope_theta": float("nan")},
        {"norm_eps": 0},
        {"tied": 1},
    ],
)
def test_impossible_shapes_are_refused_by_name(change):
    with pytest.raises(UserError, match=next(iter(change))):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize("values", [(0.5, 1.0, 4.0, 8), (8.0, 4.0, 1.0, 8), (8.0, 1.0, 4.0, "8")])
def test_impossible_scaling_is_refused(values):
    with pytest.raises(UserError):
        RopeScaling(*values)
