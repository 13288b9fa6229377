"""The resumable training loop that SFT and OPD share: batches, updates, metrics, checkpoints."""

import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from listopd_jax.errors import Interrupted, UserError
from listopd_jax.lifecycle import sigterm_flag
from listopd_jax.metrics_log import MetricsLog, progress
from listopd_jax.train.checkpoints import Checkpoints
from listopd_jax.train.optimizer import TrainState


class BatchIterator(Protocol):
    """An endless stream of batches that can be saved and set back (grain's iterators can)."""

    def __next__(self) -> dict[str, Any]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


class Run(NamedTuple):
    """One training run: its unique name, what identifies it in the logs, and how long it is."""

    name: str
    stage: str
    fixed: dict[str, Any]  # e.g. {"lambda": 1.2, "seed": 0}
    steps: int


Update = Callable[[TrainState, dict[str, Any], int], tuple[TrainState, dict[str, Any]]]


def train(
    workdir: pathlib.Path,
    run: Run,
    state: TrainState,
    batches: BatchIterator,
    update: Update,
    every: int,
    keep: int,
) -> TrainState:
    """Bring `run` to its last step and return the final state; a run that is there already is only loaded.

    `update(state, batch, step)` does 0-based step number `step`; its metrics hold the number of "tokens" it worked
    on. A checkpoint is written every `every` steps and at the end; a killed run goes on from the newest one, with
    the same batches, as if nothing had happened. SIGTERM finishes the step, saves and raises Interrupted.
    """
    with Checkpoints(checkpoint_folder(workdir, run.name), keep) as checkpoints:
        start = checkpoints.latest_step
        if start:
            state, saved = checkpoints.restore(state)
            batches.set_state(saved["batches"])
        if start > run.steps:
            raise UserError(
                f"{checkpoint_folder(workdir, run.name)}: its newest checkpoint is of step {start}, past the "
                f"budget {run.steps} that is to be evaluated; delete the folder to train the run again"
            )
        if start == run.steps:
            return state
        with (
            MetricsLog(workdir, run.name, run.stage, run.fixed, resume_step=start) as log,
            progress(run.steps, run.name, initial=start) as bar,
            sigterm_flag() as stop,
        ):
            for step in range(start, run.steps):
                state, metrics = _timed(update, state, next(batches), step)
                if not math.isfinite(metrics["loss"]):  # before a checkpoint keeps it
                    raise UserError(
                        f"{run.name}: the loss is not finite at step {step + 1}; lower the lr or set opd.clip"
                    )
                log.log(step + 1, metrics)
                bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
                bar.update()
                if (step + 1) % every == 0 or step + 1 == run.steps or stop.is_set():
                    checkpoints.save(step + 1, state, {"batches": batches.get_state()})
                if stop.is_set():
                    raise Interrupted(
                        f"{run.name}: saved at step {step + 1}; the same command goes on from there"
                    )
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
