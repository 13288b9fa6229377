"""The rules: which mesh axes split which axis of the parameters and activations (see mesh.py for the mesh axes).

Every axis has a logical name, and RULES is the one table from these to mesh axes. Models and steps name the axes of an
array at a few places, `constrain(x, "batch", …)`, and XLA's partitioner derives the collectives. The mesh is that of
the context (`use_mesh`); without one, all of this is the identity and a program is for one device.

Weights are stored split over `fsdp` and `tensor`. A layer gathers them over `fsdp`, in the compute dtype, for its use.
A mesh axis that does not divide a dimension leaves it whole. Where `tensor` does not divide the KV heads, each head is
used in several equal copies (`kv_copies`): a device then holds and caches the heads that its queries read, and no more,
while the weights themselves stay single.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from listopd_jax.rounding import round_up

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),  # also rows × positions, flat, rows first
    "embed": ("fsdp",),  # the model's width, in weights
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "hidden": (),  # the model's width, in activations and in weights at use
    "completions": (),
    "length": (),
    "head_dim": (),
    "layers": (),
    "rank": (),  # of low-rank adapters
}

PARAMS: dict[str, tuple[str, ...]] = {
    "embed": ("vocab", "embed"),
    "head": ("vocab", "embed"),
    "final_norm": ("hidden",),
    "attn_norm": ("hidden",),
    "mlp_norm": ("hidden",),
    "q": ("embed", "heads", "head_dim"),
    "k": ("embed", "kv_heads", "head_dim"),
    "v": ("embed", "kv_heads", "head_dim"),
    "o": ("heads", "head_dim", "embed"),
    "q_bias": ("heads", "head_dim"),
    "k_bias": ("kv_heads", "head_dim"),
    "v_bias": ("kv_heads", "head_dim"),
    "q_norm": ("head_dim",),
    "k_norm": ("head_dim",),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
}
for _name in "q k v o gate up down".split():  # the two factors of an adapter are split as what they adapt
    _inputs = 2 if _name == "o" else 1
    PARAMS[f"{_name}_lora_a"] = (*PARAMS[_name][:_inputs], "rank")
    PARAMS[f"{_name}_lora_b"] = ("rank", *PARAMS[_name][_inputs:])

CACHE = {
    5: ("layers", "batch", "kv_heads", None, None),  # the last two are length and head_dim, in either order
    6: ("layers", "batch", "completions", "kv_heads", None, None),
}


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """The mesh axes of an array of `shape` with logical `axes`; those that do not divide a dimension are left out."""
    entries = [RULES[name] if name else () for name in axes]
    divides = [
        size % math.prod(mesh.shape[a] for a in e) == 0 for size, e in zip(shape, entries, strict=True)
    ]
    return PartitionSpec(*(e if e and ok else None for e, ok in zip(entries, divides, strict=True)))


# --- inside a program: the mesh of the context ---


def constrain(x: Shaped[Array, "..."], *axes: str | None) -> Shaped[Array, "..."]:
    """`x`, split as its logical axes say; the identity without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def laid_out(x: Shaped[Array, "..."], *axes: str | None) -> Shaped[Array, "..."]:
    """`x`, split as `constrain` does, with its axes in memory in their order: XLA is free to choose another."""
    mesh = jax.sharding.get_abstract_mesh()
    in_order = functools.partial(with_layout_constraint, layouts=Layout(tuple(range(x.ndim))))
    if mesh.empty:
        return in_order(x)
    split = spec(axes, x.shape, mesh)  # the partitioner would gather what it must keep in order
    return jax.shard_map(in_order, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)(x)


def constrain_logits(x: Shaped[Array, "rows *r vocab"]) -> Shaped[Array, "rows *r vocab"]:
    """`x`, split over rows and vocabulary, evenly or not: vocabularies cut to a tokenizer's are rarely divisible."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    # Unlike `spec`, vocabulary is split even if it does not divide: XLA pads the last part.
    rows = RULES["batch"] if len(x) % row_multiple() == 0 else None
    axes = PartitionSpec(rows, *[None] * (x.ndim - 2), RULES["vocab"])
    return jax.lax.with_sharding_constraint(x, axes)


def gathered(name: str, weight: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Parameter `name` as a layer uses it: gathered over `fsdp`."""
    return constrain(weight, *("hidden" if axis == "embed" else axis for axis in PARAMS[name]))


def constrain_state(tree: Any) -> Any:
    """Parameters, gradients or optimizer state, split as they are stored (`state_shardings`)."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree_util.tree_map_with_path(lambda path, x: constrain(x, *_state_axes(path, x)), tree)


def shards(axis: str) -> int:
    """Devices over which the logical `axis` is split; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _devices(axis, mesh)


def is_split(axis: str) -> bool:
    """Whether the logical `axis` is split over more than one device."""
    return shards(axis) > 1


