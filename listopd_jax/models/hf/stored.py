"""The tensors that a checkpoint's folder stores, by the names that they have in a causal language model."""

import contextlib
import pathlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from listopd_jax.errors import UserError, denied
from listopd_jax.models.config import ModelConfig
from listopd_jax.models.hf.config import read_object, refuse_quantized
from listopd_jax.models.hf.tensors import INDEX, NAMES, SINGLE, hf_names, to_hf
from listopd_jax.parallel.rules import context_mesh

FLOATS = ("F32", "BF16", "F16", "F64")
_EMBED, _HEAD = (f"{NAMES[name]}.weight" for name in ("embed", "head"))
_QUANTIZED = re.compile(r"\.(qweight|qzeros|weight_packed|weight_scale(_inv)?|weight\.(absmax|quant_map))$")
_ANCHOR = "layers.0.input_layernorm.weight"  # of every model, once: what precedes it precedes all names


class Stored(NamedTuple):
    """A tensor in an open safetensors file, under its own name there."""

    path: pathlib.Path
    file: Any
    name: str

    def __str__(self) -> str:
        return f"{self.path}: tensor {self.name}"

    def read(self) -> np.ndarray:
        """All of it."""
        return self.file.get_tensor(self.name)

    def slices(self) -> Any:
        """A handle to its shape, type and slices that does not read it."""
        return self.file.get_slice(self.name)


Tensors = dict[str, Stored]


def open_tensors(
    folder: pathlib.Path, config: ModelConfig, params: nnx.State, stack: contextlib.ExitStack
) -> Tensors:
    """The tensors behind `params`, open until `stack` closes, names and shapes checked.

    UserError, naming file and tensor, for whatever is missing, unexpected, doubled or misshapen, and for the folder of
    an adapter.
    """
    tensors = _open_files(folder, stack)
    if adapted := next((stored for name, stored in tensors.items() if ".lora_" in name), None):
        raise UserError(
            f"{adapted} is of a LoRA adapter; merge it into the model first (peft: merge_and_unload)"
        )
    if quantized := next((t for name, t in tensors.items() if _QUANTIZED.search(name)), None):
        refuse_quantized(f"tensor {quantized.name} of {quantized.path}")
    if config.num_layers > len(tensors):
        raise UserError(
            f"{folder}: config.json says {config.num_layers} layers, but there are {len(tensors)} tensors"
        )
    tensors = _named(tensors, config)
    _check_names(folder, config, params, tensors)
    return tensors


# --- files


def _open_files(folder: pathlib.Path, stack: contextlib.ExitStack) -> Tensors:
    """Name in its file → tensor, over one file or the parts of an index."""
    tensors: Tensors = {}
    weight_map = _weight_map(folder)
    for name in [SINGLE] if weight_map is None else sorted(set(weight_map.values())):
        path = folder / name
        file = _open_safetensors(path, stack)
        for tensor in file.keys():  # noqa: SIM118 - not a dict
            if tensor in tensors:
                raise UserError(
                    f"{path}: tensor {tensor} is also in {tensors[tensor].path.name}; download both again"
                )
            if weight_map is not None and weight_map.get(tensor) != name:
                raise UserError(
                    f"{path}: tensor {tensor} is not listed for this file in {INDEX}; download both again"
                )
            tensors[tensor] = Stored(path, file, tensor)
    absent = sorted(set(weight_map or ()) - set(tensors))
    if absent:
        raise UserError(
            f"{folder / weight_map[absent[0]]}: tensor {absent[0]} is missing; download the file again"
        )
    return tensors


def _weight_map(folder: pathlib.Path) -> dict[str, str] | None:
    """Tensor → file of the index; None where one file holds all. UserError if the folder has two models, or none."""
    single, index = (folder / SINGLE).exists(), (folder / INDEX).exists()
    if not (index or single):
        raise _no_weights(folder)
    if not index:
        return None
    weight_map = read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX}: weight_map must be an object of tensor → file; download it again")
    for name in weight_map.values():
        if not (isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)):
            raise UserError(
                f"{folder / INDEX}: {name!r} is not the name of a safetensors file; download it again"
            )
    if single and SINGLE not in weight_map.values():
        raise UserError(
            f"{folder}: holds {SINGLE}, and {INDEX} that names other files; delete the one that is out of date"
        )
    return weight_map


