"""Compiling for an absent H100: XLA's GPU compiler runs on a CPU if given its target.

jax's CUDA plugin is the compiler (extra `plan-gpu`: without the CUDA libraries, which only a run needs). What a run
would find out on the card is fixed here: products are not autotuned, and cuDNN is taken to be there.
"""

import contextlib
from collections.abc import Iterator
from importlib import metadata
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies

from listopd_jax.plan.chips import H100_NODE, Topology
from listopd_jax.rounding import ceil_div

EXTRA = "pip install 'listopd_jax[plan-gpu]'"
PLUGIN = "jax-cuda13-plugin"
CUDNN = (9, 12, 0)
OPTIONS = {"xla_gpu_autotune_level": 0}  # nothing can be timed

# XLA's GpuTargetConfigProto, as text: what the driver reports of an H100 SXM.
TARGET = f"""
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} patch: {CUDNN[2]} }}
gpu_device_info {{
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "{".".join(map(str, CUDNN))}"
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_address_bits: 64
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  pcie_bandwidth: 34359738368
  ecc_enabled: true
}}
"""


def can_compile() -> bool:
    """Whether jax's CUDA plugin is installed, of the same version as jaxlib."""
    try:
        return metadata.version(PLUGIN) == metadata.version("jaxlib")
    except metadata.PackageNotFoundError:
        return False


def described_devices(topology: Topology) -> list[Any]:
    """The GPUs of h100:N, in nodes of H100_NODE, to compile for; `can_compile` must hold."""
    nodes = ceil_div(topology.devices, H100_NODE)
    jax.devices()  # the plugin is registered with the first backend
    described = topologies.get_topology_desc(
        topology.name, "cuda", target_config=TARGET, topology=f"1x{nodes}x{topology.devices // nodes}"
    )
    return described.devices


@contextlib.contextmanager
def assumed_cudnn() -> Iterator[None]:
    """While inside, jax lowers to cuDNN without asking the library, which is not there, for its version."""
    from jax._src.cudnn import fused_attention_stablehlo as lowering

    major, minor, patch = CUDNN
    version = 10_000 * major + 100 * minor + patch
    with (
        mock.patch.object(lowering, "check_cudnn_version", lambda: version),
        mock.patch.object(lowering, "check_compute_capability", lambda needed: float(needed) <= 9.0),
    ):
        yield
