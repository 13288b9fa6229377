"""Training that is stopped anywhere, in any way, goes on as if nothing had happened."""

import functools
import json
import multiprocessing
import os
import pathlib
import signal
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from listopd_jax.errors import Interrupted
from listopd_jax.metrics_log import read_metrics
from listopd_jax.train.checkpoints import Checkpoints
from listopd_jax.train.loop import Run, checkpoint_folder, train
from listopd_jax.train.optimizer import apply_gradients, init_state

TX = optax.scale_by_adam()
SIZE = 100_000  # large enough for a save to take time


def run_of(steps, name="opd_lambda1.2_seed0"):
    return Run(name, "opd", {"lambda": 1.2, "seed": 0}, steps)


def batches():
    """An endless, shuffled, prefetching grain iterator, as the data module's."""
    source = grain.MapDataset.source(np.arange(7, dtype=np.float32)).shuffle(seed=1).repeat().batch(2)
    return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


@functools.cache
def compiled():
    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch, key):
        noise = jax.random.normal(key, (SIZE,))
        loss, grads = jax.value_and_grad(lambda p: ((p["w"] - batch.sum() - noise) ** 2).mean())(state.params)
        return apply_gradients(state, grads, jnp.float32(0.1), TX), loss

    return step


def update(state, batch, step):
    """One step whose result depends on everything that a resumed run has to get right."""
    state, loss = compiled()(state, jnp.asarray(batch), jax.random.fold_in(jax.random.key(3), step))
    return state, {"loss": loss, "first": batch[0], "tokens": 100}


def start():
    return init_state({"w": jnp.arange(SIZE, dtype=jnp.float32)}, TX)