def _no_weights(folder: pathlib.Path) -> UserError:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return UserError(
            f"{folder}: has only pickled weights (.bin, .pt), which can run code: refused; convert them: "
            "transformers.AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    return UserError(
        f"{folder}: holds neither {SINGLE} nor {INDEX}; give the folder of a Hugging Face checkpoint"
    )


def _open_safetensors(path: pathlib.Path, stack: contextlib.ExitStack):
    try:
        # pread for whole tensors: pages of a mapped file count as memory in use until it is closed. But a slice is
        # then read by way of the whole tensor.
        backend = "pread" if context_mesh() is None else "mmap"
        return stack.enter_context(safe_open(path, framework="np", backend=backend))
    except FileNotFoundError as e:  # safetensors raises this for an unreadable file, too
        if path.exists():
            raise UserError(denied(path)) from e
        raise UserError(f"{path}: no such file, though {INDEX} names it; download it again") from e
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: not a complete safetensors file ({e}); download it again") from e


# --- names


def _named(tensors: Tensors, config: ModelConfig) -> Tensors:
    """The tensors under the names that a causal language model saves them by.

    A bare decoder (embedding models) has none of the `model.`; wrappers put more before it. The matrix that embedding
    and head share may be stored as either.
    """
    prefixes = [name.removesuffix(_ANCHOR) for name in tensors if f".{name}".endswith(f".{_ANCHOR}")]
    if len(prefixes) == 1:
        prefix = prefixes[0]
        head = prefix.removesuffix("model.") + _HEAD
        inner = {n: f"model.{n[len(prefix) :]}" for n in tensors if n.startswith(prefix)}
        names = inner | ({head: _HEAD} if head in tensors else {})
        tensors = {names.get(name, name): stored for name, stored in tensors.items()}
    if config.tied and _EMBED not in tensors and _HEAD in tensors:
        tensors = {_EMBED if name == _HEAD else name: stored for name, stored in tensors.items()}
    return tensors


def _check_names(folder: pathlib.Path, config: ModelConfig, params: nnx.State, tensors: Tensors) -> None:
    expected = {}
    for path, param in nnx.to_flat_state(params):
        row = jax.ShapeDtypeStruct(param.shape[1:] if path[0] == "layers" else param.shape, param.dtype)
        shape = jax.eval_shape(lambda a, name=path[-1]: to_hf(name, a), row).shape
        expected.update(dict.fromkeys(hf_names(path, config.num_layers), shape))
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(
                f"{folder}: tensor {name} is missing; config.json and weights must be of the same model"
            )
        stored, piece = tensors[name], tensors[name].slices()
        if tuple(piece.get_shape()) != shape:
            raise UserError(
                f"{stored} has shape {tuple(piece.get_shape())}, config.json asks for {shape}; "
                "config.json and weights must be of the same model"
            )
        if piece.get_dtype() not in FLOATS:
            raise UserError(f"{stored} has type {piece.get_dtype()}; use weights of a floating-point type")
    _check_surplus(config, expected, tensors)


def _check_surplus(config: ModelConfig, expected: dict[str, tuple[int, ...]], tensors: Tensors) -> None:
    # Old Llama exports carry the rotary table; it is a constant.
    surplus = {name for name in tensors if name not in expected and not name.endswith("rotary_emb.inv_freq")}
    if config.tied and _HEAD in surplus:
        if not np.array_equal(tensors[_HEAD].read(), tensors[_EMBED].read()):
            raise UserError(
                f"{tensors[_HEAD].path}: {_HEAD} differs from {_EMBED}, but config.json says tie_word_embeddings: "
                "set it to false"
            )
        surplus.remove(_HEAD)
    if surplus:
        raise UserError(
            f"{tensors[min(surplus)]} is unexpected; config.json and weights must be of the same model"
        )
