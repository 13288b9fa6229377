"""Hugging Face checkpoints in and out: the only place that knows their names, shapes and config.json."""

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from listopd_jax.errors import UserError
from listopd_jax.models.config import ModelConfig, RopeScaling
from listopd_jax.models.decoder import abstract
from listopd_jax.parallel.hosts import gather, is_main
from listopd_jax.parallel.rules import context_mesh, param_sharding

NAMES = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
FLOATS = ("F32", "BF16", "F16", "F64")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def load_hf(
    source: str | os.PathLike, dtype=jnp.float32, revision: str | None = None
) -> tuple[ModelConfig, nnx.State]:
    """Read a checkpoint: (its config, the parameters as `nnx.split(Decoder(config, …))[1]` in `dtype`).

    `source` is a folder with config.json and safetensors (one file, or shards and their index), or a hub id.
    Tensors are read one by one into the stacked arrays: the peak is the model plus its largest stacked array. Under
    a mesh each process reads of each tensor only the slices that its devices hold: its peak in host memory is its
    part of the largest stacked array.
    UserError, naming file and tensor, for whatever is missing, unexpected, doubled, misshapen, blank or not
    finite.
    """
    folder = resolve(source, revision)
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


def resolve(source: str | os.PathLike, revision: str | None = None) -> pathlib.Path:
    """The local folder of a checkpoint: `source` itself, or the snapshot of a hub id."""
    folder = pathlib.Path(source)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise UserError(f"{source}: no such folder, and not a hub id of the form owner/name")
    import huggingface_hub

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.txt", "*.jinja"]
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(str(source), revision=revision, allow_patterns=patterns)
        )
    except (OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"{source}: no such folder, and not to be had from the hub ({reason}); "
            "check the name and the network, or give a local folder"
        ) from e


def read_config(folder: pathlib.Path) -> ModelConfig:
    """The ModelConfig of folder/config.json; UserError if broken or of a kind that Decoder lacks."""
    path = pathlib.Path(folder) / "config.json"
    raw = _read_json(path)
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


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file; give the folder of a Hugging Face checkpoint") from e
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: not readable as JSON ({e}); download it again") from e
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be a JSON object; download it again")
    return value


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    kind = raw.get("model_type")
    if kind not in ("qwen3", "llama"):
        raise UserError(f"model_type {kind!r} is not supported; use a qwen3 or llama checkpoint")
    activation, architectures = raw.get("hidden_act", "silu"), raw.get("architectures")
    problems = {
        "attention_bias true": raw.get("attention_bias"),
        "mlp_bias true": raw.get("mlp_bias"),
        "sliding-window attention": _slides(raw),
        "quantization_config": raw.get("quantization_config"),
        f"hidden_act {activation!r}": activation != "silu",
        "partial_rotary_factor": raw.get("partial_rotary_factor", 1) != 1,
        f"architectures {architectures}": architectures and "ForCausalLM" not in str(architectures),
    }
    for problem, present in problems.items():
        if present:
            raise UserError(f"{problem} is not supported; use a plain qwen3 or llama causal language model")


def _slides(raw: dict[str, Any]) -> bool:
    """Whether any layer has a sliding window: Qwen3 switches it on from layer `max_window_layers` upwards."""
    if raw.get("layer_types"):
        return "sliding_attention" in raw["layer_types"]
    return bool(raw.get("use_sliding_window")) and raw.get("max_window_layers", 28) < raw["num_hidden_layers"]


def _parse_config(raw: dict[str, Any]) -> ModelConfig:
    heads, qwen3 = raw["num_attention_heads"], raw["model_type"] == "qwen3"
    theta, scaling = _parse_rope(raw)
    return ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or (128 if qwen3 else _default_head_dim(raw["hidden_size"], heads)),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        qk_norm=qwen3,
        tied=raw.get("tie_word_embeddings", False),
        max_positions=raw.get("max_position_embeddings", 32768),
    )


def _default_head_dim(hidden: Any, heads: Any) -> int:
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads == 0):
        raise UserError(
            f"hidden_size {hidden!r} is not a multiple of num_attention_heads {heads!r}; state head_dim"
        )
    return hidden // heads


def _parse_rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """θ and scaling: rope_theta with rope_scaling (transformers 4), or rope_parameters (transformers 5)."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError("rope_scaling must be an object")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1) != 1 or kind not in ("default", "llama3"):
        raise UserError(
            f"rope type {kind!r} is not supported; use a checkpoint with default or llama3 positions"
        )
    if kind == "default":
        return theta, None
    fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return theta, RopeScaling(*(rope[field] for field in fields))


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
    weight_map = _read_json(folder / INDEX).get("weight_map")
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
        shape = jax.eval_shape(lambda a, name=path[-1]: _to_hf(name, a), row).shape
        expected.update(dict.fromkeys(_hf_names(path, config.num_layers), shape))
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


def _hf_names(path: tuple, num_layers: int) -> list[str]:
    """Names of the tensors behind one of our parameters: one, or one per layer."""
    if path[0] != "layers":
        return [f"{NAMES[path[0]]}.weight"]
    return [f"model.layers.{i}.{LAYER_NAMES[path[-1]]}.weight" for i in range(num_layers)]


def _read_param(path: tuple, param: nnx.Variable, config: ModelConfig, tensors) -> jax.Array:
    names = _hf_names(path, config.num_layers)
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
    """The part `index` of our parameter of `shape`, from Hugging Face's tensor of it (see `_to_hf`)."""
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


