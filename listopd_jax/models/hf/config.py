"""A checkpoint's folder, and its config.json as our ModelConfig and back."""

import os
import pathlib
import re
from typing import Any

import jax.numpy as jnp

from listopd_jax import files
from listopd_jax.errors import UserError, first_line
from listopd_jax.models.config import ModelConfig, RopeScaling

CLASSES = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama", "mistral": "Mistral", "smollm3": "SmolLM3"}
"""transformers' class names by model_type, for the models that Decoder computes."""


MOST_LAYERS = 1000  # a file that claims more is refused


def resolve(source: str | os.PathLike, revision: str | None = None) -> pathlib.Path:
    """The local folder of a checkpoint: `source` itself, or the snapshot of a hub id."""
    folder = pathlib.Path(source)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise UserError(f"{source}: no such folder, and not a hub id of the form owner/name")
    import huggingface_hub

    # No *.bin: pickled weights are refused anyway (stored.py).
    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.txt", "*.jinja"]
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(str(source), revision=revision, allow_patterns=patterns)
        )
    except (OSError, ValueError) as e:
        raise UserError(
            f"{source}: no such folder, and not found on the hub ({first_line(e)}); "
            "check the name and the network, or give a local folder"
        ) from e


def read_config(folder: pathlib.Path) -> ModelConfig:
    """The ModelConfig of folder/config.json; UserError if broken or of a kind that Decoder lacks."""
    path = pathlib.Path(folder) / "config.json"
    _refuse_adapter(pathlib.Path(folder))
    raw = read_object(path)
    try:
        _refuse_unsupported(raw)
        return _parse_config(raw)
    except KeyError as e:
        raise UserError(f"{path}: field {e} is missing; take config.json from the checkpoint's origin") from e
    except TypeError as e:
        raise UserError(
            f"{path}: a field has the wrong type ({e}); take it from the checkpoint's origin"
        ) from e
    except UserError as e:
        raise UserError(f"{path}: {e}") from e


