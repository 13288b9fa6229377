"""Metrics of a run as it goes: rows in metrics.jsonl, TensorBoard events, and a progress bar with ETA.

A run that was killed and resumes from step s first loses its rows after s, so that the log of an interrupted
run reads like that of an uninterrupted one. Sampled completions are logged the same way, in completions.jsonl.
"""

import contextlib
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from listopd_jax import files
from listopd_jax.errors import UserError
from listopd_jax.trackers import UNTRACKED, Trackers, Tracking

FILE, COMPLETIONS = "metrics.jsonl", "completions.jsonl"


class MetricsLog:
    """Context manager that appends the metrics of one run to metrics.jsonl, its TensorBoard events and its trackers.

    Only process 0 writes.

    Args:
      workdir: has metrics.jsonl, shared by all runs; rows of other runs are kept.
      run: unique name of the run, e.g. "opd_lambda1.2_seed0"; also its folder under `workdir`/tensorboard.
      stage: e.g. "opd".
      fixed: what identifies the run in every row, e.g. {"lambda": 1.2, "seed": 0}.
      resume_step: updates completed before this start; 0 starts the run over. Rows count steps from 1.
      tracking: trackers that get the rows too.

    Raises UserError if the log is broken before its last line, or cannot be written.
    """

    def __init__(
        self,
        workdir: str | pathlib.Path,
        run: str,
        stage: str,
        fixed: Mapping[str, Any] = {},
        resume_step: int = 0,
        tracking: Tracking = UNTRACKED,
    ):
        self._workdir = pathlib.Path(workdir)
        self._head = {"run": run, "stage": stage, **fixed}
        self._resume_step = resume_step
        self._trackers = Trackers(tracking, self._workdir, run, resumed=resume_step > 0)

    def __enter__(self) -> "MetricsLog":
        if not files.on_process_0():
            return self
        import tensorboardX  # here, because it imports torch where that is installed

        path = self._workdir / FILE
        for name in (FILE, COMPLETIONS):
            forget_after(self._workdir, self._head["run"], self._resume_step, name)
        try:
            self._file = path.open("a", encoding="utf-8")
            self._events = tensorboardX.SummaryWriter(
                str(self._workdir / "tensorboard" / self._head["run"]),
                purge_step=self._resume_step + 1 if self._resume_step else 0,
                filename_suffix=f".from{self._resume_step}",  # else starts within a second share a name
            )
        except OSError as e:
            raise files.not_written(path, e) from e
        self._trackers.__enter__()
        return self

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one row: names and scalars (Python, NumPy or JAX). NaN and infinities become null."""
        if not files.on_process_0():
            return
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        row = {**self._head, "step": int(step), **finite}
        try:
            self._file.write(_line(row))
            self._file.flush()
            for name, value in values.items():
                self._events.add_scalar(name, value, int(step))
        except OSError as e:
            raise files.not_written(self._workdir / FILE, e) from e
        self._trackers.log(int(step), values)

    def completions(self, step: int, completions: Sequence[Mapping[str, Any]]) -> None:
        """Append completions that were sampled at `step`, JSON objects of equal fields, to completions.jsonl."""
        if not (completions and files.on_process_0()):
            return
        path, head = self._workdir / COMPLETIONS, {**self._head, "step": int(step)}
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(_line({**head, **completion}) for completion in completions)
        except OSError as e:
            raise files.not_written(path, e) from e
        self._trackers.table(int(step), "completions", [{"step": int(step), **c} for c in completions])

    def __exit__(self, failed: object, *_: object) -> None:
        if not files.on_process_0():
            return
        try:
            with contextlib.ExitStack() as closing:  # all of them, whichever fails
                closing.callback(self._trackers.__exit__)
                closing.callback(self._events.close)
                closing.callback(self._file.close)
        except OSError as e:
            # Both flush: on a full disk they fail once more, which must not hide what failed first.
            if failed is None:
                raise files.not_written(self._workdir / FILE, e) from e


def forget_after(workdir: str | pathlib.Path, run: str, step: int, name: str = FILE) -> None:
    """Drop the rows of `run` after `step` (all of them if 0) and a half-written last line of a log, atomically."""
    path = pathlib.Path(workdir) / name
    kept = [row for row in read_metrics(workdir, name) if row["run"] != run or 0 < step >= row["step"]]
    text = "".join(map(_line, kept))
    if not path.exists() or path.read_bytes() != text.encode():
        files.write_text(path, text)


def read_metrics(workdir: str | pathlib.Path, name: str = FILE) -> list[dict[str, Any]]:
    """The rows of `workdir`/metrics.jsonl, or of the log `name`, in order; [] if there is none.

    A broken last line, left by a run killed while it wrote, is passed over; one before it is a UserError.
    """
    path = pathlib.Path(workdir) / name
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().rstrip(b"\n").split(b"\n")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from e
    rows = [_row(line) for line in lines]
    if None in rows[:-1]:
        raise UserError(f"{path}:{rows.index(None) + 1}: not a row of {name}; delete that line")
    return [row for row in rows if row is not None]


def binned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """(step, value) pairs as at most `most`: means of as many neighbours as that takes."""
    width = math.ceil(len(points) / most) or 1
    bins = [points[i : i + width] for i in range(0, len(points), width)]
    return [tuple(map(statistics.fmean, zip(*one, strict=True))) for one in bins]


def _row(line: bytes) -> dict[str, Any] | None:
    """The row that `line` spells, None if it spells none that can be written again (NaN)."""
    try:
        row = json.loads(line)
        _line(row)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and isinstance(row.get("run"), str) and isinstance(row.get("step"), int)
    return row if is_row else None


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def progress(
    iterable_or_total: Iterable | int, description: str, initial: int = 0, total: int | None = None
) -> tqdm:
    """A progress bar with ETA on stderr: iterate over it, or give a total and call `update()`.

    `initial` is how many of the total were done before this start; `total` is for iterables that do not know their
    length. Show key metrics with `bar.set_postfix(loss=…, refresh=False)`. Where stderr is not a terminal, a line is
    printed at most every 10 s; only process 0 prints.
    """
    bar = tqdm if sys.stderr.isatty() else _Lines
    given = isinstance(iterable_or_total, int)
    source = {"total": iterable_or_total} if given else {"iterable": iterable_or_total, "total": total}
    return bar(
        **source, desc=description, initial=initial, dynamic_ncols=True, disable=not files.on_process_0()
    )


class _Lines(tqdm):
    """A progress bar for log files: whole lines, one at the start, one at the end, few between."""

    SECONDS_BETWEEN_LINES = 10.0
    _printed = -math.inf  # monotonic time of the last line

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        now = time.monotonic()
        if msg is None and now - self._printed >= self.SECONDS_BETWEEN_LINES:
            self._printed = now
            print(self, file=self.fp, flush=True)

    def close(self) -> None:
        if not self.disable:
            print(self, file=self.fp, flush=True)
            self.leave = False  # tqdm would print the last state once more
        super().close()
