"""How Hugging Face names, shapes and stores the tensors behind our parameters."""

import math

import jax
import numpy as np

from listopd_jax.models.config import PROJECTIONS

NAMES = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_bias": "self_attn.q_proj",
    "k_bias": "self_attn.k_proj",
    "v_bias": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
BIASES = ("q_bias", "k_bias", "v_bias")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def hf_names(path: tuple, num_layers: int) -> list[str]:
    """Names of the tensors behind one of our parameters: one, or one per layer."""
    if path[0] != "layers":
        return [f"{NAMES[path[0]]}.weight"]
    kind = "bias" if path[-1] in BIASES else "weight"
    return [f"model.layers.{i}.{LAYER_NAMES[path[-1]]}.{kind}" for i in range(num_layers)]


def to_hf(name: str, array: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Our [inputs…, outputs…] projection as Hugging Face's [outputs, inputs], biases flat; anything else as it is."""
    if name in BIASES:
        return array.reshape(-1)
    if name not in PROJECTIONS:
        return array
    inputs = math.prod(array.shape[:-1]) if name == "o" else array.shape[0]
    return array.reshape(inputs, -1).T
