"""Training in real processes that are killed, terminated, run out of disk, or move to other devices."""

import contextlib
import itertools
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from processes import FORKS

from listopd_jax.errors import Interrupted, UserError
from listopd_jax.lifecycle import SIGNAL_VARIABLE, interruptible
from listopd_jax.metrics_log import read_metrics
from listopd_jax.train.checkpoints import Checkpoints, abstract
from listopd_jax.train.loop import Run, Saving, checkpoint_folder, train
from listopd_jax.train.optimizer import apply_gradients, init_state

STEPS = 20
RUN = Run("opd_lambda1.2_seed0", "opd", lam=1.2, seed=0, steps=STEPS)
TX = optax.scale_by_adam()
SHAPE = (256, 128)
ALWAYS, AT_THE_END = Saving(1, 2), Saving(1000, 2)


# ---- the program that is killed: a real run of tiny arrays, saved at every step


def batches():
    """An endless, shuffled, prefetching grain iterator, as the data module's."""
    import grain

    source = grain.MapDataset.source(np.arange(7, dtype=np.float32)).shuffle(seed=1).repeat().batch(2)
    return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def initial():
    return init_state({"w": jax.numpy.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE) / 1e3}, TX)


@jax.jit
def compiled(state, batch, key):
    noise = jax.random.normal(key, (SHAPE[0], 16))

    def loss_of(params):
        return (jax.numpy.tanh(noise @ (params["w"].T @ params["w"])[:16] * 1e-3) ** 2).mean() * batch.sum()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return apply_gradients(state, grads, jax.numpy.float32(0.1), TX), loss


def update(state, batch, step):
    """A step whose result depends on everything that a resumed run has to get right."""
    time.sleep(0.01)
    key = jax.random.fold_in(jax.random.key(3), step)
    state, loss = compiled(state, jax.numpy.asarray(batch), key)
    return state, {"loss": loss, "first": batch[0], "tokens": 100}


def train_here(workdir, saving=ALWAYS, update=update):
    return train(pathlib.Path(workdir), RUN, initial, batches(), update, saving)


def job(workdir, log, most_bytes, saving, signal_at, at_commit, in_code):
    """What a process of the tests does: train as main would, its stderr in `log`."""
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    os.environ[SIGNAL_VARIABLE] = signal_at
    if at_commit:
        die_at_commit(at_commit)
    if most_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    try:
        with interruptible():
            train_here(workdir, saving, dying_in_code(*in_code) if in_code else update)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as e:
        print(e, file=sys.stderr)


def die_at_commit(step):
    """kill -9 of this process where the checkpoint of `step` is written, and is about to get its name."""
    path = ocp.path.atomicity.AtomicRenameTemporaryPath
    finalize = path.finalize

    async def dying(self):
        if self.get_final().name == str(step):
            os.kill(os.getpid(), signal.SIGKILL)
        await finalize(self)

    path.finalize = dying


def dying_in_code(step, calls):
    """`update`, after which kill -9 of this process at the `calls`-th call or return of its main thread from `step` on.

    Some 15,000 of these make one step with its save, so a drawn number is a moment in the code, on any machine.
    """
    left = itertools.count(calls, -1)

    def die(*_):
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(state, batch, number):
        if number + 1 == step:
            sys.setprofile(die)
        return update(state, batch, number)

    return dying


def start(workdir, most_bytes=0, saving=ALWAYS, signal_at="", at_commit=0, in_code=()):
    """Start a `job` in a new process in which the imports are done but nothing of JAX has started."""
    workdir.mkdir(exist_ok=True)
    arguments = workdir, workdir / "log", most_bytes, saving, signal_at, at_commit, in_code
    process = FORKS.Process(target=job, args=arguments)
    process.start()
    return process


def folder(workdir):
    return checkpoint_folder(workdir, RUN.name)


def saved_steps(workdir):
    return sorted(int(p.name) for p in folder(workdir).glob("*") if p.name.isdecimal())


