"""Peak rates of the device at hand, and the peak of its memory use."""

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.memory import peak_resident
from listopd_jax.plan.chips import CHIPS, Chip, Topology

DATA_SHEET = {"H100": CHIPS["h100"], "H200": CHIPS["h100"]._replace(bandwidth=4.8e12)}


class Peak(NamedTuple):
    """A floor's denominators: peak FLOP/s and bytes/s of one device, and where they are from."""

    chip: Chip
    source: str

    @property
    def topology(self) -> Topology:
        """This one device, for listopd_jax.plan.arithmetic."""
        return Topology("here", "here", self.chip, (1,))


def peak_of(device: Any, dtype: str) -> Peak:
    """The data sheet's bfloat16 peak of an H100 or H200; for others what a product and a copy reach here and now."""
    if dtype == "bfloat16" and (kind := re.search("H[12]00", device.device_kind)):
        return Peak(DATA_SHEET[kind[0]], "data sheet")
    flops, bandwidth = matmul_flops(dtype, device.platform), copy_bandwidth(device.platform)
    chip = CHIPS["cpu"]._replace(flops=flops, bandwidth=bandwidth)
    return Peak(chip, f"measured in this run: {dtype} matrix product, float32 copy")


def matmul_flops(dtype: str, platform: str) -> float:
    """FLOP/s of the best of a few large square products."""
    size = 2048 if platform == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    return 2 * size**3 / _best_seconds(jax.jit(lambda x: x @ x / size), x)


def copy_bandwidth(platform: str) -> float:
    """Bytes/s read and written by the best of a few large element-wise passes, in place: new pages would cost more."""
    x = jnp.ones((64 if platform == "cpu" else 512) * 2**20, jnp.float32)
    return 2 * x.nbytes / _best_seconds(jax.jit(lambda x: x + 1, donate_argnums=0), x)


def _best_seconds(f: Callable, x: Array) -> float:
    """The fastest x ← f(x), without the first run (compilation)."""
    times = []
    for _ in range(8):
        began = time.perf_counter()
        x = jax.block_until_ready(f(x))
        times.append(time.perf_counter() - began)
    return min(times[1:])


def peak_memory(device: Any) -> tuple[int, str]:
    """Bytes, and what they count: an accelerator's allocator, or this process's resident set."""
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], "device memory in use at most"
    return (
        peak_resident(),
        "largest resident set of the measured steps (interpreter, libraries and programs included)",
    )
