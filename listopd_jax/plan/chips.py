"""The hardware facts of a plan: one table of public facts, and the slices that can be asked for.

Sources (read November 2026). TPU: "System architecture" tables of cloud.google.com/tpu/docs/v5e, /v5p and /v6e. They
give the inter-chip bandwidth of a chip in both directions (400, 1200, 800 GB/s); the half of it that arrives is divided
here by the chip's torus axes (2, 3, 2). Their data-centre network is given for a pod or a chip. H100 SXM: NVIDIA's data
sheet (80 GB, 3.35 TB/s, 989 TFLOP/s dense bf16, NVLink 900 GB/s in both directions), 400 Gb/s of network per GPU.
`hbm_gib` is what a program may use: of the 16 and 32 GiB of v5e and v6e libtpu 0.0.42 refuses what is over 15.75 and
31.25 (it would grant 95.74 of v5p's published 95); of an H100's 79.18 GiB a job takes .92
(listopd_jax.parallel.compiler.MEMORY_FRACTION; this module starts no jax).
The row `cpu` is nominal: a CPU's roofline depends on the machine, and no time of it is a promise.
"""

import math
import os
from typing import NamedTuple

from listopd_jax.errors import UserError, did_you_mean

GIB = 2**30


class Chip(NamedTuple):
    """Facts of one accelerator; bytes and seconds unless the name says otherwise."""

    hbm_gib: float
    bandwidth: float  # HBM, bytes/s
    flops: float  # bf16, dense, FLOP/s
    link: float  # bytes/s that arrive over one axis of the interconnect
    links: int  # axes of the interconnect
    dcn: float  # bytes/s per chip over the network between slices or nodes


CHIPS = {
    "v5e": Chip(15.75, 819e9, 197e12, 100e9, 2, 3.1e9),
    "v5p": Chip(95, 2765e9, 459e12, 200e9, 3, 6.25e9),
    "v6e": Chip(31.25, 1640e9, 918e12, 200e9, 2, 12.5e9),
    "h100": Chip(72.8, 3350e9, 989e12, 450e9, 1, 50e9),
    "cpu": Chip(0, 20e9, 100e9, 10e9, 1, 1e9),
}


class Rates(NamedTuple):
    """Rates that kernels reach, not those of a data sheet: FLOP/s, bytes/s, seconds."""

    product: float  # FLOP/s of large matrix products
    attention: float  # FLOP/s of fused attention
    bandwidth: float  # bytes/s of what a kernel reads and writes
    launch: float  # seconds of overhead per kernel
    link: float  # bytes/s that arrive from other devices


RATES = {"h100": Rates(740e12, 210e12, 2.7e12, 2.5e-6, 360e9)}
"""One H100 SXM, fitted to its kernel profile and its attention timings (benchmarks/results/h100_first_light.json);
link is a guess, .8 of the data sheet: several GPUs have not been measured."""

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SLICES = {
    "v5e": _FLAT,
    "v6e": _FLAT,
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
}
H100_NODE = 8


class Topology(NamedTuple):
    """Devices that one program runs on: `shape` is the torus, or (devices,) for GPUs and CPUs."""

    name: str
    kind: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        """Number of devices."""
        return math.prod(self.shape)

    @property
    def is_tpu(self) -> bool:
        """Whether the TPU compiler serves it."""
        return self.kind in SLICES

    @property
    def platform(self) -> str:
        """jax's name of such devices."""
        return "tpu" if self.is_tpu else "gpu" if self.kind == "h100" else "cpu"

    def arriving(self, size: int, stride: int) -> float:
        """Bytes/s that reach a device from its group of `size` along a mesh axis, neighbours `stride` apart.

        As many torus axes as the group must span are used in both directions, which a ring that does not close cannot:
        an upper bound. A group that leaves a GPU node has only the network.
        """
        if self.kind == "h100" and size * stride > H100_NODE:
            return self.chip.dcn
        spanned, reach = 0, 1
        for length in sorted(self.shape, reverse=True):
            if reach >= size:
                break
            spanned, reach = spanned + 1, reach * length
        return self.chip.link * max(1, min(spanned, self.chip.links))


def parse_topology(name: str) -> Topology:
    """The topology of a name such as v5p:2x2x2, h100:8 or cpu:8; UserError with the known ones for any other."""
    kind, _, rest = name.partition(":")
    if kind not in CHIPS:
        raise UserError(f"--topology={name}: {did_you_mean(kind, CHIPS)}known: {known()}")
    if kind in SLICES:
        if rest not in SLICES[kind]:
            raise UserError(f"--topology={name}: slices of {kind} are {', '.join(SLICES[kind])}")
        return Topology(name, kind, CHIPS[kind], tuple(map(int, rest.split("x"))))
    if not rest.isascii() or not rest.isdigit() or not 1 <= int(rest) <= 4096:
        raise UserError(f"--topology={name}: give the number of devices, e.g. {kind}:8")
    if kind == "h100" and int(rest) > H100_NODE and int(rest) % H100_NODE:
        raise UserError(f"--topology={name}: nodes have {H100_NODE} GPUs; give a multiple of {H100_NODE}")
    chip = _this_cpu(int(rest)) if kind == "cpu" else CHIPS[kind]
    return Topology(name, kind, chip, (int(rest),))


def known() -> str:
    """Every topology that can be planned for, in one line."""
    slices = (f"{kind}:{shape}" for kind, shapes in SLICES.items() for shape in shapes)
    return ", ".join([*slices, "h100:N", "cpu:N"])


def _this_cpu(devices: int) -> Chip:
    """The nominal CPU with this machine's memory shared by `devices` fake devices."""
    share = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB / devices
    return CHIPS["cpu"]._replace(hbm_gib=share)