def being_saved(workdir):
    return {p.name for p in folder(workdir).glob("*.orbax-checkpoint-tmp*")}


def rows(workdir):
    """The logged rows without the one figure that depends on the clock."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(workdir)]


def end(workdir):
    """Bytes of every array of the last checkpoint, and its progress."""
    with Checkpoints(folder(workdir), 2, RUN.labels) as checkpoints:
        saved = checkpoints.restore(abstract(initial()))
    assert saved.step == STEPS
    leaves = jax.tree.leaves_with_path(saved.state)
    return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in leaves}, saved.progress


def wait_for(condition, process, seconds=300):
    """Poll until `condition()`, or the process has ended, or the time is over."""
    deadline = time.monotonic() + seconds
    while not condition() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)


# ---- kill -9


MOMENTS = ("step", "saving", "commit", "random")
"""A step done and not saved, a save begun, a save all but finished, and anywhere in the code."""


def kill(workdir, rng, moment) -> None:
    """Train one or two checkpoints further, and kill -9 at `moment`."""
    step = max(saved_steps(workdir), default=0) + int(rng.integers(2, 4))
    stale = being_saved(workdir)
    asked = {"commit": {"at_commit": step}, "random": {"in_code": (step, int(rng.integers(30_000)))}}
    process = start(workdir, **asked.get(moment, {"signal_at": f"SIGKILL {RUN.name} {moment} {step}"}))
    process.join(300)
    assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
    assert moment != "commit" or being_saved(workdir) - stale


def train_to_the_end(workdir) -> None:
    """In a process of its own: what the test's process compiles may differ from it in the last bits."""
    process = start(workdir)
    process.join(300)
    assert process.exitcode == 0


def killed_again_and_again(workdir, seed, moments) -> None:
    """Train with interruptions, to the end."""
    rng = np.random.default_rng(seed)
    for moment in moments:
        kill(workdir, rng, moment)
    train_to_the_end(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("chains", [1, pytest.param(6, marks=pytest.mark.soak)])
def test_kill_9_at_any_moment_changes_no_bit(tmp_path, chains):
    """Parameters, optimizer, data iterator and metrics, after kills in steps, in saves and between them."""
    undisturbed = tmp_path / "undisturbed"
    train_to_the_end(undisturbed)
    assert [row["step"] for row in rows(undisturbed)] == list(range(1, STEPS + 1))
    for seed in range(chains):
        workdir = tmp_path / str(seed)
        killed_again_and_again(workdir, seed, np.random.default_rng(seed).permutation(MOMENTS))
        assert rows(workdir) == rows(undisturbed)
        assert end(workdir) == end(undisturbed)
        assert saved_steps(workdir) == [STEPS - 1, STEPS]
        assert not being_saved(workdir)  # half-written checkpoints do not pile up
        assert "damaged" not in (workdir / "log").read_text()


# ---- SIGTERM, a full disk


def messages(workdir):
    """What the job said, without its progress bar."""
    lines = (workdir / "log").read_text().splitlines()
    return [line for line in lines if not line.startswith(RUN.name + ":  ") and "step/s" not in line]


def test_sigterm_saves_and_exits_with_0(tmp_path):
    """Nothing of what was done is done again."""
    process = start(tmp_path, saving=AT_THE_END, signal_at=f"SIGTERM {RUN.name} step 5")
    process.join(300)
    assert process.exitcode == 0 and saved_steps(tmp_path) == [5]
    assert f"{RUN.name}: saved at step 5; the same command resumes from there" in messages(tmp_path)
    process = start(tmp_path, saving=AT_THE_END)
    process.join(300)
    assert process.exitcode == 0
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, STEPS + 1))


