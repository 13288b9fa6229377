"""Checkpoints: what is read is what was written, bit for bit, whatever became of the buffers or the disk."""

import gc
import os
import pathlib
import resource
import shutil
import sys
import tempfile
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from processes import FORKS

from listopd_jax.errors import UserError
from listopd_jax.train.checkpoints import Checkpoints, _quiet_orbax, abstract
from listopd_jax.train.optimizer import TrainState, init_state

# When one read fails orbax abandons the others, and Python complains about that when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(0.1))


@pytest.fixture(autouse=True, scope="module")
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


def restored(folder, seed=0, size=1000, **options):
    """What the newest good checkpoint of `folder` gives a run whose initial state is another."""
    with Checkpoints(folder, keep=2, **options) as checkpoints:
        return checkpoints.restore(abstract(make_state(seed, size)))


@pytest.mark.parametrize(("file", "shown"), [("/lib/orbax/checkpoint/read.py", 0), ("/lib/own.py", 1)])
def test_what_orbax_leaves_behind_prints_no_traceback(monkeypatch, file, shown):
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    _quiet_orbax.__wrapped__()
    try:
        exec(compile("raise Exception('Encountered error while reading array index')", file, "exec"))
    except Exception as e:
        sys.unraisablehook(types.SimpleNamespace(exc_value=e, exc_traceback=e.__traceback__))
    assert len(said) == shown


def test_round_trip_is_bit_identical(tmp_path):
    progress = {"batches": {"next_index": 7, "name": "é", "nested": [1, None, 0.1]}}
    with Checkpoints(tmp_path / "new" / "run", keep=2) as checkpoints:
        assert checkpoints.steps == []
        assert checkpoints.restore(abstract(make_state(2))) is None
        checkpoints.save(3, make_state(1), progress)
    saved = restored(tmp_path / "new" / "run")
    assert_identical(saved.state, make_state(1))
    assert (saved.step, saved.progress) == (3, progress)


def test_the_newest_are_kept(tmp_path):
    save_all(tmp_path, [2, 4, 6, 8])
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [6, 8]
    saved = restored(tmp_path)
    assert_identical(saved.state, make_state(8))
    assert (saved.step, saved.progress) == (8, {"batches": {"next_index": 8}})


def test_the_best_is_kept_besides(tmp_path):
    with Checkpoints(tmp_path, keep=2, best=4) as checkpoints:
        for step in (2, 4, 6, 8, 10):
            checkpoints.save(step, make_state(step), {})
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [4, 8, 10]


def test_a_finished_runs_parameters_load_without_the_optimizer(tmp_path):
    save_all(tmp_path, [1])
    shutil.rmtree(tmp_path / "1" / "opt_state")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        saved = checkpoints.restore(abstract(make_state(0)), final=1)
    assert_identical(saved.state.params, make_state(1).params)
    assert saved.state.opt_state is None


def test_later_updates_do_not_reach_a_checkpoint(tmp_path):
    """Updates reuse the donated buffers while the save runs; on a CPU it reads those very buffers."""
    double = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x + 1, s), donate_argnums=0)
    state, expected = make_state(0, size=200_000), {}
    with Checkpoints(tmp_path, keep=4) as checkpoints:
        for step in range(1, 5):
            expected[step] = jax.tree.map(lambda x: np.array(x, copy=True), state)
            checkpoints.save(step, state, {})
            for _ in range(5):
                state = double(state)
    for step in range(4, 0, -1):
        saved = restored(tmp_path, 9, size=200_000)  # its checksums, too, are of the state that was saved
        assert saved.step == step
        assert_identical(saved.state, expected[step])
        shutil.rmtree(tmp_path / str(step))


def test_a_restored_state_can_be_trained_on(tmp_path):
    """Restored buffers are donated too."""
    save_all(tmp_path, [1])
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + x.dtype.type(1), s), donate_argnums=0)
    expected = step(make_state(1))
    assert_identical(step(restored(tmp_path).state), expected)


def test_a_half_written_checkpoint_is_not_seen_and_is_cleaned_up(tmp_path):
    """Orbax renames a finished checkpoint into place; what a killed save leaves has another name."""
    save_all(tmp_path, [1])
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps == [1]
        checkpoints.save(3, make_state(2), {})
    assert_identical(restored(tmp_path).state, make_state(2))
    assert {p.name for p in tmp_path.iterdir()} == {"1", "3"}


# ---- what a user can meet


