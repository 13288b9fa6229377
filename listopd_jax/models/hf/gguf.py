"""A GGUF file (llama.cpp's format: weights, sizes and tokenizer in one) as the folder of a Hugging Face checkpoint.

Quantised weights become the float32 numbers that they stand for, so the folder is the same model to the last bit.
"""

import contextlib
import functools
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tokenizers
import transformers
from absl import logging
from jaxtyping import Float
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from listopd_jax import files
from listopd_jax.data import manifest
from listopd_jax.data.tokenizer import save_tokenizer
from listopd_jax.errors import UserError, one_line
from listopd_jax.models.config import ModelConfig
from listopd_jax.models.hf.config import config_json
from listopd_jax.models.hf.load import check_hf
from listopd_jax.models.hf.save import write_shards
from listopd_jax.models.hf.tensors import LAYER_NAMES, NAMES

ARCHITECTURES = ("llama", "qwen3")
TOP = {"token_embd": "embed", "output_norm": "final_norm", "output": "head"}
LAYER = {
    "attn_norm": "attn_norm", "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o",
    "attn_q_norm": "q_norm", "attn_k_norm": "k_norm",
    "ffn_norm": "mlp_norm", "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down",
}  # fmt: skip
_NORMAL, _CONTROL = 1, 3  # of tokenizer.ggml.token_type; the others are added tokens that are not special

_BYTES = functools.partial(pre_tokenizers.ByteLevel, add_prefix_space=False)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SPLITS = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), _BYTES(use_regex=True)],
    "qwen2": [pre_tokenizers.Split(tokenizers.Regex(_QWEN2), "isolated"), _BYTES(use_regex=False)],
    "llama-bpe": [pre_tokenizers.Split(tokenizers.Regex(_LLAMA3), "isolated"), _BYTES(use_regex=False)],
}
"""How text is cut before merging, by tokenizer.ggml.pre. None is guessed: a wrong cut gives other ids and no error."""


