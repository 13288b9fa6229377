"""Fixtures shared by the tests, and the settings that must stand before jax is imported."""

import os
import pathlib

import jaxlib.version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Compiling tiny programs dominates the suite; unoptimised code compiles six times faster. A jaxlib that does not know
# a flag aborts, so the flags are given only to the versions they were tried with.
if jaxlib.version.__version__.startswith("0.10."):
    fast = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    os.environ.setdefault("XLA_FLAGS", fast)
else:
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jaxtyping
import pytest
import typechecked  # noqa: F401 (before the package: it says what an array is)

# Every call in the tests is checked against the shapes that the function is annotated with.
jaxtyping.install_import_hook(["listopd_jax", "benchmarks"], "typechecked.typechecked")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real test data beside the repository; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the real test data in ../shared, absent here")
    return SHARED
