"""Reading a checkpoint: names and shapes first, then tensor by tensor into the stacked parameters."""

import contextlib
import math
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from listopd_jax.errors import UserError
from listopd_jax.models.config import ModelConfig
from listopd_jax.models.decoder import abstract
from listopd_jax.models.hf.config import read_config, read_object, resolve
from listopd_jax.models.hf.tensors import INDEX, NAMES, PROJECTIONS, SINGLE, hf_names, to_hf
from listopd_jax.parallel.rules import context_mesh, param_sharding

FLOATS = ("F32", "BF16", "F16", "F64")


def load_hf(source: str | os.PathLike, dtype=jnp.float32) -> tuple[ModelConfig, nnx.State]:
    """Read a checkpoint: (its config, the parameters as `nnx.split(Decoder(config, …))[1]` in `dtype`).

    `source` is a folder with config.json and safetensors (one file, or shards and their index), or a hub id.
    Tensors are read one by one into the stacked arrays: the peak is the model plus its largest stacked array. Under
    a mesh each process reads of each tensor only the slices that its devices hold: its peak in host memory is its
    part of the largest stacked array.
    UserError, naming file and tensor, for whatever is missing, unexpected, doubled, misshapen, blank or not
    finite.
    """
    folder = resolve(source)
    config = read_config(folder)
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        if config.num_layers > len(tensors):
            raise UserError(
                f"{folder}: config.json says {config.num_layers} layers, but there are {len(tensors)} tensors"
            )
        params = abstract(config, param_dtype=dtype)[1]
        _check_names(folder, config, params, tensors)
        flat = [
            (path, p.replace(_read_param(path, p, config, tensors))) for path, p in nnx.to_flat_state(params)
        ]
    return config, nnx.from_flat_state(flat)


def _open_tensors(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, tuple[pathlib.Path, Any]]:
    """Tensor name → (its file, the open file), over one file or the parts of an index."""
    tensors: dict[str, tuple[pathlib.Path, Any]] = {}
    weight_map = None if (folder / SINGLE).exists() else _read_index(folder)
    for name in [SINGLE] if weight_map is None else sorted(set(weight_map.values())):
        path = folder / name
        file = _open_safetensors(path, stack)
        for tensor in file.keys():  # noqa: SIM118 - not a dict
            if tensor in tensors:
                raise UserError(
                    f"{path}: tensor {tensor} is also in {tensors[tensor][0].name}; download both again"
                )
            if weight_map is not None and weight_map.get(tensor) != name:
                raise UserError(
                    f"{path}: tensor {tensor} is not listed for this file in {INDEX}; download both again"
                )
            tensors[tensor] = path, file
    absent = sorted(set(weight_map or ()) - set(tensors))
    if absent:
        raise UserError(
            f"{folder / weight_map[absent[0]]}: tensor {absent[0]} is missing; download the file again"
        )
    return tensors


def _read_index(folder: pathlib.Path) -> dict[str, str]:
    if not (folder / INDEX).exists():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
            raise UserError(
                f"{folder}: has only pickled weights (.bin, .pt), which can run code: refused; convert them: "
                "transformers.AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            )
        raise UserError(
            f"{folder}: holds neither {SINGLE} nor {INDEX}; give the folder of a Hugging Face checkpoint"
        )
    weight_map = read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX}: weight_map must be an object of tensor → file; download it again")
    for name in weight_map.values():
        if not (isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)):
            raise UserError(
                f"{folder / INDEX}: {name!r} is not the name of a safetensors file; download it again"
            )
    return weight_map


def _open_safetensors(path: pathlib.Path, stack: contextlib.ExitStack):
    try:
        # pread for whole tensors: pages of a mapped file count as memory in use until it is closed. But a slice is
        # then read by way of the whole tensor.
        backend = "pread" if context_mesh() is None else "mmap"
        return stack.enter_context(safe_open(path, framework="np", backend=backend))
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file, though {INDEX} names it; download it again") from e
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: not a complete safetensors file ({e}); download it again") from e


def _check_names(folder, config: ModelConfig, params: nnx.State, tensors) -> None:
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
        path, file = tensors[name]
        piece = file.get_slice(name)
        if tuple(piece.get_shape()) != shape:
            raise UserError(
                f"{path}: tensor {name} has shape {tuple(piece.get_shape())}, config.json asks for {shape}; "
                "config.json and weights must be of the same model"
            )
        if piece.get_dtype() not in FLOATS:
            raise UserError(
                f"{path}: tensor {name} has type {piece.get_dtype()}; use weights of a floating-point type"
            )
    _check_surplus(config, expected, tensors)


