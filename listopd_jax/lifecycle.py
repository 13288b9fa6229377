"""One job, one workdir: the lock that keeps a second run out, and a SIGTERM that is heard between steps."""

import contextlib
import fcntl
import pathlib
import signal
import threading
from collections.abc import Iterator

from listopd_jax.errors import UserError


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
def sigterm_flag() -> Iterator[threading.Event]:
    """While inside, SIGTERM only sets the flag, to be looked at between steps; never set outside the main thread."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = signal.signal(signal.SIGTERM, lambda *_: flag.set())
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, before)
