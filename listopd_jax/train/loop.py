"""The resumable training loop that SFT and OPD share: batches, updates, metrics, checkpoints."""

import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from listopd_jax.errors import Interrupted, UserError
from listopd_jax.lifecycle import reached, sigterm_flag
from listopd_jax.metrics_log import MetricsLog, progress
from listopd_jax.parallel.hosts import anywhere
from listopd_jax.train.checkpoints import Checkpoints, abstract
from listopd_jax.train.optimizer import TrainState


class BatchIterator(Protocol):
    """An endless stream of batches that can be saved and set back (grain's iterators can)."""

    def __next__(self) -> dict[str, Any]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


class Run(NamedTuple):
    """One training run: its unique name, its stage, the λ and seed it is of, and how long it is."""

    name: str
    stage: str
    lam: float | None  # None where there is no λ: supervised stages
    seed: int | None
    steps: int
    guard: str = ""  # the options of opd.guard, where there are any

    @property
    def labels(self) -> dict[str, Any]:
        """λ and seed by the names that records, logs and checkpoints give them."""
        return {"lambda": self.lam, "seed": self.seed}


class Saving(NamedTuple):
    """When a run is saved, which checkpoints stay, and in what, besides `Run.labels`, one must agree to be used."""

    every: int  # steps
    keep: int  # of the newest
    best: int | None = None  # step of one that stays besides
    identity: dict[str, Any] = {}


Update = Callable[[TrainState, dict[str, Any], int], tuple[TrainState, dict[str, Any]]]


def train(
    workdir: pathlib.Path,
    run: Run,
    initial: Callable[[], TrainState],
    batches: BatchIterator,
    update: Update,
    saving: Saving,
) -> Any:
    """Bring `run` to its last step and return its parameters; a run that is there already is only loaded.

    `initial()` makes the state to start from, which belongs to the run. `update(state, batch, step)` does 0-based step
    number `step`; its metrics hold the number of "tokens" it worked on. A checkpoint is written every `saving.every`
    steps and at the end; a killed run resumes from the newest one, with the same batches, as if nothing had happened:
    all else that a step may depend on is its number. SIGTERM finishes the step, saves and raises Interrupted.
    """
    folder = checkpoint_folder(workdir, run.name)
    with Checkpoints(folder, saving.keep, run.labels | saving.identity, saving.best) as checkpoints:
        state, start = _resume(checkpoints, initial, batches, run.steps)
        if start > run.steps:
            raise UserError(
                f"{folder}: its newest checkpoint is of step {start}, past the budget {run.steps} that is to be "
                "evaluated; delete the folder to train the run again"
            )
        if start < run.steps:
            state = _train_on(workdir, run, state, start, batches, update, checkpoints, saving.every)
    return state.params


def _resume(
    checkpoints: Checkpoints, initial: Callable[[], TrainState], batches: BatchIterator, final: int
) -> tuple[TrainState, int]:
    """The newest saved state and its step, with `batches` set back to it; `initial()` and 0 if there is none."""
    state = initial()
    if not checkpoints.steps:
        return state, 0
    like = abstract(state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()  # there need not be memory for two states
    saved = checkpoints.restore(like, final)
    if saved is None:
        return initial(), 0
    batches.set_state(saved.progress["batches"])
    return saved.state, saved.step


def _train_on(
    workdir: pathlib.Path,
    run: Run,
    state: TrainState,
    start: int,
    batches: BatchIterator,
    update: Update,
    checkpoints: Checkpoints,
    every: int,
) -> TrainState:
    """The steps after `start`, logged and saved; the last save is on disk when this returns or raises Interrupted."""
    with (
        sigterm_flag() as stop,
        MetricsLog(workdir, run.name, run.stage, run.labels, resume_step=start) as log,
        progress(run.steps, run.name, initial=start) as bar,
    ):
        for step in range(start + 1, run.steps + 1):
            state, metrics = _timed(update, state, next(batches), step - 1)
            if not math.isfinite(metrics["loss"]):  # before a checkpoint keeps it
                raise UserError(
                    f"{run.name}: the loss is not finite at step {step}; lower the lr or set opd.clip"
                )
            log.log(step, metrics)
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
            bar.update()
            reached(f"{run.name} step {step}")
            stopping = anywhere(stop.is_set())
            if stopping or step % every == 0 or step == run.steps:
                checkpoints.save(step, state, {"batches": batches.get_state()})
                reached(f"{run.name} saving {step}")
            if stopping:
                checkpoints.wait()
                raise Interrupted(f"{run.name}: saved at step {step}; the same command resumes from there")
        checkpoints.wait()
    return state


def _timed(
    update: Update, state: TrainState, batch: dict[str, Any], step: int
) -> tuple[TrainState, dict[str, float]]:
    """One update, its metrics as floats, tokens turned into tokens per second of wall time."""
    began = time.perf_counter()
    state, metrics = update(state, batch, step)
    metrics = {name: float(value) for name, value in metrics.items()}
    metrics["tokens_per_second"] = metrics.pop("tokens") / (time.perf_counter() - began)
    return state, metrics


def checkpoint_folder(workdir: pathlib.Path, run: str) -> pathlib.Path:
    """Where the checkpoints of a run are."""
    return workdir / "checkpoints" / run
