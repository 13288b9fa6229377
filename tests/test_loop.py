"""Training that is stopped anywhere, in any way, resumes as if nothing had happened."""

import functools
import os
import pathlib
import shutil
import signal

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from listopd_jax.errors import Interrupted, UserError
from listopd_jax.metrics_log import read_metrics
from listopd_jax.train.checkpoints import Checkpoints, abstract
from listopd_jax.train.loop import Run, Saving, checkpoint_folder, train
from listopd_jax.train.optimizer import apply_gradients, init_state

TX = optax.scale_by_adam()
SIZE = 100_000  # large enough for a save to take time


def run_of(steps, name="opd_lambda1.2_seed0"):
    return Run(name, "opd", lam=1.2, seed=0, steps=steps)


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
    """Workdir and final parameters of 10 steps without interruption."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, train(workdir, run_of(10), start, batches(), update, Saving(3, 2))


def test_a_run_logs_each_step_and_saves_at_the_end(undisturbed):
    workdir, params = undisturbed
    logged = read_metrics(workdir)
    assert [row["step"] for row in logged] == list(range(1, 11))
    assert all(
        row["run"] == run_of(10).name and row["stage"] == "opd" and row["lambda"] == 1.2 for row in logged
    )
    assert all(row["tokens_per_second"] > 0 and "tokens" not in row for row in logged)
    assert saved_steps(workdir, run_of(10)) == [9, 10]
    with Checkpoints(
        checkpoint_folder(workdir, run_of(10).name), 2, {"lambda": 1.2, "seed": 0}
    ) as checkpoints:
        saved = checkpoints.restore(abstract(start()))
    assert saved.step == 10
    assert_identical(saved.state.params, params)


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
        train(tmp_path, run_of(10), start, batches(), stopping(at, fail), Saving(3, 2))
    params = train(tmp_path, run_of(10), start, batches(), update, Saving(3, 2))
    assert_identical(params, undisturbed[1])
    assert rows(tmp_path) == rows(undisturbed[0])


def test_a_run_that_fails_at_every_second_step_ends_the_same(undisturbed, tmp_path):
    for at in range(1, 10, 2):
        with pytest.raises(Stop):
            train(tmp_path, run_of(10), start, batches(), stopping(at, fail), Saving(1, 1))
    params = train(tmp_path, run_of(10), start, batches(), update, Saving(1, 1))
    assert_identical(params, undisturbed[1])
    assert rows(tmp_path) == rows(undisturbed[0])


def test_a_finished_run_is_only_loaded(undisturbed):
    def never(*_):
        raise AssertionError("a finished run was trained on")

    workdir, params = undisturbed
    before = read_metrics(workdir)
    assert_identical(train(workdir, run_of(10), start, batches(), never, Saving(3, 2)), params)
    assert read_metrics(workdir) == before


def test_runs_of_one_workdir_do_not_disturb_each_other(undisturbed, tmp_path):
    other = run_of(4, "opd_lambda1_seed0")
    with pytest.raises(Stop):
        train(tmp_path, run_of(10), start, batches(), stopping(4, fail), Saving(3, 2))
    train(tmp_path, other, start, batches(), update, Saving(3, 2))
    params = train(tmp_path, run_of(10), start, batches(), update, Saving(3, 2))
    assert_identical(params, undisturbed[1])
    by_run = {name: [r for r in rows(tmp_path) if r["run"] == name] for name in (run_of(10).name, other.name)}
    assert by_run[run_of(10).name] == rows(undisturbed[0])
    assert [r["step"] for r in by_run[other.name]] == [1, 2, 3, 4]


@pytest.fixture
def terminate():
    """SIGTERM to this process, whose handler is put back after the test."""
    handler = signal.getsignal(signal.SIGTERM)
    yield functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGTERM, handler)


def test_sigterm_finishes_the_step_saves_and_says_so(undisturbed, tmp_path, terminate):
    with pytest.raises(Interrupted) as interrupted:
        train(tmp_path, run_of(10), start, batches(), stopping(4, terminate), Saving(100, 2))
    assert "\n" not in str(interrupted.value) and "step 5" in str(interrupted.value)
    assert saved_steps(tmp_path, run_of(10)) == [5]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    params = train(tmp_path, run_of(10), start, batches(), update, Saving(100, 2))
    assert_identical(params, undisturbed[1])
    assert rows(tmp_path) == rows(undisturbed[0])


def test_sigterm_at_the_last_step_is_not_lost(tmp_path, terminate):
    with pytest.raises(Interrupted):
        train(tmp_path, run_of(3), start, batches(), stopping(2, terminate), Saving(1, 2))
    assert saved_steps(tmp_path, run_of(3)) == [2, 3]


# ---- what a resumed run is given


def damage(folder):
    """Cut every file of a checkpoint short."""
    for path in filter(pathlib.Path.is_file, folder.rglob("*")):
        path.write_bytes(path.read_bytes()[:50])


@pytest.mark.parametrize("damaged", [[10], [9, 10]])
def test_a_run_whose_newest_checkpoints_are_damaged_ends_the_same(undisturbed, tmp_path, capsys, damaged):
    """From the one before them, or from the start."""
    shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    for step in damaged:
        damage(checkpoint_folder(tmp_path, run_of(10).name) / str(step))
    params = train(tmp_path, run_of(10), start, batches(), update, Saving(3, 2))
    assert_identical(params, undisturbed[1])
    assert rows(tmp_path) == rows(undisturbed[0])
    assert saved_steps(tmp_path, run_of(10)) == [9, 10]
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == (1 if damaged == [10] else 3)


@pytest.mark.parametrize(
    ("run", "saving", "says"),
    [
        (run_of(10)._replace(lam=1.3), Saving(3, 2), "lambda=1.2, not 1.3"),
        (run_of(10)._replace(seed=1), Saving(3, 2), "seed=0, not 1"),
        (run_of(10), Saving(3, 2, identity={"config": "abc"}), "config=None, not 'abc'"),
        (run_of(8), Saving(3, 2), "newest checkpoint is of step 10, past the budget 8"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(undisturbed, tmp_path, run, saving, says):
    shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError) as error:
        train(tmp_path, run, start, batches(), update, saving)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert saved_steps(tmp_path, run_of(10)) == [9, 10]


def test_the_initial_state_is_freed_before_another_is_read(undisturbed, tmp_path, monkeypatch):
    """And a finished run's optimizer is not read at all."""
    shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    made, reads, read = [], [], Checkpoints._read

    def initial():
        made.append(start())
        return made[-1]

    def reading(self, step, like, result_only):
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(made))
        reads.append((step, result_only))
        return read(self, step, like, result_only)

    monkeypatch.setattr(Checkpoints, "_read", reading)
    train(tmp_path, run_of(10), initial, batches(), update, Saving(3, 2))
    train(tmp_path, run_of(12), initial, batches(), update, Saving(3, 2))
    assert reads == [(10, True), (10, False)]


def test_the_best_stays(tmp_path):
    for steps, best in ((2, None), (5, 2), (7, 2), (9, 7), (11, 7)):
        train(tmp_path, run_of(steps), start, batches(), update, Saving(1, 1, best))
        assert saved_steps(tmp_path, run_of(steps)) == sorted({steps, best or steps})