def kv_copies(num_kv_heads: int) -> int:
    """Copies of each KV head that give every device of the tensor axis equally many: 1 if it divides the heads."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.lcm(num_kv_heads, _devices("kv_heads", mesh)) // num_kv_heads


def to_chunks(x: Shaped[Array, "N *r"], size: int) -> Shaped[Array, "chunks rows *r"]:
    """Rows as chunks to scan over, of `size` rows of every device that holds rows: no device idles in any chunk.

    Without a mesh these are consecutive runs of `size` rows. Zeros fill the last chunk.
    """
    shards = _row_shards(len(x))
    x = x.reshape(shards, -1, *x.shape[1:])
    size = min(size, x.shape[1])
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    # [devices, chunks, size] to [chunks, devices, size]: a chunk takes the next `size` rows of every device.
    x = x.reshape(shards, -1, size, *x.shape[2:]).swapaxes(0, 1)
    return constrain(x.reshape(len(x), -1, *x.shape[3:]), None, "batch", *[None] * (x.ndim - 3))


def from_chunks(chunks: Shaped[Array, "chunks rows *r"], n: int) -> Shaped[Array, "N *r"]:
    """The `n` rows that `to_chunks` split, in their order."""
    shards = _row_shards(n)
    x = chunks.reshape(len(chunks), shards, -1, *chunks.shape[2:]).swapaxes(0, 1)
    x = x.reshape(shards, -1, *x.shape[3:])[:, : n // shards]
    return constrain(x.reshape(n, *x.shape[2:]), "batch", *[None] * (x.ndim - 2))


def _row_shards(n: int) -> int:
    """Devices among which `n` rows are split."""
    shards = row_multiple()
    return shards if n % shards == 0 else 1


def round_up_rows(n: int) -> int:
    """`n` rows or a few more, so that they are split evenly."""
    return round_up(n, row_multiple())


def row_multiple() -> int:
    """The number of rows must be a multiple of this to be split evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _devices("batch", mesh)


def _devices(axis: str, mesh: Any) -> int:
    return math.prod(mesh.shape[a] for a in RULES[axis])


# --- outside: shardings of arguments and results, for arrays or their abstract twins ---


def context_mesh() -> Mesh | None:
    """The mesh that `use_mesh` set, None for one device."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def param_shardings(tree: Any) -> Any:
    """`state_shardings` on the mesh of the context; None, which leaves the choice to jax, without one."""
    mesh = context_mesh()
    return None if mesh is None else state_shardings(tree, mesh)


def decoding_copy(params: Any) -> Any:
    """The parameters as they decode fastest (`rollout_shardings`); untouched without a mesh."""
    mesh = context_mesh()
    return params if mesh is None else jax.device_put(params, rollout_shardings(params, mesh))


def place_state(tree: Any) -> Any:
    """Parameters or a train state, moved to where they are stored: split by the mesh, or on the one device.

    All arrays are committed there. A step's results are, and jax compiles a program again for arguments that are not.
    """
    shardings = param_shardings(tree)
    return jax.device_put(tree, jax.devices()[0] if shardings is None else shardings)


def param_sharding(path: Sequence[str], x: Any, mesh: Mesh) -> NamedSharding:
    """Where the parameter at `path` of a decoder, e.g. ("layers", "q"), is stored."""
    return NamedSharding(mesh, spec(_axes(path, x), x.shape, mesh))


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings of parameters, gradients, optimizer state or a TrainState, found by parameter name.

    What is not a parameter (a step count) is replicated.
    """

    def sharding(path, x):
        return NamedSharding(mesh, spec(_state_axes(path, x), x.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def rollout_shardings(params: Any, mesh: Mesh) -> Any:
    """NamedShardings of the copy of the parameters that decodes: gathered over `fsdp` once, not at every token."""

    def sharding(path, x):
        axes = [None if axis == "embed" else axis for axis in _state_axes(path, x)]
        return NamedSharding(mesh, spec(axes, x.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, params)


def batch_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings of arrays with leading rows [B, …]: rows over `data` and `fsdp`."""

    def sharding(x):
        axes = ("batch", *[None] * (len(x.shape) - 1))
        return NamedSharding(mesh, spec(axes, x.shape, mesh))

    return jax.tree.map(sharding, tree)


def cache_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings of KV caches of prompts [L,B,KV,…] and of completions [L,B,n,KV,…]."""
    return jax.tree.map(lambda x: NamedSharding(mesh, spec(CACHE[len(x.shape)], x.shape, mesh)), tree)


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes with shardings: what `.lower()` takes in place of arrays."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def _state_axes(path: tuple, x: Any) -> tuple[str | None, ...]:
    """Logical axes of the leaf at `path` of a tree of parameters or of what has their structure."""
    return _axes([getattr(key, "key", getattr(key, "name", None)) for key in path], x)


def _axes(keys: Sequence[Any], x: Any) -> tuple[str | None, ...]:
    # The innermost name: Adam's moments repeat the path of their parameter behind a name of their own.
    name = next((key for key in reversed(keys) if key in PARAMS), None)
    if name is None:
        return (None,) * len(x.shape)
    return ("layers", *PARAMS[name]) if "layers" in keys else PARAMS[name]
