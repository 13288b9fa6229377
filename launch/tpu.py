"""Names of TPU slices: the topologies of the planner (v5e:16x16) as GKE and Cloud TPU name them.

Sources: Google's "Plan TPUs in GKE", "TPU configurations" and "TPU software versions". Slices of whole hosts of 4 chips
(or one host of 1 chip) are meant, which is what their multi-host machine types are.
"""

import math
import re
from typing import NamedTuple

from listopd_jax.errors import UserError, unknown_name


class Generation(NamedTuple):
    """One generation of TPU."""

    gke: str  # label cloud.google.com/gke-tpu-accelerator
    prefix: str  # of the accelerator type of Cloud TPU
    cores: int  # TensorCores per chip, which v4 and v5p are counted in
    dimensions: int  # of its torus
    runtime: str  # TPU VM software version


GENERATIONS = {
    "v4": Generation("tpu-v4-podslice", "v4", 2, 3, "tpu-ubuntu2204-base"),
    "v5e": Generation("tpu-v5-lite-podslice", "v5litepod", 1, 2, "v2-alpha-tpuv5-lite"),
    "v5p": Generation("tpu-v5p-slice", "v5p", 2, 3, "v2-alpha-tpuv5"),
    "v6e": Generation("tpu-v6e-slice", "v6e", 1, 2, "v2-alpha-tpuv6e"),
}


class Slice(NamedTuple):
    """A TPU slice: its generation, shape (e.g. 16x16) and number of chips."""

    generation: Generation
    shape: str
    chips: int

    @property
    def hosts(self) -> int:
        """Machines of the slice, each of which runs one process."""
        return max(1, self.chips // 4)

    @property
    def chips_per_host(self) -> int:
        """TPU chips of each machine."""
        return self.chips // self.hosts

    @property
    def accelerator_type(self) -> str:
        """Cloud TPU's name of it, e.g. v5litepod-256, or v5p-16 for 8 chips."""
        return f"{self.generation.prefix}-{self.chips * self.generation.cores}"


def parse_topology(text: str) -> Slice:
    """The slice that e.g. v5e:16x16 names; UserError if there is no such slice."""
    name, _, shape = text.partition(":")
    if name not in GENERATIONS:
        raise unknown_name("--topology", name, GENERATIONS)
    generation, sides = GENERATIONS[name], shape.split("x")
    example = "x".join(["4"] * generation.dimensions)
    if not re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2})*", shape) or len(sides) != generation.dimensions:
        raise UserError(f"--topology={text}: {name} has {generation.dimensions} sides, e.g. {name}:{example}")
    chips = math.prod(map(int, sides))
    if chips > 1 and chips % 4:
        raise UserError(f"--topology={text}: {chips} chips do not fill whole hosts of 4")
    return Slice(generation, shape, chips)
