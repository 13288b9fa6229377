"""The task that submitit runs on a node: one command, asked to save before its job is requeued."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence


class Task:
    """A callable for submitit, which calls `checkpoint` when SLURM announces the end (SIGUSR2) and then requeues."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] = {}):
        self.command, self.environment = list(command), dict(environment)
        self._process: subprocess.Popen | None = None

    def __call__(self) -> None:
        """Run the command; RuntimeError, which fails the job, if its exit code is not 0."""
        # SLURM signals every process of a job; at SIGUSR2 the run would die before it has saved
        self._process = subprocess.Popen(
            self.command, env=os.environ | self.environment, preexec_fn=_ignore_usr2
        )
        while self._process.poll() is None:
            time.sleep(0.2)
        if self._process.returncode != 0:
            raise RuntimeError(f"exit code {self._process.returncode}")

    def checkpoint(self):
        """Let the command save and stop; returns the same task, to be run again."""
        import submitit

        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has ended
                os.kill(self._process.pid, signal.SIGTERM)
                # not wait(): this is a signal handler, maybe inside poll(), which holds the lock that wait() takes
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Task(self.command, self.environment))


def _ignore_usr2() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
