"""Checkpoints of one training run that survive: written while training continues, proven when they are read.

A run's folder is `workdir/checkpoints/<run>`. A checkpoint has the items `params`, `opt_state`, `average` where one of
the weights is kept (separate items, so that a finished run loads only its result) and `record`, JSON: the step, the
identity of the run (seed, λ and its warm-up, digest of the config), its progress (data iterator) and checksums of the
arrays. Random numbers need no state: the key of every step is folded from seed and step.

Orbax writes to a temporary folder and renames it: a killed save leaves no checkpoint at all. Later damage on disk shows
in the checksums, on any mesh; such a checkpoint is skipped for the one before it.
"""

import contextlib
import functools
import json
import pathlib
import shutil
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, CustomSteps, LatestN

from listopd_jax import files
from listopd_jax.errors import UserError, one_line
from listopd_jax.parallel.hosts import anywhere
from listopd_jax.train.checksum import checksum
from listopd_jax.train.optimizer import TrainState


class Saved(NamedTuple):
    """A restored checkpoint; parts of `state` that were not asked for are None."""

    step: int
    state: TrainState
    progress: dict[str, Any]


class _Damaged(Exception):
    """This checkpoint is not what was saved; the message is one line without its path."""


class Checkpoints:
    """The checkpoints of one run; use as a context manager so that the last save is on disk at the end.

    Args:
      folder: only this run's; made if absent.
      keep: how many of the newest are kept.
      identity: JSON; what a checkpoint must have been saved with to be resumed.
      best: step of a further checkpoint to keep, if there is one.

    Saves return as soon as the state may be changed and continue in the background; a failed one is a UserError of the
    next save, of `wait` or of the end. Every host calls every method.
    """

    def __init__(
        self, folder: pathlib.Path, keep: int, identity: Mapping[str, Any] = {}, best: int | None = None
    ):
        self._folder = folder.absolute()
        # As JSON gives it back (tuples become lists), to compare equal with what a checkpoint holds.
        self._identity = json.loads(json.dumps(identity))
        policies = [LatestN(keep), CustomSteps([] if best is None else [best])]
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # else a damaged one stops the manager from opening
        )

    def __enter__(self) -> "Checkpoints":
        _quiet_orbax()
        self._open()
        return self

    def __exit__(self, *_) -> None:
        with self._reported():
            self._manager.close()

    def _open(self) -> None:
        names = (*TrainState._fields, "record")
        with self._reported():
            self._manager = ocp.CheckpointManager(self._folder, item_names=names, options=self._options)

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending, whether they are damaged or not."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, progress: dict[str, Any]) -> None:
        """Save after `step` updates; `progress` is JSON (data iterator state and the like)."""
        # Summed on the devices before the save begins: the next step may then overwrite these buffers.
        sums = {name: checksum(tree) for name, tree in state.trees.items()}
        record = {"step": step, "identity": self._identity, "progress": progress}
        record |= {"shapes": _shapes(state), "checksums": sums}
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in state.trees.items()}
        items = ocp.args.Composite(**arrays, record=ocp.args.JsonSave(_sealed(record)))
        with self._reported():
            # The loop decides when to save; `force` keeps orbax's own policy out of it.
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Return when everything saved is on disk; UserError if it could not be written."""
        with self._reported():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """One line for what fails while checkpoints are written."""
        try:
            yield
        except (OSError, ValueError) as e:  # tensorstore reports a full disk as a ValueError
            raise UserError(
                f"{self._folder}: checkpoint not saved ({one_line(e)[:200]}); free disk space and run again"
            ) from e

    def restore(self, like: TrainState, final: int | None = None) -> Saved | None:
        """The newest undamaged checkpoint, with the shapes, dtypes and shardings of `like` (see `abstract`).

        Damaged ones are skipped with a warning and deleted once an older one is good. If none is, their folder is put
        aside and the result is None. At step `final` only the result is read. Raises UserError for a checkpoint of
        another run or model.
        """
        steps = self.steps[::-1]
        for i, step in enumerate(steps):
            try:
                saved = self._read(step, like, result_only=step == final)
            except _Damaged as e:
                _warn(f"{self._folder / str(step)}: damaged checkpoint skipped ({e})")
                continue
            with self._reported():
                for damaged in steps[:i]:
                    self._manager.delete(damaged)
            return saved
        if steps:
            self._put_aside()
        return None

    def params_at(self, step: int, like: TrainState) -> Any:
        """The result of the checkpoint at `step`, with the shapes, dtypes and shardings of `like`.

        Nothing is changed on disk. UserError if it is not there, is damaged, or is of another run or model.
        """
        try:
            return getattr(self._read(step, like, result_only=True).state, like.result)
        except _Damaged as e:
            raise UserError(
                f"{self._folder / str(step)}: no intact checkpoint ({e}); run the job again"
            ) from e

    def _read(self, step: int, like: TrainState, result_only: bool) -> Saved:
        record = _unsealed(self._load(step, record=ocp.args.JsonRestore())["record"])
        self._check(step, record, like)
        # Moments are most of a checkpoint, and a finished run needs none of them.
        wanted = {like.result: getattr(like, like.result)} if result_only else like.trees
        arrays = self._load(step, **{name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()})
        for name, tree in arrays.items():
            # A damaged chunk may still decode, so what was read is summed again.
            if checksum(tree) != record["checksums"][name]:
                raise _Damaged(f"{name} is not what was saved")
        return Saved(step, TrainState(**dict.fromkeys(TrainState._fields) | arrays), record["progress"])

    def _check(self, step: int, record: dict[str, Any], like: TrainState) -> None:
        """UserError if the checkpoint is of another run or model than this one."""
        where, saved = self._folder / str(step), record["identity"]
        for name in sorted(saved.keys() | self._identity.keys()):
            if saved.get(name) != (now := self._identity.get(name)):
                raise UserError(
                    f"{where}: was saved by a run with {name}={saved.get(name)!r}, not {now!r}; "
                    "choose another --workdir"
                )
        if record["shapes"] != _shapes(like):
            raise UserError(f"{where}: holds another model or optimizer; choose another --workdir")

    def _load(self, step: int, **items: ocp.args.CheckpointArgs) -> dict[str, Any]:
        """Items of a checkpoint; _Damaged, on all hosts, if one of them cannot read one."""
        problem, found = None, {}
        try:
            found = dict(self._manager.restore(step, args=ocp.args.Composite(**items)).items())
        except (jax.errors.JaxRuntimeError, MemoryError):  # not the files' fault
            raise
        except Exception as e:  # orbax and tensorstore raise bare Exceptions for damaged files
            reason = f" ({e.strerror})" if isinstance(e, OSError) and e.strerror else ""
            problem = f"{' and '.join(items)} cannot be read{reason}"
        if anywhere(problem is not None):
            raise _Damaged(problem or "another host cannot read it")
        return found

    def _put_aside(self) -> None:
        """Rename the folder, so that the run can start over and nothing is lost."""
        aside = self._folder.with_name(self._folder.name + ".damaged")
        _warn(f"{self._folder}: no checkpoint is intact; moved to {aside.name}, the run starts over")
        with self._reported():
            self._manager.close()
            if jax.process_index() == 0:
                shutil.rmtree(aside, ignore_errors=True)
                self._folder.rename(aside)
        anywhere(False)  # the others wait for the rename
        self._open()


def abstract(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of `state`; on a mesh, what is on one device becomes a copy on each."""
    named = (x.sharding for x in jax.tree.leaves(state) if isinstance(x.sharding, NamedSharding))
    mesh = next((s.mesh for s in named), None)

    def of(x: jax.Array) -> jax.ShapeDtypeStruct:
        on_mesh = mesh is None or isinstance(x.sharding, NamedSharding)
        sharding = x.sharding if on_mesh else NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(of, state)