def _check_surplus(config: ModelConfig, expected, tensors) -> None:
    # Old Llama exports carry the rotary table; it is a constant.
    surplus = {name for name in tensors if name not in expected and not name.endswith("rotary_emb.inv_freq")}
    head, embed = (f"{NAMES[name]}.weight" for name in ("head", "embed"))
    if config.tied and head in surplus:
        if not np.array_equal(tensors[head][1].get_tensor(head), tensors[embed][1].get_tensor(embed)):
            raise UserError(
                f"{tensors[head][0]}: {head} differs from {embed}, but config.json says tie_word_embeddings: "
                "set it to false"
            )
        surplus.remove(head)
    if surplus:
        name = min(surplus)
        raise UserError(
            f"{tensors[name][0]}: tensor {name} is unexpected; config.json and weights must be of the same model"
        )


def _read_param(path: tuple, param: nnx.Variable, config: ModelConfig, tensors) -> jax.Array:
    names = hf_names(path, config.num_layers)
    if context_mesh() is not None:
        return _read_sharded(path, param, names, tensors)
    buffer = _aligned_empty(param.shape, param.dtype)
    for row, name in zip(buffer if path[0] == "layers" else buffer[None], names, strict=True):
        file, opened = tensors[name]
        tensor = opened.get_tensor(name)
        with np.errstate(over="ignore"):  # an overflow becomes an infinity, which is reported next
            if path[-1] in PROJECTIONS:
                _copy_transposed(row, tensor)
            else:
                row[...] = tensor
        _check_values(row, f"{file}: tensor {name}")
    return jax.device_put(buffer)


def _read_sharded(path: tuple, param: nnx.Variable, names: list[str], tensors) -> jax.Array:
    """The parameter at `path` split over the mesh of the context; devices with equal parts share one reading."""
    pieces: dict[str, np.ndarray] = {}

    def piece(index: tuple[slice, ...]) -> np.ndarray:
        if str(index) not in pieces:
            pieces[str(index)] = _read_piece(path, index, param, names, tensors)
        return pieces[str(index)]

    array = jax.make_array_from_callback(param.shape, param_sharding(path, param, context_mesh()), piece)
    rows = array if path[0] == "layers" else array[None]
    finite, blank = (np.asarray(x) for x in _row_checks(rows))
    for name, row_finite, row_blank in zip(names, finite, blank, strict=True):
        _refuse_values(row_finite, row_blank, f"{tensors[name][0]}: tensor {name}", param.dtype)
    return array


def _read_piece(path: tuple, index: tuple[slice, ...], param, names: list[str], tensors) -> np.ndarray:
    """param[index] from the files: of each layer's tensor, only that slice."""
    out = np.empty([len(range(*i.indices(n))) for i, n in zip(index, param.shape, strict=True)], param.dtype)
    rows, shape = out[None], param.shape
    if path[0] == "layers":
        rows, names, index, shape = out, names[index[0]], index[1:], shape[1:]
    for row, name in zip(rows, names, strict=True):
        with np.errstate(over="ignore"):  # an overflow becomes an infinity, which is reported later
            row[...] = _read_slice(tensors[name][1].get_slice(name), path[-1], index, shape)
    return out


def _read_slice(tensor, name: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The part `index` of our parameter of `shape`, from Hugging Face's tensor of it (see `to_hf`)."""
    bounds = [i.indices(size)[:2] for i, size in zip(index, shape, strict=True)]
    if name not in PROJECTIONS:
        return tensor[tuple(slice(*b) for b in bounds)]
    split = len(shape) - 1 if name == "o" else 1  # axes before it are inputs
    rows, columns = _span(bounds[split:], shape[split:]), _span(bounds[:split], shape[:split])
    return tensor[rows, columns].T.reshape([stop - start for start, stop in bounds])


def _span(bounds: list[tuple[int, int]], shape: tuple[int, ...]) -> slice:
    """The bounds of flattened axes; only the first may be cut (heads are, head_dim never is)."""
    inner = math.prod(shape[1:])
    return slice(bounds[0][0] * inner, bounds[0][1] * inner)


@jax.jit
def _row_checks(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether each row is finite, and whether it is all zeros."""
    axes = tuple(range(1, rows.ndim))
    return jnp.isfinite(rows).all(axes), ~jnp.any(rows != 0, axes)


def _check_values(row: np.ndarray, where: str) -> None:
    _refuse_values(np.isfinite(row).all(), not row.any(), where, row.dtype)


def _refuse_values(finite: bool, blank: bool, where: str, dtype) -> None:
    if not finite:
        raise UserError(f"{where} holds NaN or infinities as {dtype}; download it again or load as float32")
    if blank:
        raise UserError(f"{where} is all zeros (blank weights); download it again")


def _aligned_empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Memory at a multiple of 64 bytes, which JAX on a CPU takes over as it is instead of copying it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _copy_transposed(out: np.ndarray, tensor: np.ndarray) -> None:
    """`out`, seen as two axes, becomes `tensor.T`: by blocks of rows, four times faster for the cache."""
    flat, block = out.reshape(tensor.shape[::-1]), 128
    for i in range(0, len(tensor), block):
        flat[:, i : i + block] = tensor[i : i + block].T
