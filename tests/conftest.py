"""Fixtures shared by the tests, and the settings that must stand before jax is imported."""

import fcntl
import gc
import multiprocessing.forkserver
import os
import pathlib

import jaxlib.version

# XLA's threads of two processes that share their cores wait for each other, up to ten times as long as they compute.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):  # not on a Mac
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # ranx, an oracle, would compile for half a minute
# Compiling tiny programs dominates the suite; unoptimised code compiles six times faster. A jaxlib that does not know
# a flag aborts, so the flags are given only to the versions they were tried with.
if jaxlib.version.__version__.startswith("0.10."):
    fast = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    fast += " --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
    os.environ.setdefault("XLA_FLAGS", fast)
else:
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import hypothesis
import jaxtyping
import pytest
import typechecked  # noqa: F401 (before the package: it says what an array is)
from processes import SMALL, run_main, share_programs

# Every call in the tests is checked against the shapes that the function is annotated with.
jaxtyping.install_import_hook(["listopd_jax", "benchmarks"], "typechecked.typechecked")

share_programs(
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.1"
)  # smaller ones compile as fast as they are read

hypothesis.settings.register_profile("any machine", deadline=None)  # a busy machine is no counterexample
hypothesis.settings.load_profile("any machine")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real test data next to the repository; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the real test data in ../shared, absent here")
    return SHARED


SLOW_FILES = (
    "attention average benchmarks benchmarks_gpu benchmarks_served benchmarks_smoke benchmarks_trained bring_your_own "
    "calibrate chat checkpoints collapse constrained control_variate data_input data_prepare decode_kernel evaluate "
    "expected export fixed_text forecast forecast_command fuzz gain gather_kernel gguf grammar guard guard_targets "
    "hf_folders job json_task label launch loop lora main models_check models_decoder models_hf "
    "off_policy opd_step parallel parallel_hosts plain_lambdas plan_compile plan_gpu predict_pipeline "
    "recommend reference report report_parts rollout rollout_drafts rollout_segments sft_continued "
    "sft_step simulate survival tasks tasks_ranking teacher_server teachers theory_estimators "
    "trackers watch"
).split()
"""tests/test_NAME.py that take more than a few seconds each: not in `make quick`."""


LONG_FILES = "parallel plan_compile bring_your_own collapse plain_lambdas".split()
"""tests/test_NAME.py that take longest: begun first, that no worker is left alone with one."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Workers of `-n auto`: each imports it all, so there are few. None where there is one core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4) if cores > 1 else 0


def pytest_collection_modifyitems(items):
    """Mark the tests of SLOW_FILES slow, and begin with the longest."""
    for item in items:
        name, of_job = item.path.stem.removeprefix("test_"), "finished_job" in item.fixturenames
        if name in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
        item.rank = 0 if of_job else 1 if name in LONG_FILES else 2
    items.sort(key=lambda item: item.rank)


def pytest_collection_finish():
    """Garbage collection was a fifth of the suite's time: JAX and torch leave millions of objects that never die."""
    from listopd_jax.main import collect_rarely

    collect_rarely()
    gc.set_threshold(
        200_000, 50, 1000
    )  # a test's garbage is young; the old objects are libraries and programs


def pytest_unconfigure():
    """End the server of tests/processes.py and wait for it: what it used then counts as the suite's."""
    multiprocessing.forkserver._forkserver._stop()


MOST_MAPS = 40_000
"""Memory maps of a process beyond which its compiled programs are dropped. Linux allows 65,530; there XLA crashes."""


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Every compiled program has maps of its own; with jax 0.12 those of the whole suite are more than Linux allows."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        import jax

        jax.clear_caches()


@pytest.fixture(scope="session")
def finished_job(tmp_path_factory, request) -> pathlib.Path:
    """The workdir of a whole run of SMALL, never interrupted; tests that change anything copy it."""
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # of xdist
        folder = folder.parent  # which all workers share
    workdir, done = folder / "finished_job" / "whole", folder / "finished_job.done"
    with open(folder / "finished_job.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker runs it, the others wait
        if not done.exists():
            result = run_main(workdir, *SMALL)
            assert result.returncode == 0, result.stderr[-3000:]
            assert result.stdout.strip() == f"report: {workdir}/report.html"
            done.touch()
    return workdir