def rows(workdir):
    """The logged rows without the one figure that depends on the clock."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(workdir)]


def saved_steps(workdir, run):
    return sorted(int(p.name) for p in checkpoint_folder(workdir, run.name).iterdir())


def assert_identical(a, b):
    for x, y in zip(map(np.asarray, jax.tree.leaves(a)), map(np.asarray, jax.tree.leaves(b)), strict=True):
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Workdir and final state of 10 steps without interruption."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, train(workdir, run_of(10), start(), batches(), update, every=3, keep=2)


def test_a_run_logs_each_step_and_saves_at_the_end(undisturbed):
    workdir, state = undisturbed
    logged = read_metrics(workdir)
    assert [row["step"] for row in logged] == list(range(1, 11))
    assert all(
        row["run"] == run_of(10).name and row["stage"] == "opd" and row["lambda"] == 1.2 for row in logged
    )
    assert all(row["tokens_per_second"] > 0 and "tokens" not in row for row in logged)
    assert saved_steps(workdir, run_of(10)) == [9, 10]
    with Checkpoints(checkpoint_folder(workdir, run_of(10).name), keep=2) as checkpoints:
        assert_identical(checkpoints.restore(start())[0], state)


class Stop(Exception):
    """What ends a run in the tests below."""


def stopping(at, how):
    """`update`, but step number `at` is cut short by `how`."""

    def cut(state, batch, step):
        if step == at:
            how()
        return update(state, batch, step)

    return cut


def fail():
    raise Stop


@pytest.mark.parametrize("at", [0, 1, 2, 3, 5, 6, 9])
def test_a_run_that_fails_anywhere_ends_the_same(undisturbed, tmp_path, at):
    """Before the first checkpoint, just before one, just after one, at the last step."""
    with pytest.raises(Stop):
        train(tmp_path, run_of(10), start(), batches(), stopping(at, fail), every=3, keep=2)
    state = train(tmp_path, run_of(10), start(), batches(), update, every=3, keep=2)
    assert_identical(state, undisturbed[1])
    assert rows(tmp_path) == rows(undisturbed[0])


def test_a_run_that_fails_at_every_second_step_ends_the_same(undisturbed, tmp_path):
    for at in range(1, 10, 2):
        with pytest.raises(Stop):
            train(tmp_path, run_of(10), start(), batches(), stopping(at, fail), every=1, keep=1)
    state = train(tmp_path, run_of(10), start(), batches(), update, every=1, keep=1)
    assert_identical(state, undisturbed[1])
    assert rows(tmp_path) == rows(undisturbed[0])


def test_a_finished_run_is_only_loaded(undisturbed):
    def never(*_):
        raise AssertionError("a finished run was trained on")

    workdir, state = undisturbed
    before = read_metrics(workdir)
    assert_identical(train(workdir, run_of(10), start(), batches(), never, every=3, keep=2), state)
    assert read_metrics(workdir) == before


def test_runs_of_one_workdir_do_not_disturb_each_other(undisturbed, tmp_path):
    other = run_of(4, "opd_lambda1_seed0")
    with pytest.raises(Stop):
        train(tmp_path, run_of(10), start(), batches(), stopping(4, fail), every=3, keep=2)
    train(tmp_path, other, start(), batches(), update, every=3, keep=2)
    state = train(tmp_path, run_of(10), start(), batches(), update, every=3, keep=2)
    assert_identical(state, undisturbed[1])
    by_run = {name: [r for r in rows(tmp_path) if r["run"] == name] for name in (run_of(10).name, other.name)}
    assert by_run[run_of(10).name] == rows(undisturbed[0])
    assert [r["step"] for r in by_run[other.name]] == [1, 2, 3, 4]


def test_sigterm_finishes_the_step_saves_and_says_so(undisturbed, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    terminate = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted) as interrupted:
        train(tmp_path, run_of(10), start(), batches(), stopping(4, terminate), every=100, keep=2)
    assert "\n" not in str(interrupted.value) and "step 5" in str(interrupted.value)
    assert saved_steps(tmp_path, run_of(10)) == [5]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    assert signal.getsignal(signal.SIGTERM) is handler
    state = train(tmp_path, run_of(10), start(), batches(), update, every=100, keep=2)
    assert_identical(state, undisturbed[1])
    assert rows(tmp_path) == rows(undisturbed[0])


# ---- real processes, kill -9


STEPS, EVERY = 40, 3


def slow_update(state, batch, step):
    time.sleep(0.01)
    return update(state, batch, step)


def train_in_process(workdir):
    train(pathlib.Path(workdir), run_of(STEPS), start(), batches(), slow_update, every=EVERY, keep=2)


@pytest.fixture(scope="module")
def processes():
    """New processes in which the imports are done but nothing of JAX has started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["listopd_jax.train.loop", "grain"])
    return context


def start_training(processes, workdir):
    process = processes.Process(target=train_in_process, args=(workdir,))
    process.start()
    return process


def last_step(workdir) -> int:
    """The step of the newest whole row in the log, 0 if there is none."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def kill_after(process, workdir, steps, delay):
    """kill -9 when `steps` steps beyond its checkpoint are logged and `delay` seconds have passed."""
    before = last_step(workdir) // EVERY * EVERY
    deadline = time.monotonic() + 60
    while last_step(workdir) < before + steps and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_kill_9_at_random_moments_changes_nothing(processes, tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    reference = start_training(processes, undisturbed)
    rng, kills = np.random.default_rng(0), 0
    while kills < 6:
        process = start_training(processes, killed)
        kill_after(process, killed, int(rng.integers(1, 6)), float(rng.uniform(0, 0.05)))
        assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
        kills += 1
    process = start_training(processes, killed)
    for each in (process, reference):
        each.join(60)
        assert each.exitcode == 0
    assert rows(killed) == rows(undisturbed)
    assert [row["step"] for row in rows(killed)] == list(range(1, STEPS + 1))
    ends = []
    for workdir in (killed, undisturbed):
        with Checkpoints(checkpoint_folder(workdir, run_of(STEPS).name), keep=2) as checkpoints:
            assert checkpoints.latest_step == STEPS
            ends.append(checkpoints.restore(start()))
    assert_identical(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    left = {p.name for p in checkpoint_folder(killed, run_of(STEPS).name).iterdir()}
    assert left == {"39", "40"}  # half-written checkpoints do not pile up
