"""What the compiler is told: options of the backend at hand, at the first use; what the user set stays."""

import ctypes
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from listopd_jax.errors import UserError
from listopd_jax.parallel import compiler


def test_options_are_those_of_the_backend_at_the_first_call():
    options = {"gpu": {"no_such_flag": True}}
    twice = compiler.BackendJit(lambda x: 2 * x, options)
    assert float(twice(jnp.float32(3))) == 6
    wrong = compiler.BackendJit(lambda x: 2 * x, options)
    options["cpu"] = {"no_such_flag": True}
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_flag"):
        wrong(jnp.float32(3))


def test_a_backend_jit_is_lowered_and_counts_its_programs_like_any_other():
    twice = compiler.BackendJit(lambda x, n: n * x, {}, static_argnames="n")
    assert "multiply" in twice.lower(jnp.float32(3), n=2).as_text() and twice._cache_size() == 0
    twice(jnp.float32(3), n=2)
    assert twice._cache_size() == 1


def test_importing_the_rollout_starts_no_backend():
    code = "import listopd_jax.rollout.decode, jax._src.xla_bridge as b; assert not b._backends"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_users_share_of_memory_stays(monkeypatch):
    monkeypatch.setenv(compiler.MEMORY_VARIABLE, "0.5")
    compiler.reserve_gpu_memory()
    assert os.environ[compiler.MEMORY_VARIABLE] == "0.5"
    monkeypatch.delenv(compiler.MEMORY_VARIABLE)
    compiler.reserve_gpu_memory()
    assert os.environ[compiler.MEMORY_VARIABLE] == compiler.MEMORY_FRACTION


@pytest.mark.parametrize(
    ("backend", "dtype", "asked"),
    [("gpu", "float32", "highest"), ("gpu", "bfloat16", None), ("cpu", "float32", None)],
)
def test_float32_is_float32_on_a_gpu(monkeypatch, backend, dtype, asked):
    said = {}
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax.config, "update", said.__setitem__)
    compiler.exact_float32(dtype)
    assert said.get("jax_default_matmul_precision") == asked


@pytest.mark.parametrize(("flags", "quick"), [("", True), ("--xla_backend_optimization_level=2", False)])
def test_small_jobs_compile_quickly_unless_the_user_says_how(monkeypatch, flags, quick):
    for name in ("ROLLOUT", "UPDATE", "OTHER"):
        monkeypatch.setattr(compiler, name, {})
    monkeypatch.setenv("XLA_FLAGS", flags)
    compiler.compile_quickly()
    expected = (
        compiler.QUICK if quick and compiler._known(compiler.QUICK) else {}
    )  # jax 0.12 lacks one of the flags
    assert [options.get("cpu", {}) for options in (compiler.ROLLOUT, compiler.UPDATE)] == [expected] * 2


def test_a_flag_that_this_jaxlib_lacks_is_not_known():
    assert not compiler._known({"no_such_flag": True})
    assert compiler._known({})


def test_the_users_compilation_cache_stays(monkeypatch, tmp_path):
    said = {}
    monkeypatch.setattr(jax.config, "update", said.__setitem__)
    compiler.keep_compiled(tmp_path)
    expected = {} if jax.config.jax_compilation_cache_dir else {"jax_compilation_cache_dir": str(tmp_path)}
    assert said == expected


COUNTED = """
import sys, jax
from listopd_jax.parallel import compiler
compiler.compilations()
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.jit(lambda x: x * 2)(1.0)
print(compiler.compile_time())
"""


def test_programs_are_counted_and_those_from_the_cache_too(tmp_path):
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", COUNTED, str(tmp_path)], capture_output=True, text=True, check=True
        )
        said.append(
            re.fullmatch(r"(\d+) programs, \d+ s to compile; (\d+) read from the cache\n", done.stdout)
        )
    (programs, read), (again, all_read) = (tuple(map(int, found.groups())) for found in said)
    assert programs == again == all_read > 0 == read


def test_a_full_device_is_a_mistake_with_a_fix():
    said = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 32.65GiB with allocator GPU_0_bfc"
    wanted = r"memory is full \(Out of memory while .* 32.65GiB.*--config.remat=full"
    with pytest.raises(UserError, match=wanted), compiler.naming_full_memory():
        raise jax.errors.JaxRuntimeError(said)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), compiler.naming_full_memory():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc keeps freed memory so")
@pytest.mark.parametrize(("seconds", "released"), [(0.1, False), (60.0, True)])
def test_memory_that_a_long_compilation_freed_is_released(seconds, released):
    compiler.compilations()
    blocks = [b"x" * 100_000 for _ in range(1000)]  # below the size from which glibc maps each block alone
    last = blocks.pop()  # on top of the heap: without it glibc would shrink the heap at once
    blocks.clear()
    before = resident()
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", seconds)
    assert (before - resident() > 50e6) == released
    del last


def resident():
    """Bytes of memory that this process occupies."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
