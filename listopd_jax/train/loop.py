"""The resumable training loop that SFT and OPD share: batches, updates, metrics, checkpoints."""

import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax

from listopd_jax.errors import Interrupted, UserError
from listopd_jax.lifecycle import reached, sigterm_flag
from listopd_jax.metrics_log import MetricsLog, progress
from listopd_jax.parallel.hosts import anywhere
from listopd_jax.trackers import UNTRACKED, Tracking
from listopd_jax.train.checkpoints import Checkpoints, abstract
from listopd_jax.train.collapse import Watch
from listopd_jax.train.optimizer import TrainState


class BatchIterator(Protocol):
    """An endless stream of batches whose state can be saved and restored (grain's iterators can)."""

    def __next__(self) -> dict[str, Any]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


class Run(NamedTuple):
    """One training run: its unique name, its stage, its λ and seed, and its length."""

    name: str
    stage: str
    lam: float | None  # None where there is no λ: supervised stages
    seed: int | None
    steps: int
    guard: str = ""  # the options of opd.guard, where there are any
    sweep: str = ""  # the point of opd.sweep, where there is one

    @property
    def labels(self) -> dict[str, Any]:
        """λ, seed and any guard and point by the names that records, logs and checkpoints give them."""
        some = {"guard": self.guard, "sweep": self.sweep}
        return {"lambda": self.lam, "seed": self.seed} | {name: text for name, text in some.items() if text}


class Saving(NamedTuple):
    """When a run is saved, which checkpoints stay, and what must match, with `Run.labels`, for one to be used."""

    every: int  # steps
    keep: int  # of the newest
    best: int | None = None  # step of a further one that stays
    identity: dict[str, Any] = {}


Update = Callable[[TrainState, dict[str, Any], int], tuple[TrainState, dict[str, Any]]]


def train(
    workdir: pathlib.Path,
    run: Run,
    initial: Callable[[], TrainState],
    batches: BatchIterator,
    update: Update,
    saving: Saving,
    watch: Watch | None = None,
    tracking: Tracking = UNTRACKED,
) -> Any:
    """Bring `run` to its last step and return its result (TrainState); a finished run is only loaded.

    `initial()` makes the state to start from, which belongs to the run. `update(state, batch, step)` does 0-based step
    number `step`; its metrics hold the number of "tokens" it worked on, and "completions" where there are any to log. A
    checkpoint is written every `saving.every` steps and at the end; a killed run resumes from the newest one, with the
    same batches, as if nothing had happened: apart from these, a step may depend only on its number and `watch`, which
    looks at the metrics of each and may end the run early. SIGTERM finishes the step, saves and raises Interrupted.
    """
    parts = {"batches": batches} | ({} if watch is None else {"watch": watch})
    with open_checkpoints(workdir, run, saving) as checkpoints:
        state, start = _resume(checkpoints, initial, parts, run.steps)
        if start > run.steps:
            raise UserError(
                f"{checkpoint_folder(workdir, run.name)}: its newest checkpoint is of step {start}, past the budget "
                f"{run.steps} that is to be evaluated; delete the folder to train the run again"
            )
        if start < run.steps and not (watch and watch.stopped):
            log = MetricsLog(workdir, run.name, run.stage, run.labels, start, tracking)
            state = _train_on(log, run, state, start, parts, update, checkpoints, saving.every)
    return getattr(state, state.result)


def _resume(
    checkpoints: Checkpoints, initial: Callable[[], TrainState], parts: Mapping[str, Any], final: int
) -> tuple[TrainState, int]:
    """The newest saved state and its step, with `parts` set back to it; `initial()` and 0 if there is none."""
    # Made even if there is a checkpoint: it gives the shapes, dtypes and shardings to read it with.
    state = initial()
    if not checkpoints.steps:
        return state, 0
    like = abstract(state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()  # memory may not hold two states
    saved = checkpoints.restore(like, final)
    if saved is None:
        return initial(), 0
    for name, part in parts.items():
        part.set_state(saved.progress[name])
    return saved.state, saved.step


def _train_on(
    log: MetricsLog,
    run: Run,
    state: TrainState,
    start: int,
    parts: Mapping[str, Any],
    update: Update,
    checkpoints: Checkpoints,
    every: int,
) -> TrainState:
    """The steps after `start`, logged and saved; the last save is on disk when this returns or raises Interrupted."""
    batches, watch = parts["batches"], parts.get("watch")
    with (
        sigterm_flag() as stop,
        log,
        progress(run.steps, run.name, initial=start) as bar,
    ):
        for step in range(start + 1, run.steps + 1):
            state, metrics, completions = _timed(update, state, next(batches), step - 1)
            if not math.isfinite(metrics["loss"]):  # before a checkpoint keeps it
                raise UserError(
                    f"{run.name}: the loss is not finite at step {step}; lower the lr or set opd.clip"
                )
            # Logged before it is saved: a run killed in between repeats the step, and its new row replaces this one.
            log.log(step, metrics | (watch.observe(step, metrics) if watch else {}))
            log.completions(step, completions)
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
            bar.update()
            reached(f"{run.name} step {step}")
            # All hosts must save at the same step, and the signal may have reached only one of them.
            stopping = anywhere(stop.is_set())
            over = step == run.steps or bool(watch and watch.stopped)
            if stopping or over or step % every == 0:
                checkpoints.save(step, state, {name: part.get_state() for name, part in parts.items()})
                reached(f"{run.name} saving {step}")
            if stopping:
                checkpoints.wait()
                raise Interrupted(f"{run.name}: saved at step {step}; the same command resumes from there")
            if over:
                break
        checkpoints.wait()
    return state


def _timed(
    update: Update, state: TrainState, batch: dict[str, Any], step: int
) -> tuple[TrainState, dict[str, float], list[dict[str, Any]]]:
    """One update, its metrics as floats, tokens as tokens per second of wall time; and any completions."""
    began = time.perf_counter()
    state, metrics = update(state, batch, step)
    completions = metrics.pop("completions", [])
    # Also waits for the device, so the clock is read when the step is done.
    metrics = {name: float(value) for name, value in metrics.items()}
    metrics["tokens_per_second"] = metrics.pop("tokens") / (time.perf_counter() - began)
    return state, metrics, completions


def open_checkpoints(workdir: pathlib.Path, run: Run, saving: Saving) -> Checkpoints:
    """The checkpoints of a run, which must have been saved by one that matches `saving` and the labels of `run`."""
    folder = checkpoint_folder(workdir, run.name)
    return Checkpoints(folder, saving.keep, run.labels | saving.identity, saving.best)


def checkpoint_folder(workdir: pathlib.Path, run: str) -> pathlib.Path:
    """Where the checkpoints of a run are."""
    return workdir / "checkpoints" / run
