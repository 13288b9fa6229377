"""Reading a checkpoint: names and shapes first, then tensor by tensor into the stacked parameters."""

import contextlib
import math
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from listopd_jax.errors import UserError
from listopd_jax.models.config import PROJECTIONS, ModelConfig
from listopd_jax.models.decoder import abstract
from listopd_jax.models.hf.config import read_config, resolve
from listopd_jax.models.hf.stored import Stored, Tensors, open_tensors
from listopd_jax.models.hf.tensors import BIASES, hf_names
from listopd_jax.parallel.rules import context_mesh, param_sharding

LAST_IN_BLOCK = ("o", "down")
"""All zeros, these make a block the identity, as in models that were deepened before further training."""


def load_hf(
    source: str | os.PathLike,
    dtype=jnp.float32,
    each: Callable[[tuple, nnx.Variable], nnx.Variable] | None = None,
) -> tuple[ModelConfig, nnx.State]:
    """Read a checkpoint: (its config, the parameters as `nnx.split(Decoder(config, …))[1]` in `dtype`).

    `source` is a folder with config.json and safetensors (one file, or shards and their index), or a hub id. Tensors
    are read one by one into the stacked arrays: the peak is the model plus its largest stacked array. Under a mesh each
    process reads of each tensor only the slices that its devices hold: its peak in host memory is its part of the
    largest stacked array. `each` changes a parameter, given its path, as soon as it is read. UserError, naming file and
    tensor, for whatever is missing, unexpected, doubled, misshapen, blank or not finite. Blocks that are the identity
    are logged.
    """
    folder = resolve(source)
    config = read_config(folder)
    params = abstract(config, param_dtype=dtype)[1]
    with contextlib.ExitStack() as stack:
        tensors = open_tensors(folder, config, params, stack)
        flat = []
        for path, p in nnx.to_flat_state(params):
            read = p.replace(_read_param(path, p, config, tensors))
            flat.append((path, each(path, read) if each else read))
    return config, nnx.from_flat_state(flat)


def check_hf(source: str | os.PathLike) -> ModelConfig:
    """The config of a checkpoint whose names and shapes are those it asks for; UserError as `load_hf` raises it."""
    folder = resolve(source)
    config = read_config(folder)
    with contextlib.ExitStack() as stack:
        open_tensors(folder, config, abstract(config)[1], stack)
    return config


def _read_param(path: tuple, param: nnx.Variable, config: ModelConfig, tensors: Tensors) -> jax.Array:
    rows = [tensors[name] for name in hf_names(path, config.num_layers)]
    if context_mesh() is not None:
        return _read_sharded(path, param, rows)
    buffer = _aligned_empty(param.shape, param.dtype)
    finite, blank = [], []
    for row, stored in zip(buffer if path[0] == "layers" else buffer[None], rows, strict=True):
        tensor = stored.read()
        with np.errstate(over="ignore"):  # an overflow becomes an infinity, which is reported next
            # Norms, biases and embeddings have our layout already; projections are stored [outputs, inputs].
            if path[-1] in PROJECTIONS:
                _copy_transposed(row, tensor)
            else:
                row[...] = tensor.reshape(row.shape)
        # After the cast: what is finite in the file may not be in param.dtype.
        finite.append(np.isfinite(row).all())
        blank.append(not row.any())
    _check_values(path, param, rows, finite, blank)
    return jax.device_put(buffer)


def _read_sharded(path: tuple, param: nnx.Variable, stored: list[Stored]) -> jax.Array:
    """The parameter at `path` split over the mesh of the context; devices with equal parts share one reading."""
    pieces: dict[str, np.ndarray] = {}

    def piece(index: tuple[slice, ...]) -> np.ndarray:
        # As text, because slices cannot be hashed before Python 3.12.
        if str(index) not in pieces:
            pieces[str(index)] = _read_piece(path, index, param, stored)
        return pieces[str(index)]

    array = jax.make_array_from_callback(param.shape, param_sharding(path, param, context_mesh()), piece)
    rows = array if path[0] == "layers" else array[None]
    finite, blank = (np.asarray(x) for x in _row_checks(rows))
    _check_values(path, param, stored, finite, blank)
    return array


def _read_piece(path: tuple, index: tuple[slice, ...], param, stored: list[Stored]) -> np.ndarray:
    """param[index] from the files: of each layer's tensor, only that slice."""
    out = np.empty([len(range(*i.indices(n))) for i, n in zip(index, param.shape, strict=True)], param.dtype)
    rows, shape = out[None], param.shape
    if path[0] == "layers":
        rows, stored, index, shape = out, stored[index[0]], index[1:], shape[1:]
    for row, tensor in zip(rows, stored, strict=True):
        with np.errstate(over="ignore"):  # an overflow becomes an infinity, which is reported later
            row[...] = _read_slice(tensor.slices(), path[-1], index, shape)
    return out


def _read_slice(tensor, name: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The part `index` of our parameter of `shape`, from Hugging Face's tensor of it (see `to_hf`)."""
    bounds = [i.indices(size)[:2] for i, size in zip(index, shape, strict=True)]
    if name in BIASES:
        return tensor[_span(bounds, shape)].reshape([stop - start for start, stop in bounds])
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


def _check_values(
    path: tuple, param: nnx.Variable, rows: list[Stored], finite: Sequence[bool], blank: Sequence[bool]
) -> None:
    """UserError for a tensor that is not finite or all zeros; zeros in some blocks' last projections are logged."""
    for stored, is_finite in zip(rows, finite, strict=True):
        if not is_finite:
            raise UserError(
                f"{stored} holds NaN or infinities as {param.dtype}; download it again or load as float32"
            )
    blanks = [i for i, is_blank in enumerate(blank) if is_blank]
    if path[-1] in BIASES:  # they start as zeros
        return
    if blanks and (path[-1] not in LAST_IN_BLOCK or len(blanks) == len(rows)):
        raise UserError(f"{rows[blanks[0]]} is all zeros (blank weights); download it again")
    if blanks:
        logging.warning(
            "%s is all zeros, of layers %s: blocks that change nothing until they are trained",
            rows[blanks[0]], ", ".join(map(str, blanks)),
        )  # fmt: skip


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
