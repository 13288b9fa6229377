"""Writing a checkpoint that transformers, vLLM and `load_hf` read; the folder appears whole or not at all."""

import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import save_file

from listopd_jax import files
from listopd_jax.data.tokenizer import save_tokenizer
from listopd_jax.errors import UserError
from listopd_jax.models.config import ModelConfig
from listopd_jax.models.hf.config import config_json
from listopd_jax.models.hf.tensors import INDEX, SINGLE, hf_names, to_hf
from listopd_jax.parallel.hosts import gather, is_main

SHARD_BYTES = 5_000_000_000


def save_hf(
    folder: str | os.PathLike,
    config: ModelConfig,
    params: nnx.State,
    tokenizer=None,
    dtype=None,
    max_shard_bytes: int = SHARD_BYTES,
    ends: Sequence[int] = (),
    card: str = "",
    replace: bool = True,
) -> None:
    """Write a checkpoint that `AutoModelForCausalLM.from_pretrained` loads, of the class that `config` asks for.

    `dtype` casts the weights (None keeps their own: a round trip is then exact bit for bit). `ends` are the ids that
    end a completion, for generation_config.json; `card` is the text of README.md. The folder appears whole or not at
    all; an earlier export in its place is replaced if `replace`, any other folder with files in it is refused
    (UserError). Every host calls it, for its parts of the weights; the first writes.
    """
    if not is_main():
        # Gathering takes every host; only the first one keeps what it gets.
        for _ in hf_tensors(params, dtype):
            pass
        return
    folder = pathlib.Path(folder)
    _check_replaceable(folder, replace)
    weights = dtype or jax.tree.leaves(params)[0].dtype
    try:
        with files.atomic_folder(folder, replace) as new:
            write_shards(new, hf_tensors(params, dtype), max_shard_bytes)
            if tokenizer is not None:
                save_tokenizer(tokenizer, new)
            files.write_json(new / "config.json", config_json(config, weights, tokenizer))
            if ends:
                files.write_json(new / "generation_config.json", {"eos_token_id": list(ends)})
            if card:
                (new / "README.md").write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as e:
        raise files.not_written(folder, e, "another folder") from e


def hf_tensors(params: nnx.State, dtype=None) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face name, host array) of each parameter (or gradient), one at a time, in `dtype` if given."""
    for path, param in nnx.to_flat_state(params):
        rows = param[...] if path[0] == "layers" else param[...][None]
        for i, name in enumerate(hf_names(path, len(rows))):
            yield name, np.ascontiguousarray(np.asarray(to_hf(path[-1], gather(rows[i])), dtype))


def _check_replaceable(folder: pathlib.Path, replace: bool) -> None:
    if not folder.exists():
        return
    entries = list(folder.iterdir()) if folder.is_dir() else [folder]
    ours = any(e.name == "config.json" for e in entries) and any(e.suffix == ".safetensors" for e in entries)
    if entries and not replace:
        raise UserError(f"{folder}: already exists and will not be replaced; choose a new folder")
    if entries and not (ours and all(e.is_file() for e in entries)):
        raise UserError(f"{folder}: is not an earlier export and will not be replaced; choose a new folder")


def write_shards(
    folder: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int = SHARD_BYTES
) -> None:
    """Fill one shard after the other, so that memory holds no more than one; then name and index them."""
    parts, shard, size, total = [], {}, 0, 0
    for name, array in tensors:
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
        # Named last, because a name says how many shards there are.
        final = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        os.replace(folder / f"part-{i}", folder / final)
        weight_map |= dict.fromkeys(names, final)
    files.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_part(folder: pathlib.Path, index: int, shard: dict[str, np.ndarray]) -> list[str]:
    save_file(shard, folder / f"part-{index}", metadata={"format": "pt"})
    return list(shard)
