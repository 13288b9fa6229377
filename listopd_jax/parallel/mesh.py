"""The mesh: how many devices each of its three axes has.

data: rows of the batch, weights copied. fsdp: rows of the batch too, weights split and gathered layer by layer. tensor:
heads, MLP units and vocabulary. The axes are ordered by traffic, so that the busiest one has neighbouring devices.
What is split along which axis: rules.py.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from listopd_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def mesh_sizes(parallel: Mapping[str, int], devices: int) -> dict[str, int]:
    """Devices along each axis, from config section `parallel`; at most one -1 stands for all that are left.

    Raises UserError if the product is not the number of devices.
    """
    sizes = {axis: parallel[axis] for axis in AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    shown = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if devices % known:
        raise UserError(
            f"parallel ({shown}): {known} does not divide the {devices} devices; lower one of them"
        )
    sizes = {axis: devices // known if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise UserError(
            f"parallel ({shown}): uses {known} of {devices} devices; set parallel.data=-1 for all"
        )
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (default: all; a topology's too), neighbours on the last axes.

    An axis may take a part of a slice's axis: 32 x 8 of 16 x 16 chips.
    """
    devices = jax.devices() if devices is None else devices
    shape = [sizes[axis] for axis in AXES]
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def configured_mesh(parallel: Mapping[str, int]) -> Mesh | None:
    """The mesh over all devices that config section `parallel` asks for; None if there is only one device."""
    sizes = mesh_sizes(parallel, jax.device_count())
    return make_mesh(sizes) if math.prod(sizes.values()) > 1 else None


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """While inside, programs are split over `mesh`; None: they are for one device, without any constraint."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
