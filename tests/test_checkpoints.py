"""Checkpoints: what is read is what was written, bit for bit, whatever became of the buffers or the disk."""

import gc
import multiprocessing
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from listopd_jax.errors import UserError
from listopd_jax.train.checkpoints import Checkpoints
from listopd_jax.train.optimizer import TrainState, init_state

# When one read fails orbax abandons the others, and Python complains about that when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(0.1))


@pytest.fixture(autouse=True)
def collect():
    yield
    gc.collect()


def make_state(seed=0, size=1000):
    rng = np.random.default_rng(seed)
    odd = np.array([0.0, -0.0, 1e-45, np.inf, np.nan], np.float32)
    params = {
        "layers": {"w": jnp.asarray(rng.normal(size=(4, size)), jnp.float32)},
        "half": jnp.asarray(rng.normal(size=7), jnp.bfloat16),
        "odd": jnp.asarray(odd),
    }
    state = init_state(params, TX)
    moments = jax.tree.map(lambda x: (x + rng.normal(size=x.shape)).astype(x.dtype), state.opt_state)
    return TrainState(params, moments)


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(map(np.asarray, jax.tree.leaves(a)), map(np.asarray, jax.tree.leaves(b)), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def save_all(folder, steps, keep=2):
    with Checkpoints(folder, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"batches": {"next_index": step}})


def refused(action, *args) -> str:
    """The one line with which `action` fails, a UserError's."""
    try:
        action(*args)
    except Exception as e:
        kind, message = type(e), str(e)  # not the exception itself: orbax's drag unfinished reads along
    else:
        kind, message = None, "nothing was raised"
    assert kind is UserError, message[:300]
    assert "\n" not in message and len(message) < 600
    return message


def test_round_trip_is_bit_identical(tmp_path):
    progress = {"batches": {"next_index": 7, "name": "é", "nested": [1, None, 0.1]}}
    with Checkpoints(tmp_path / "new" / "run", keep=2) as checkpoints:
        assert checkpoints.latest_step == 0
        checkpoints.save(3, make_state(1), progress)
    with Checkpoints(tmp_path / "new" / "run", keep=2) as checkpoints:
        assert checkpoints.latest_step == 3
        state, restored = checkpoints.restore(make_state(2))
    assert_identical(state, make_state(1))
    assert restored == progress


def test_the_newest_are_kept(tmp_path):
    save_all(tmp_path, [2, 4, 6, 8])
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [6, 8]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step == 8
        state, progress = checkpoints.restore(make_state(0))
    assert_identical(state, make_state(8))
    assert progress == {"batches": {"next_index": 8}}


def test_parameters_load_without_the_optimizer(tmp_path):
    save_all(tmp_path, [1])
    shutil.rmtree(tmp_path / "1" / "opt_state")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert_identical(checkpoints.restore_params(make_state(0).params), make_state(1).params)


def test_later_updates_do_not_reach_a_checkpoint(tmp_path):
    """Updates reuse the donated buffers at once; on a CPU a save may read those very buffers."""
    double = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x + 1, s), donate_argnums=0)
    state, expected = make_state(0, size=200_000), {}
    with Checkpoints(tmp_path, keep=4) as checkpoints:
        for step in range(1, 5):
            expected[step] = jax.tree.map(lambda x: np.array(x, copy=True), state)
            checkpoints.save(step, state, {})
            for _ in range(5):
                state = double(state)
    for step in range(4, 0, -1):
        with Checkpoints(tmp_path, keep=4) as checkpoints:
            assert checkpoints.latest_step == step
            assert_identical(checkpoints.restore(make_state(9, size=200_000))[0], expected[step])
        shutil.rmtree(tmp_path / str(step))


def test_a_restored_state_can_be_trained_on(tmp_path):
    """Restored buffers are donated too."""
    save_all(tmp_path, [1])
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        state, _ = checkpoints.restore(make_state(0))
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + x.dtype.type(1), s), donate_argnums=0)
    expected = step(make_state(1))
    assert_identical(step(state), expected)


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    """Orbax renames a finished checkpoint into place; what a killed save leaves has another name."""
    save_all(tmp_path, [1])
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    (tmp_path / "2.orbax-checkpoint-tmp" / "commit_success.txt").unlink(missing_ok=True)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step == 1
        checkpoints.save(2, make_state(2), {})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert_identical(checkpoints.restore(make_state(0))[0], make_state(2))


# ---- what a user can meet


def damage(folder):
    """Cut every data file of a checkpoint short."""
    for path in folder.rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:50])


@pytest.mark.parametrize("read", ["restore", "restore_params"])
def test_a_damaged_checkpoint_is_one_line(tmp_path, read):
    """It names the folder to delete, and without it the one before is used."""
    save_all(tmp_path, [1, 2])
    damage(tmp_path / "2")
    like = make_state(0) if read == "restore" else make_state(0).params
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert str(tmp_path / "2") in refused(getattr(checkpoints, read), like)
    shutil.rmtree(tmp_path / "2")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert_identical(checkpoints.restore(make_state(0))[0], make_state(1))


def test_a_missing_part_is_one_line(tmp_path):
    save_all(tmp_path, [1])
    shutil.rmtree(tmp_path / "1" / "opt_state")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert str(tmp_path / "1") in refused(checkpoints.restore, make_state(0))


@pytest.mark.parametrize("change", ["smaller", "larger", "other names"])
def test_another_models_checkpoint_is_one_line(tmp_path, change):
    """Never cut, padded or partly read."""
    save_all(tmp_path, [1])
    like = make_state(0, size={"smaller": 900, "larger": 1100}.get(change, 1000))
    if change == "other names":
        params = like.params | {"more": jnp.zeros(3)}
        like = init_state(params, TX)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert str(tmp_path / "1") in refused(checkpoints.restore, like)


def save_on_a_full_disk(folder, results):
    """Save 4 MB where no file may grow beyond 100 kB; Python and tensorstore see failing writes."""
    state = make_state(2, size=250_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        with Checkpoints(folder, keep=2) as checkpoints:
            checkpoints.save(2, state, {})
    except Exception as e:
        results.put((type(e).__name__, str(e)))
    else:
        results.put(("nothing", ""))


def test_a_full_disk_is_one_line(tmp_path):
    save_all(tmp_path, [1])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["listopd_jax.train.checkpoints"])
    results = context.Queue()
    process = context.Process(target=save_on_a_full_disk, args=(tmp_path, results))
    process.start()
    name, message = results.get(timeout=60)
    process.join(60)
    assert name == "UserError", message
    assert str(tmp_path) in message and "\n" not in message
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step == 1
        assert_identical(checkpoints.restore(make_state(0))[0], make_state(1))