def test_sigterm_from_outside_again_and_again_is_heard_once(tmp_path):
    """The process stops itself after step 5, so the first is there when it looks; the others come until it is gone."""
    process = start(tmp_path, saving=AT_THE_END, signal_at=f"SIGSTOP {RUN.name} step 5")
    wait_for(lambda: len(rows(tmp_path)) >= 5, process)
    while process.is_alive():
        with contextlib.suppress(ProcessLookupError):
            for number in (signal.SIGTERM, signal.SIGCONT):
                os.kill(process.pid, number)
        process.join(0.01)
    assert process.exitcode == 0 and saved_steps(tmp_path) == [5]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_full_disk_in_training_is_one_line_and_nothing_is_lost(tmp_path):
    start(tmp_path, signal_at=f"SIGTERM {RUN.name} step 3").join(300)
    before, said = saved_steps(tmp_path), len(messages(tmp_path))
    process = start(tmp_path, most_bytes=50_000)
    process.join(300)
    assert process.exitcode == 2 and before[-1] == 3
    (line,) = messages(tmp_path)[said:]
    assert line.startswith(f"error: {folder(tmp_path)}: checkpoint not saved") and "free disk space" in line
    assert saved_steps(tmp_path) == before
    train_here(tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, STEPS + 1))


# ---- other devices

MESHES = """
import os, pathlib, sys
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from listopd_jax.train.checkpoints import Checkpoints
from listopd_jax.train.loop import Run, Saving, checkpoint_folder, train
from listopd_jax.train.optimizer import TrainState, apply_gradients

tx, workdir = optax.scale_by_adam(), pathlib.Path(sys.argv[1])
weights = {"w": np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32), "b": np.ones(8, np.float32)}

class Batches:
    n = 0
    def __next__(self): self.n += 1; return np.random.default_rng(self.n).normal(size=(8, 16)).astype(np.float32)
    def get_state(self): return {"n": self.n}
    def set_state(self, state): self.n = state["n"]

def on(rows, columns):
    devices = np.array(jax.devices()[: rows * columns]).reshape(rows, columns)
    mesh = Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    specs = {"w": P("fsdp", "tensor"), "b": P("tensor")}
    def initial():
        params = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in weights.items()}
        return TrainState(params, tx.init(params))
    @jax.jit
    def step(state, batch):
        loss = lambda p: (jnp.tanh(batch @ p["w"] + p["b"]) ** 2).mean()
        value, grads = jax.value_and_grad(loss)(state.params)
        return apply_gradients(state, grads, jnp.float32(0.1), tx), value
    def update(state, batch, _):
        state, loss = step(state, jax.device_put(batch, NamedSharding(mesh, P("fsdp"))))
        return state, {"loss": loss, "tokens": 1}
    def run(name, steps):
        return train(workdir, Run(name, "opd", None, None, steps), initial, Batches(), update, Saving(100, 2))
    return run

for name in ("whole", "to_2x4", "to_1x1"):
    on(4, 2)(name, 3)
at_3 = jax.tree.map(np.asarray, on(4, 2)("to_2x4", 3))
ends = {}
for name, shape in (("whole", (4, 2)), ("to_2x4", (2, 4)), ("to_1x1", (1, 1))):
    read = on(*shape)(name, 3)
    assert dict(read["w"].sharding.mesh.shape) == {"fsdp": shape[0], "tensor": shape[1]}, read["w"].sharding
    assert read["w"].addressable_shards[0].data.shape == (16 // shape[0], 8 // shape[1])
    assert all((np.asarray(x) == y).all() for x, y in zip(jax.tree.leaves(read), jax.tree.leaves(at_3)))
    ends[name] = on(*shape)(name, 6)
for name, end in ends.items():
    for x, y in zip(jax.tree.leaves(end), jax.tree.leaves(ends["whole"])):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=2e-5, atol=2e-6)
    moved = [abs(np.asarray(end[k]) - np.asarray(at_3[k])).max() for k in end]
    assert min(moved) > 0.01, "three steps at this rate move every parameter"
print("done")
"""


def test_a_checkpoint_resumes_on_another_mesh(tmp_path):
    """Saved on 4×2 of 8 devices, read bit for bit on 2×4 and on one, and trained on to rounding."""
    done = subprocess.run(
        [sys.executable, "-c", MESHES, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "done", done.stderr[-3000:]
    assert "warning" not in done.stderr
