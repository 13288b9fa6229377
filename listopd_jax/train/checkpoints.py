"""Orbax checkpoints of one training run: parameters, optimizer and progress, each its own item.

A run's folder is `workdir/checkpoints/<run>`. The optimizer is an item of its own, so a finished run's parameters
load without it. Orbax writes to a temporary folder and renames: a killed save leaves no checkpoint at all.
"""

import contextlib
import logging
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from listopd_jax.errors import UserError
from listopd_jax.train.optimizer import TrainState


class Checkpoints:
    """The checkpoints of one run; use as a context manager so that the last save is on disk at the end."""

    def __init__(self, folder: pathlib.Path, keep: int):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=False
        )
        names = ("params", "opt_state", "progress")
        self._manager = ocp.CheckpointManager(folder.absolute(), item_names=names, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        with self._saving():
            self._manager.wait_until_finished()
        self._manager.close()

    @property
    def latest_step(self) -> int:
        """Step of the newest complete checkpoint, 0 if there is none."""
        return self._manager.latest_step() or 0

    def save(self, step: int, state: TrainState, progress: dict[str, Any]) -> None:
        """Save after `step` updates; `progress` is JSON (data iterator state and the like)."""
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            opt_state=ocp.args.StandardSave(state.opt_state),
            progress=ocp.args.JsonSave(progress),
        )
        with self._saving():
            self._manager.save(step, args=items)

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """One line for what fails; orbax's threads would each print a traceback of it besides."""
        print_traceback, threading.excepthook = threading.excepthook, lambda _: None
        disabled, logging.root.manager.disable = logging.root.manager.disable, logging.ERROR
        try:
            yield
        except (OSError, ValueError) as e:  # tensorstore reports a full disk as a ValueError
            reason = " ".join(str(e).split())[:200]
            raise UserError(
                f"{self._manager.directory}: checkpoint not saved ({reason}); free disk space and run again"
            ) from e
        finally:
            threading.excepthook = print_traceback
            logging.root.manager.disable = disabled

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest state, with the shapes and dtypes of `like`, and its progress."""
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(_abstract(like.params)),
            opt_state=ocp.args.StandardRestore(_abstract(like.opt_state)),
            progress=ocp.args.JsonRestore(),
        )
        restored = self._restore(items)
        return TrainState(restored.params, restored.opt_state), restored.progress

    def restore_params(self, like: Any) -> Any:
        """The newest parameters alone, with the shapes and dtypes of `like`."""
        items = ocp.args.Composite(params=ocp.args.StandardRestore(_abstract(like)))
        return self._restore(items).params

    def _restore(self, items: ocp.args.Composite) -> Any:
        try:
            return self._manager.restore(self.latest_step, args=items)
        except Exception as e:  # orbax and tensorstore raise bare Exceptions for damaged files
            reason = " ".join(str(e).split())[:200]
            raise UserError(
                f"{self._manager.directory / str(self.latest_step)}: this checkpoint cannot be restored ({reason}); "
                "delete that folder to go on from the one before it"
            ) from e


def _abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), tree
    )
