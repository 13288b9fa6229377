"""LoRA adapters as peft keeps them: adapter_config.json and adapter_model.safetensors, in and out."""

import math
import os
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from listopd_jax import files
from listopd_jax.data.tokenizer import save_tokenizer
from listopd_jax.errors import UserError
from listopd_jax.models.config import PROJECTIONS, Lora, ModelConfig
from listopd_jax.models.hf.config import read_object
from listopd_jax.models.hf.tensors import hf_names
from listopd_jax.models.lora import abstract_adapter
from listopd_jax.parallel.hosts import gather, is_main
from listopd_jax.parallel.rules import place_state

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FOREIGN = (
    "use_dora modules_to_save rank_pattern alpha_pattern fan_in_fan_out lora_bias layer_replication "
    "trainable_token_indices target_parameters use_qalora alora_invocation_tokens"
).split()
"""Fields of peft that make an adapter something other than W + scale · A B when they are set."""
_NAME = re.compile(
    rf"(?:base_model\.model\.)?model\.layers\.(\d+)\.(?:self_attn|mlp)\.({'|'.join(PROJECTIONS)})_proj"
    r"\.lora_([AB])(?:\.default)?\.weight"
)


def save_adapter(
    folder: str | os.PathLike, lora: Lora, params: nnx.State, base: str, tokenizer: Any = None, card: str = ""
) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained` loads on top of the model `base`, a folder or hub id.

    `folder` must be new (UserError); it appears whole or not at all. Every host calls it; the first writes.
    """
    # Before the others leave: gathering takes every host.
    tensors = dict(_peft_tensors(params))
    if not is_main():
        return
    folder = pathlib.Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: already exists and will not be replaced; choose a new folder")
    try:
        with files.atomic_folder(folder, replace=False) as new:
            save_file(tensors, new / TENSORS, metadata={"format": "pt"})
            files.write_json(new / CONFIG, _config_json(lora, base))
            if tokenizer is not None:
                save_tokenizer(tokenizer, new)
            if card:
                (new / "README.md").write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as e:
        raise files.not_written(folder, e, "another folder") from e


def _config_json(lora: Lora, base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [f"{name}_proj" for name in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _peft_tensors(params: nnx.State):
    """(peft's name, host array) of each factor: A is stored [rank, inputs], B [outputs, rank]."""
    for path, param in nnx.to_flat_state(params):
        name, factor = path[-1].split("_lora_")
        for i, weight in enumerate(hf_names(("layers", name), param.shape[0])):
            array = np.asarray(gather(param[i]))
            flat = array.reshape(-1, array.shape[-1]) if factor == "a" else array.reshape(len(array), -1)
            module = weight.removesuffix(".weight")
            yield f"base_model.model.{module}.lora_{factor.upper()}.weight", np.ascontiguousarray(flat.T)


def adapter_files(folder: str | os.PathLike) -> list[pathlib.Path]:
    """The files that an adapter consists of; UserError if there is no such folder, or it holds none."""
    folder = pathlib.Path(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: holds no {CONFIG}; give the folder of a LoRA adapter as peft saves it")
    if not (folder / TENSORS).is_file():
        raise UserError(f"{folder}: holds no {TENSORS}; save the adapter with safe_serialization=True")
    return [folder / CONFIG, folder / TENSORS]


def load_adapter(folder: str | os.PathLike, config: ModelConfig) -> tuple[Lora, nnx.State]:
    """Read an adapter of a model of `config`: what it is, and its parameters in float32; layers without one get zeros.

    UserError, naming file and tensor or field, for whatever is broken, missing or not a plain LoRA of the projections.
    """
    config_path, path = adapter_files(folder)
    rank, alpha = _read_scale(config_path)
    tensors = _read_tensors(path)
    targets = tuple(name for name in PROJECTIONS if any(target == name for _, target, _ in tensors))
    lora = Lora(rank, alpha, targets)
    flat = []
    for where, param in nnx.to_flat_state(abstract_adapter(config, lora)):
        name, factor = where[-1].split("_lora_")
        rows = [tensors.pop((i, name, factor), None) for i in range(config.num_layers)]
        flat.append((where, param.replace(_stack(path, where[-1], rows, param.shape))))
    if tensors:
        layer, name, _ = min(tensors)
        raise UserError(
            f"{path}: adapts {name}_proj of layer {layer}, which it lacks; give its own base model"
        )
    return lora, place_state(nnx.from_flat_state(flat))


def _read_scale(path: pathlib.Path) -> tuple[int, float]:
    """Rank and alpha, with which the scale is alpha/rank."""
    raw = read_object(path)
    if raw.get("peft_type") != "LORA" or raw.get("bias", "none") != "none":
        raise UserError(f"{path}: only LoRA adapters without bias are supported; merge it with peft")
    if foreign := next((field for field in FOREIGN if raw.get(field)), None):
        raise UserError(
            f"{path}: {foreign} is not supported; merge the adapter with peft: merge_and_unload()"
        )
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    numbers = all(
        isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < 2**31 for x in (rank, alpha)
    )
    if not numbers or not isinstance(rank, int):
        raise UserError(
            f"{path}: r={rank!r} and lora_alpha={alpha!r} must be a whole number and a number above 0"
        )
    # rsLoRA scales by alpha/√rank; in our alpha/rank that is an alpha √rank times as large.
    return rank, float(alpha) * (math.sqrt(rank) if raw.get("use_rslora") else 1.0)


def _read_tensors(path: pathlib.Path) -> dict[tuple[int, str, str], np.ndarray]:
    """(layer, projection, a or b) → factor as stored."""
    tensors = {}
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if not (found := _NAME.fullmatch(name)):
                    raise UserError(
                        f"{path}: tensor {name} is none of a LoRA of {', '.join(PROJECTIONS)}; merge it with peft"
                    )
                tensors[int(found[1]), found[2], found[3].lower()] = file.get_tensor(name).astype(np.float32)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: not a complete safetensors file ({e}); save the adapter again") from e
    pairs = {key[:2] for key in tensors}
    if not pairs or len(tensors) != 2 * len(pairs):
        raise UserError(f"{path}: lora_A and lora_B must come in pairs; save the adapter again")
    return tensors


def _stack(
    path: pathlib.Path, name: str, rows: list[np.ndarray | None], shape: tuple[int, ...]
) -> np.ndarray:
    """The factor of all layers as we have it, zeros where a layer has none."""
    inputs = math.prod(shape[1:-1]) if name.endswith("_a") else shape[1]
    stored = (math.prod(shape[1:]) // inputs, inputs)
    there = {i: row for i, row in enumerate(rows) if row is not None}
    for i, row in there.items():
        if row.shape != stored:
            raise UserError(
                f"{path}: {name} of layer {i} has shape {row.shape}, the model asks for {stored}; give its own adapter"
            )
        if not np.isfinite(row).all():
            raise UserError(f"{path}: {name} of layer {i} holds NaN or infinities; save the adapter again")
    out = np.zeros((len(rows), inputs, stored[0]), np.float32)
    for i, row in there.items():
        out[i] = row.T
    return jnp.asarray(out.reshape(shape))