def read_eos_ids(folder: pathlib.Path) -> tuple[int, ...]:
    """Every id that ends a completion of a checkpoint: generation_config.json's, if it has none config.json's.

    UserError if they are not ids.
    """
    path, value = folder / "generation_config.json", None
    if path.exists():
        value = read_object(path).get("eos_token_id")
    if value is None:
        path = folder / "config.json"
        value = read_object(path).get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise UserError(
            f"{path}: eos_token_id {value!r} is neither a token id nor a list of them; correct it"
        )
    return tuple(ids)


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The object that a JSON file of a checkpoint holds; UserError if it is missing or broken."""
    value = files.read_json(path, fix="download it again")
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be a JSON object; download it again")
    return value


def _refuse_adapter(folder: pathlib.Path) -> None:
    """UserError for the folder of an adapter, even next to whole weights: without it they are another model."""
    if found := min(folder.glob("adapter_*"), default=None):
        raise UserError(
            f"{folder}: holds {found.name}, a LoRA or other adapter and not a whole model; give it as student.adapter "
            "with its base model as student.weights, or merge it: "
            "peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW_FOLDER)"
        )


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    kind = raw.get("model_type")
    if kind not in CLASSES:
        raise UserError(f"model_type {kind!r} is not supported; use a checkpoint of {', '.join(CLASSES)}")
    refuse_quantized(raw.get("quantization_config") or raw.get("compression_config"))
    if _slides(raw):
        raise UserError(
            "sliding-window attention is not supported; the model is the same for prompts with answers of up to "
            "sliding_window tokens: if yours are, set it to null, use_sliding_window to false, and delete layer_types"
        )
    activation, architectures = raw.get("hidden_act", "silu"), raw.get("architectures")
    problems = {
        # A Qwen2 has biases on q, k and v whatever this field says.
        "attention_bias true": kind != "qwen2" and raw.get("attention_bias"),
        "mlp_bias true": raw.get("mlp_bias"),
        f"hidden_act {activation!r}": activation != "silu",
        "partial_rotary_factor": raw.get("partial_rotary_factor", 1) != 1,
        f"architectures {architectures}": architectures and not _generates(str(architectures), raw),
    }
    for problem, present in problems.items():
        if present:
            raise UserError(f"{problem} is not supported; use a plain {kind} causal language model")


def refuse_quantized(quantization: Any) -> None:
    """UserError if there is a quantization: GPTQ, AWQ, FP8, bitsandbytes and the like."""
    if quantization:
        method = (
            quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
        )
        raise UserError(
            f"quantized weights ({method}) are not supported; give the checkpoint that they were made from, "
            "usually that of the same name without -FP8, -AWQ, -GPTQ or -4bit"
        )


def _generates(architectures: str, raw: dict[str, Any]) -> bool:
    """Whether a model has a head: the bare decoder, as embedding models are saved, only where it shares its matrix."""
    name = CLASSES[raw["model_type"]]
    bare = bool(re.search(rf"\b{name}Model\b", architectures)) and raw.get("tie_word_embeddings") is True
    return "ForCausalLM" in architectures or bare


def _slides(raw: dict[str, Any]) -> bool:
    """Whether any layer has a sliding window: Qwen switches it on from layer `max_window_layers` upwards."""
    if raw["model_type"] == "mistral":
        return (
            raw.get("sliding_window", 4096) is not None
        )  # 4096 is what transformers takes an absent one for
    if raw.get("layer_types"):
        return "sliding_attention" in raw["layer_types"]
    # 28 is what transformers takes an absent one for.
    first = 0 if raw["model_type"] == "smollm3" else raw.get("max_window_layers", 28)
    return bool(raw.get("use_sliding_window")) and first < raw["num_hidden_layers"]


def _parse_config(raw: dict[str, Any]) -> ModelConfig:
    heads, kind = raw["num_attention_heads"], raw["model_type"]
    theta, scaling = _parse_rope(raw)
    return ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim")
        # As transformers takes an absent one: 128 for a Qwen3 of any width, else hidden_size / heads.
        or (128 if kind == "qwen3" else _default_head_dim(raw["hidden_size"], heads)),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2",
        nope_layers=_nope_layers(raw) if kind == "smollm3" else (),
        tied=raw.get("tie_word_embeddings", kind == "smollm3"),
        max_positions=raw.get("max_position_embeddings", 32768),
    )


def _default_head_dim(hidden: Any, heads: Any) -> int:
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads == 0):
        raise UserError(
            f"hidden_size {hidden!r} is not a multiple of num_attention_heads {heads!r}; state head_dim"
        )
    return hidden // heads


def _nope_layers(raw: dict[str, Any]) -> tuple[int, ...]:
    """SmolLM3's layers without rotary positions: the zeros of its list, else every `no_rope_layer_interval`th."""
    count = raw["num_hidden_layers"]
    if count > MOST_LAYERS:
        raise UserError(f"num_hidden_layers {count}: no published model has that")
    layers, turns = range(count), raw.get("no_rope_layers")
    if turns is None:
        interval = raw.get("no_rope_layer_interval", 4)
        if interval < 1:
            raise UserError(f"no_rope_layer_interval {interval}: no published model has that")
        return tuple(layers[interval - 1 :: interval])
    if not isinstance(turns, list) or len(turns) < len(layers) or not set(turns) <= {0, 1}:
        raise UserError(f"no_rope_layers must be {len(layers)} zeros and ones, one for each layer")
    return tuple(i for i in layers if not turns[i])


def _parse_rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """θ and scaling: rope_theta with rope_scaling (transformers 4), or rope_parameters (transformers 5)."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError("rope_scaling must be an object")
    default = 2e6 if raw["model_type"] == "smollm3" else 1e4
    theta = rope.get("rope_theta", raw.get("rope_theta", default))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1) != 1 or kind not in ("default", "llama3"):
        raise UserError(
            f"rope type {kind!r} is not supported; use a checkpoint with default or llama3 positions"
        )
    if kind == "default":
        return theta, None
    fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return theta, RopeScaling(*(rope[field] for field in fields))


def config_json(config: ModelConfig, dtype, tokenizer) -> dict[str, Any]:
    """config.json in the fields that transformers 4 and 5, and vLLM, all read."""
    c, s = config, config.rope_scaling
    scaling = None if s is None else {"rope_type": "llama3", **vars(s)}
    # Null without a tokenizer: the defaults of a model_type are ids of the first model that had it.
    special = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id", None) for k in ("bos", "eos", "pad")}
    kind = _kind(c)
    if kind == "smollm3":
        special["no_rope_layers"] = [int(i not in c.nope_layers) for i in range(c.num_layers)]
    return {
        "architectures": [f"{CLASSES[kind]}ForCausalLM"],
        "model_type": kind,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "max_position_embeddings": c.max_positions,
        "attention_bias": c.qkv_bias,
        "torch_dtype": jnp.dtype(dtype).name,
        **special,
    }


def _kind(c: ModelConfig) -> str:
    """The model_type that computes what `c` says; a Mistral is a Llama, as it has no window here."""
    if c.nope_layers:
        return "smollm3"
    return "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "llama"