def files_of(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def delete(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def halve(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip(path):
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    if data:
        data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("harm", [delete, empty, halve, flip])
def test_whatever_becomes_of_a_file_what_is_restored_was_saved(tmp_path, capsys, harm):
    """Each file of the newest checkpoint in turn: it is read right, or passed over with one line for the one before."""
    save_all(tmp_path / "whole", [1, 2])
    passed_over = 0
    for i, path in enumerate(files_of(tmp_path / "whole" / "2")):
        folder = tmp_path / str(i)
        shutil.copytree(tmp_path / "whole", folder)
        harm(folder / "2" / path)
        saved = restored(folder)
        assert_identical(saved.state, make_state(saved.step))
        assert saved.progress == {"batches": {"next_index": saved.step}}
        lines = [line for line in capsys.readouterr().err.splitlines() if line]
        assert [line.startswith(f"warning: {folder / '2'}: damaged") for line in lines] == [True] * (
            2 - saved.step
        )
        assert (folder / "2").exists() == (saved.step == 2)  # else it would stand in the way of the new one
        assert not any(word in line for line in lines for word in ("TensorStore", "zarr", "ocdbt", "[source"))
        passed_over += saved.step == 1
    assert passed_over >= 3


@pytest.mark.parametrize("text", ["", "{}", "null", "[1]", '{"sha256": 3}', '{"progress": {}', "\x00"])
def test_a_broken_record_is_passed_over(tmp_path, capsys, text):
    save_all(tmp_path, [1, 2])
    (tmp_path / "2" / "record" / "metadata").write_text(text)
    assert restored(tmp_path).step == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_single_bit_of_a_weight_shows(tmp_path, capsys, monkeypatch):
    """Even where the file format does not notice: the weights are changed after they were read."""
    save_all(tmp_path, [1, 2])
    load = Checkpoints._load

    def loaded(self, step, **items):
        found = load(self, step, **items)
        if step == 2 and "params" in found:
            w = found["params"]["layers"]["w"]
            found["params"]["layers"]["w"] = w.at[1, 2].set(jnp.nextafter(w[1, 2], jnp.inf))
        return found

    monkeypatch.setattr(Checkpoints, "_load", loaded)
    assert restored(tmp_path).step == 1
    assert "params is not what was saved" in capsys.readouterr().err


def test_without_any_good_checkpoint_they_are_put_aside(tmp_path, capsys):
    """The run starts over, and nothing is lost."""
    folder = tmp_path / "run"
    for content in (1, 2):  # also where something was put aside before
        save_all(folder, [content, 3])
        for step in (content, 3):
            flip(folder / str(step) / "record" / "metadata")
        with Checkpoints(folder, keep=2) as checkpoints:
            assert checkpoints.restore(abstract(make_state(0))) is None
            assert checkpoints.steps == []
            checkpoints.save(1, make_state(5), {})
        assert "moved to run.damaged" in capsys.readouterr().err
        assert {p.name for p in (tmp_path / "run.damaged").iterdir()} == {str(content), "3"}
        assert_identical(restored(folder).state, make_state(5))
        shutil.rmtree(folder)


@pytest.mark.parametrize("change", ["smaller", "larger", "other names"])
def test_another_models_checkpoint_is_one_line(tmp_path, change):
    """Never cut, padded, partly read, or taken for a damaged one."""
    save_all(tmp_path, [1])
    like = make_state(0, size={"smaller": 900, "larger": 1100}.get(change, 1000))
    if change == "other names":
        params = like.params | {"more": jnp.zeros(3)}
        like = init_state(params, TX)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert str(tmp_path / "1") in refused(checkpoints.restore, abstract(like))
        assert checkpoints.steps == [1]


@pytest.mark.parametrize(
    ("saved", "now", "says"),
    [
        ({"seed": 3, "lambda": 1.2}, {"seed": 4, "lambda": 1.2}, "seed=3, not 4"),
        ({"seed": 3, "lambda": 1.2}, {"seed": 3, "lambda": 1.25}, "lambda=1.2, not 1.25"),
        ({"seed": 3}, {"seed": 3, "config": "abc"}, "config=None, not 'abc'"),
    ],
)
def test_another_runs_checkpoint_is_one_line(tmp_path, saved, now, says):
    with Checkpoints(tmp_path, 2, saved) as checkpoints:
        checkpoints.save(1, make_state(1), {})
    assert restored(tmp_path, identity=saved).step == 1
    message = refused(lambda: restored(tmp_path, identity=now))
    assert says in message and str(tmp_path / "1") in message


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", pathlib.Path("/proc/listopd")):
        assert str(folder) in refused(lambda folder=folder: save_all(folder, [1]))


def save_on_a_full_disk(folder, results):
    """Save 4 MB where no file may grow beyond 100 kB; Python and tensorstore see failing writes."""
    state, outcome = make_state(2, size=250_000), ("nothing", "")
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            with Checkpoints(folder, keep=2) as checkpoints:
                checkpoints.save(2, state, {})
        except Exception as e:
            outcome = type(e).__name__, str(e)
        log.seek(0)
        results.put((*outcome, log.read().decode()))


def test_a_full_disk_is_one_line(tmp_path):
    """Though it is a thread of the background that meets it; the checkpoint before stays."""
    save_all(tmp_path, [1])
    results = FORKS.Queue()
    process = FORKS.Process(target=save_on_a_full_disk, args=(tmp_path, results))
    process.start()
    name, message, log = results.get(timeout=60)
    process.join(60)
    assert name == "UserError", message
    assert str(tmp_path) in message and "\n" not in message
    assert log == ""
    saved = restored(tmp_path)
    assert saved.step == 1
    assert_identical(saved.state, make_state(1))
