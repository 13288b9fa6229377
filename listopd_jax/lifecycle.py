"""One job, one workdir: the lock that keeps a second run out, a SIGTERM handled in time, a stdout that is closed.

SIGTERM (pre-emption) ends the job with exit code 0. In training that takes at most one step and one save, plus the rest
of a save that is still being written; elsewhere the job stops at once, since every result is written whole and found
again. A second SIGTERM changes nothing.
"""

import contextlib
import fcntl
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from listopd_jax.errors import Interrupted, UserError, end_now


def end(code: int, others: bool = False) -> NoReturn:
    """End a command with `code` at once; everything that needs closing is closed by then.

    After a failed save, threads of orbax wait ten minutes for a signal that nobody sends any longer. On a full disk a
    thread of TensorBoard's writer survives, and exit handlers would make it print a traceback. One that compiles when
    SIGTERM stops the job would crash in an interpreter that is gone. Only where there are `others`, the processes of
    one job, is there an exit handler to wait for: jax's shutdown.
    """
    if code or not others:
        end_now(code)
    sys.exit(code)


def say(text: str) -> None:
    """Print to stdout at once; a closed pipe (`| head`) is not an error, and gets nothing more."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def quiet_libraries() -> None:
    """Make libraries that are imported later log errors only; what the user has set stays.

    Else transformers reports a missing PyTorch, which nothing here needs, and the hub repeats its warnings.
    """
    for variable in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(variable, "error")


SIGNAL_VARIABLE = "LISTOPD_SIGNAL_AT"


def reached(point: str) -> None:
    """Say where the job is. LISTOPD_SIGNAL_AT="SIGKILL sft_teacher step 2" sends it that signal at that point.

    For rehearsing how a job is stopped: points are "RUN step N" (logged, not saved yet), "RUN saving N" (the save
    runs in the background) and "RUN evaluated N" (batches judged).
    """
    name, _, where = os.environ.get(SIGNAL_VARIABLE, "").partition(" ")
    if where == point:
        os.kill(os.getpid(), signal.Signals[name])


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Hold `workdir` (made if absent); UserError if another live process holds it or it cannot be written.

    The lock is the kernel's: it goes with the process, so a killed run leaves nothing to clean up.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("w")
    except OSError as e:
        raise UserError(
            f"--workdir={workdir}: cannot be written ({e.strerror or e}); choose another folder"
        ) from e
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(
                f"--workdir={workdir}: another run is at work there; wait for it or choose another folder"
            ) from e
        except OSError as e:
            raise UserError(
                f"--workdir={workdir}: cannot be locked ({e.strerror or e}); choose a local folder"
            ) from e
        yield


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """While inside, the first SIGTERM raises Interrupted where the job is; within `sigterm_flag` it only sets the flag.

    For the main thread. Python handles the signal when the current call returns, e.g. one batch of an evaluation.
    """

    def stop(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Interrupted("stopped; the same command resumes from there")

    with _sigterm_handler(stop):
        yield


@contextlib.contextmanager
def sigterm_flag() -> Iterator[threading.Event]:
    """While inside, SIGTERM only sets the flag, to be looked at between steps; never set outside the main thread.

    A SIGTERM that was not acted on, though nothing failed, is passed to the previous handler at the end.
    """
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    with _sigterm_handler(lambda *_: flag.set()) as before:
        yield flag
    if flag.is_set() and callable(before):
        before(signal.SIGTERM, None)


@contextlib.contextmanager
def _sigterm_handler(handler: Callable) -> Iterator[Any]:
    """While inside, `handler` handles SIGTERM. Yields the previous one, which is restored at the end.

    After Interrupted, SIGTERM is ignored for good: another must not interrupt the shutdown.
    """
    before = after = signal.signal(signal.SIGTERM, handler)
    try:
        yield before
    except Interrupted:
        after = signal.SIG_IGN
        raise
    finally:
        signal.signal(signal.SIGTERM, after)