def _shapes(state: TrainState) -> str:
    """Digest of names, shapes and dtypes."""
    leaves = jax.tree.leaves_with_path(state)
    return files.json_sha256(
        [[jax.tree_util.keystr(path), list(x.shape), str(x.dtype)] for path, x in leaves]
    )


def _sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record as JSON gives it back, with its digest."""
    record = json.loads(json.dumps(record))
    return record | {"sha256": files.json_sha256(record)}


def _unsealed(sealed: Any) -> dict[str, Any]:
    """The record that was sealed; _Damaged if it is no longer one."""
    record = {k: v for k, v in sealed.items() if k != "sha256"} if isinstance(sealed, dict) else None
    if record is None or sealed.get("sha256") != files.json_sha256(record):
        raise _Damaged("its record is not what was saved")
    return record


def _warn(message: str) -> None:
    if jax.process_index() == 0:
        print(f"warning: {message}", file=sys.stderr)


@functools.cache
def _quiet_orbax() -> None:
    """Silence the tracebacks of its threads: failures are raised, and reported in one line, in the main thread.

    For good, because a thread whose write failed may live longer than the manager, and tensorstore's longer than that.
    """
    logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    before = sys.unraisablehook

    def hook(unraisable):
        # When one read fails orbax abandons the others: each then says the same again when it is collected.
        frames = traceback.extract_tb(unraisable.exc_traceback)
        abandoned = any("/orbax/" in pathlib.Path(frame.filename).as_posix() for frame in frames)
        if not abandoned and str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
