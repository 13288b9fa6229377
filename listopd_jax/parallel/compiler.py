"""Compiler settings: options per backend, memory, and how exact float32 is."""

import collections
import contextlib
import ctypes
import functools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from listopd_jax.errors import UserError, first_line

Options = dict[str, dict[str, Any]]  # XLA flags by backend

ROLLOUT: Options = {
    # Measured on an H100 at 128 rows, 1.7B (benchmarks/RESULTS.md): 19.6 ms per token without, 10.3 with the first two.
    # Triton's products copy each layer's weights and keys out of their stacks; merged products copy the weights once
    # more. With excess precision what one kernel leaves for the next is float32 in memory where bfloat16 is asked for.
    "gpu": {
        "xla_gpu_enable_triton_gemm": False,
        "xla_disable_hlo_passes": "dot-merger",
        "xla_allow_excess_precision": False,
    },
}
UPDATE: Options = {
    # The dynamic-slice fusion computes a product that remat saved a second time.
    "gpu": ROLLOUT["gpu"] | {"xla_gpu_enable_dynamic_slice_fusion": False},
}

OTHER: Options = {}  # programs that run once or a few times

# Measured on the demo's programs, in a third of the time to compile as with XLA's defaults, and none runs slower.
QUICK = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}

LONG = 0.5  # seconds of compiling, after which there is much memory to release

MEMORY_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
MEMORY_FRACTION = "0.92"  # of a GPU, for the job alone; XLA's default of 0.75 leaves 20 GiB of 80 unused


class BackendJit:
    """`jax.jit(function, **jit_options)` with the compiler options of the backend that it first runs on.

    The backend is looked up at the first use: importing a module must not start one. `lower` and the like are those
    of the jitted function.
    """

    def __init__(self, function: Callable, options: Options, **jit_options: Any):
        functools.update_wrapper(self, function)
        self._make = lambda: jax.jit(function, compiler_options=backend_options(options), **jit_options)

    @functools.cached_property
    def _jitted(self) -> Any:
        return self._make()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._jitted(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)


def backend_options(options: Options, backend: str = "") -> dict[str, Any] | None:
    """The `options` (by backend) for `backend`; empty: this process's."""
    return options.get(backend or jax.default_backend())


def compile_quickly() -> None:
    """On a CPU, add QUICK to the options of every kind of program from now on; not where XLA_FLAGS says otherwise.

    For jobs whose models are so small that compiling takes longer than running; large ones keep XLA's defaults.
    """
    if jax.default_backend() == "cpu" and not any(f in os.environ.get("XLA_FLAGS", "") for f in QUICK):
        for options in (ROLLOUT, UPDATE, OTHER):
            options["cpu"] = QUICK if _known(QUICK) else {}


def _known(options: dict[str, Any]) -> bool:
    """Whether this jaxlib has all of `options`: XLA's flags come and go."""
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def keep_compiled(folder: pathlib.Path) -> None:
    """Keep compiled programs in `folder`, for the next start; where JAX_COMPILATION_CACHE_DIR is set, it stays."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(folder))


@functools.cache
def compilations() -> collections.Counter:
    """Counts since the first call: programs, seconds of compiling, and programs read from the cache.

    From then on the memory that long compilations have freed goes back to the system.
    """
    counts: collections.Counter = collections.Counter()

    def took(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            counts.update(programs=1, seconds=seconds)
            if seconds > LONG:
                _release_freed_memory()

    def happened(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            counts.update(read=1)

    jax.monitoring.register_event_duration_secs_listener(took)
    jax.monitoring.register_event_listener(happened)
    return counts


def _release_freed_memory() -> None:
    """Return freed memory to the system: after compiling, glibc keeps hundreds of MiB of it for this process."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # only glibc has it, and needs it
        libc.malloc_trim(0)


def compile_time() -> str:
    """The counts of `compilations`, on one line."""
    counts = compilations()
    return f"{counts['programs']} programs, {counts['seconds']:.0f} s to compile; {counts['read']} read from the cache"


def reserve_gpu_memory() -> None:
    """Let XLA use MEMORY_FRACTION of each GPU, unless the user has said otherwise; before a backend starts."""
    os.environ.setdefault(MEMORY_VARIABLE, MEMORY_FRACTION)


TAKES_LESS = (
    "--config.remat=full, a smaller opd.microbatch or sft.*.microbatch, a smaller evaluation.batch_size"
)


@contextlib.contextmanager
def naming_full_memory(less: str = TAKES_LESS) -> Iterator[None]:
    """While inside, XLA's error for a device whose memory is full becomes a UserError that says what takes `less`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        said = first_line(e).removeprefix("RESOURCE_EXHAUSTED: ")[:100]
        raise UserError(
            f"the device's memory is full ({said}); set {less}, or give the job a device of its own"
        ) from e


def product_precision(dtype: str, backend: str) -> str | None:
    """The precision of products of `dtype` on `backend`; None: its default.

    float32 is computed in float32 on GPUs and TPUs too, whose default is TF32 or bfloat16: on an H100 that makes
    sampler and trainer differ by 3e-3 nats per token, 1e-4 is our bound.
    """
    return "highest" if dtype == "float32" and backend != "cpu" else None


def exact_float32(dtype: str) -> None:
    """From now on, `product_precision` of `dtype` on the backend of this process."""
    if precision := product_precision(dtype, jax.default_backend()):
        jax.config.update("jax_default_matmul_precision", precision)