def _copy_transposed(out: np.ndarray, tensor: np.ndarray, block: int = 128) -> None:
    """`out`, seen as two axes, becomes `tensor.T`: by blocks of rows, four times faster for the cache."""
    flat = out.reshape(tensor.shape[::-1])
    for i in range(0, len(tensor), block):
        flat[:, i : i + block] = tensor[i : i + block].T


def save_hf(
    folder: str | os.PathLike,
    config: ModelConfig,
    params: nnx.State,
    tokenizer=None,
    dtype=None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a checkpoint that `AutoModelForCausalLM.from_pretrained` loads: Qwen3 if `qk_norm`, else Llama.

    `dtype` casts the weights (None keeps their own: a round trip is then exact bit for bit). The folder
    appears whole or not at all; an earlier export in its place is replaced, any other folder with files in it
    is refused (UserError). Every host calls it, for its parts of the weights; the first writes.
    """
    if not is_main():
        for _ in hf_tensors(params, dtype):
            pass
        return
    folder = pathlib.Path(folder)
    _check_replaceable(folder)
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        _write_shards(temporary, config, params, dtype, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        weights = dtype or jax.tree.leaves(params)[0].dtype
        _write_json(temporary / "config.json", _config_json(config, weights, tokenizer))
        _put_in_place(temporary, folder)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{folder}: cannot be written ({e}); free space or choose another folder") from e
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def hf_tensors(params: nnx.State, dtype=None) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face name, host array) of each parameter (or gradient), one at a time, in `dtype` if given."""
    for path, param in nnx.to_flat_state(params):
        rows = param[...] if path[0] == "layers" else param[...][None]
        for i, name in enumerate(_hf_names(path, len(rows))):
            yield name, np.ascontiguousarray(np.asarray(_to_hf(path[-1], gather(rows[i])), dtype))


def _to_hf(name: str, array: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Our [inputs…, outputs…] projection as Hugging Face's [outputs, inputs]; anything else as it is."""
    if name not in PROJECTIONS:
        return array
    inputs = math.prod(array.shape[:-1]) if name == "o" else array.shape[0]
    return array.reshape(inputs, -1).T


def _check_replaceable(folder: pathlib.Path) -> None:
    if not folder.exists():
        return
    entries = list(folder.iterdir()) if folder.is_dir() else [folder]
    ours = any(e.name == "config.json" for e in entries) and any(e.suffix == ".safetensors" for e in entries)
    if entries and not (ours and all(e.is_file() for e in entries)):
        raise UserError(f"{folder}: is not an earlier export and will not be replaced; choose a new folder")


def _put_in_place(temporary: pathlib.Path, folder: pathlib.Path) -> None:
    os.chmod(temporary, 0o755)
    for path in temporary.iterdir():
        with open(path, "rb") as f:
            os.fsync(f.fileno())
    if folder.exists():
        retired = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        os.replace(folder, retired)
        os.replace(temporary, folder)
        shutil.rmtree(retired)
    else:
        os.replace(temporary, folder)


def _write_shards(
    folder: pathlib.Path, config: ModelConfig, params: nnx.State, dtype, max_shard_bytes: int
) -> None:
    """Fill one shard after the other, so that memory holds no more than one; then name and index them."""
    parts, shard, size, total = [], {}, 0, 0
    for name, array in hf_tensors(params, dtype):
        if shard and size + array.nbytes > max_shard_bytes:
            parts.append(_write_part(folder, len(parts), shard))
            shard, size = {}, 0
        shard[name] = array
        size, total = size + array.nbytes, total + array.nbytes
    parts.append(_write_part(folder, len(parts), shard))
    if len(parts) == 1:
        os.replace(folder / "part-0", folder / SINGLE)
        return
    weight_map = {}
    for i, names in enumerate(parts):
        final = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        os.replace(folder / f"part-{i}", folder / final)
        weight_map |= dict.fromkeys(names, final)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_part(folder: pathlib.Path, index: int, shard: dict[str, np.ndarray]) -> list[str]:
    save_file(shard, folder / f"part-{index}", metadata={"format": "pt"})
    return list(shard)


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _config_json(config: ModelConfig, dtype, tokenizer) -> dict[str, Any]:
    """config.json in the fields that transformers 4 and 5, and vLLM, all read."""
    c, s = config, config.rope_scaling
    scaling = None if s is None else {"rope_type": "llama3", **vars(s)}
    special = (
        {}
        if tokenizer is None
        else {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    )
    return {
        "architectures": ["Qwen3ForCausalLM" if c.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if c.qk_norm else "llama",
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
        "attention_bias": False,
        "torch_dtype": jnp.dtype(dtype).name,
        **special,
    }