class Gguf(NamedTuple):
    """An open GGUF file: its path, its metadata by key, its tensors by name (gguf.ReaderTensor)."""

    path: pathlib.Path
    fields: dict[str, Any]
    tensors: dict[str, Any]

    def field(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or of `{arch}.key` as "*.key"; UserError if it is neither there nor has a default."""
        key = key.replace("*", self.fields.get("general.architecture", "?"))
        value = self.fields.get(key, default)
        if value is None:
            raise UserError(f"{self.path}: metadata field {key} is missing; download the file again")
        return value


def gguf_folder(path: str | os.PathLike) -> pathlib.Path:
    """The folder of a Hugging Face checkpoint made of the GGUF file `path`; made once, kept in the user's cache.

    UserError for a file that is missing, damaged, known with another digest, or of a model that Decoder lacks.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a GGUF file")
    _verify(path)
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    folder = cache / "listopd_jax" / "gguf" / files.sha256(path)[:16]
    if not (folder / "config.json").exists():
        logging.info("%s: unpacked to %s", path, folder)
        convert(path, folder)
    return folder


def _verify(path: pathlib.Path) -> None:
    for entry in manifest.artefacts():
        if any(known["path"] == path.name for known in entry["files"]):
            manifest.verify(path, entry["name"])


def convert(path: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Write the checkpoint in the GGUF file `path` as `folder`, whole or not at all; UserError as `gguf_folder`."""
    gguf = _open(pathlib.Path(path))
    with _well_formed(gguf):
        config, tokenizer = _config(gguf), _tokenizer(gguf)
        # eos ends a text, eot a turn; chat models may have both.
        ends = {gguf.fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")} - {None}
    try:
        with files.atomic_folder(folder) as new:
            write_shards(new, _hf_tensors(gguf, config))
            save_tokenizer(tokenizer, new)
            files.write_json(new / "config.json", config_json(config, np.float32, tokenizer))
            files.write_json(new / "generation_config.json", {"eos_token_id": sorted(ends)})
            # Still in the temporary folder: what does not fit its own config.json never gets into the cache.
            check_hf(new)
    except OSError as e:
        raise files.not_written(folder, e, "another XDG_CACHE_HOME") from e


def _open(path: pathlib.Path) -> Gguf:
    try:
        from gguf import GGUFReader
    except ImportError as e:
        raise UserError(f"{path}: GGUF files need the gguf package; pip install 'listopd_jax[gguf]'") from e
    try:
        reader = GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        return Gguf(path, fields, {t.name: t for t in reader.tensors})
    except Exception as e:  # the reader indexes into the file without checks: a damaged one ends anywhere
        raise UserError(f"{path}: not a complete GGUF file ({one_line(e)[:100]}); download it again") from e


@contextlib.contextmanager
def _well_formed(gguf: Gguf) -> Iterator[None]:
    """A UserError for metadata of a wrong type or length: code that reads it, in Rust too, raises anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(
            f"{gguf.path}: metadata of the wrong form ({one_line(e)}); download the file again"
        ) from e


def _config(gguf: Gguf) -> ModelConfig:
    """The sizes in the metadata; UserError for what Decoder does not compute."""
    kind = gguf.field("general.architecture")
    # Llama 3.1's stretching is not in the metadata: it is a tensor of factors.
    scaled = gguf.field("*.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in gguf.tensors
    if kind not in ARCHITECTURES or scaled:
        what = "scaled rotary positions" if scaled else f"general.architecture {kind!r}"
        raise UserError(
            f"{gguf.path}: {what}: not read from GGUF files; use the model's safetensors checkpoint"
        )
    heads, hidden = gguf.field("*.attention.head_count"), gguf.field("*.embedding_length")
    return ModelConfig(
        vocab_size=len(gguf.field("tokenizer.ggml.tokens")),
        hidden_size=hidden,
        intermediate_size=gguf.field("*.feed_forward_length"),
        num_layers=gguf.field("*.block_count"),
        num_heads=heads,
        num_kv_heads=gguf.field("*.attention.head_count_kv", heads),
        head_dim=gguf.field("*.attention.key_length", hidden // heads),
        rope_theta=float(gguf.field("*.rope.freq_base", 10000.0)),
        norm_eps=_decimal(gguf.field("*.attention.layer_norm_rms_epsilon")),
        qk_norm=kind == "qwen3",
        tied="output.weight" not in gguf.tensors,
        max_positions=gguf.field("*.context_length"),
    )


def _decimal(x: float) -> float:
    """The short decimal that was rounded to float32: 1e-5 of 9.999999747378752e-06."""
    return float(str(np.float32(x)))


def _hf_tensors(gguf: Gguf, config: ModelConfig) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
    """(Hugging Face name, float32 array) of each tensor, one at a time."""
    from gguf.quants import dequantize

    for name, tensor in gguf.tensors.items():
        try:
            array = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        except NotImplementedError as e:
            raise UserError(
                f"{gguf.path}: tensor {name} is quantised as {tensor.tensor_type.name}, which the gguf package does "
                "not decode; use a Q4_1, Q8_0 or F16 file"
            ) from e
        with _well_formed(gguf):
            array = _plain_rotation(gguf, name, array, config)
        yield _hf_name(gguf.path, name), array


def _hf_name(path: pathlib.Path, name: str) -> str:
    """Hugging Face's name of a GGUF tensor."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if layer and layer[2] in LAYER:
        return f"model.layers.{layer[1]}.{LAYER_NAMES[LAYER[layer[2]]]}.weight"
    if (top := name.removesuffix(".weight")) in TOP:
        return f"{NAMES[TOP[top]]}.weight"
    raise UserError(f"{path}: tensor {name} is of a model that is not supported; use a plain llama or qwen3")


def _plain_rotation(gguf: Gguf, name: str, array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """llama.cpp keeps the rows of llama's q and k as rotated pairs (0, 1), (2, 3), …; ours are (0, H/2), …"""
    kind = re.fullmatch(r"blk\.\d+\.attn_([qk])\.weight", name)
    if gguf.field("general.architecture") != "llama" or not kind:
        return array
    heads = config.num_heads if kind[1] == "q" else config.num_kv_heads
    # [heads, H/2, 2, D]: the swap takes the first coordinates of all pairs, then the second ones.
    pairs = array.reshape(heads, config.head_dim // 2, 2, array.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(array.shape))


def _tokenizer(gguf: Gguf) -> transformers.PreTrainedTokenizerBase:
    """The file's own byte-level BPE; UserError if text would be cut by rules that are not known here."""
    model, cut = gguf.field("tokenizer.ggml.model"), gguf.field("tokenizer.ggml.pre", "default")
    if model != "gpt2" or cut not in SPLITS:
        raise UserError(
            f"{gguf.path}: tokenizer {model!r} cut as {cut!r} is none of gpt2 with {', '.join(SPLITS)}; use the "
            "model's safetensors checkpoint, which holds tokenizer.json"
        )
    tokens, kinds = gguf.field("tokenizer.ggml.tokens"), gguf.field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in gguf.field("tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    # Llama 3 takes a whole piece that is a token as it is, whatever the merges would make of it.
    bpe = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=cut == "llama-bpe"))
    bpe.normalizer = normalizers.NFC() if cut == "qwen2" else None
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence(SPLITS[cut]), decoders.ByteLevel()
    bpe.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind != _NORMAL
        ]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, chat_template=gguf.fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False, **_special(gguf, tokens),
    )  # fmt: skip


def _special(gguf: Gguf, tokens: list[str]) -> dict[str, str]:
    """transformers' name of each special token that the file names by its id."""
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {name: gguf.fields.get(f"tokenizer.ggml.{key}_token_id") for key, name in names.items()}
    if wrong := [name for name, i in ids.items() if i is not None and not 0 <= i < len(tokens)]:
        raise UserError(f"{gguf.path}: {wrong[0]} has an id outside the vocabulary; download the file again")
    return {name: tokens[i] for name, i in ids.items() if i is not None}
