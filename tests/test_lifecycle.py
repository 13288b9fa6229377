"""The workdir's lock and the SIGTERM flag, with real processes and real signals."""

import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest

from listopd_jax import files
from listopd_jax.errors import Interrupted, UserError
from listopd_jax.lifecycle import interruptible, locked, sigterm_flag

HOLD = """
import pathlib, subprocess, sys
from listopd_jax.lifecycle import locked
with locked(pathlib.Path(sys.argv[1])):
    child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(child.pid, flush=True)
    sys.stdin.read()
"""
"""A process that holds a lock and has a child of its own, until its input is closed."""


END = """
import sys, threading, time
from listopd_jax.lifecycle import end
threading.Thread(target=time.sleep, args=(float(sys.argv[2]),)).start()
print("result")
print("said", file=sys.stderr)
end(int(sys.argv[1]), others=sys.argv[3] == "others")
"""
"""A process that ends with an exit code while a thread sleeps for some seconds."""


@pytest.mark.parametrize(
    ("code", "seconds", "others"), [(2, 600, "others"), (0, 600, ""), (0, 0.1, "others")]
)
def test_the_end_waits_for_no_thread_and_loses_no_word(code, seconds, others):
    """A failed save leaves threads of orbax that wait for ten minutes."""
    command = [sys.executable, "-c", END, str(code), str(seconds), others]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "result\n", "said\n")


@pytest.fixture
def holder(tmp_path):
    """(process that holds tmp_path/'run', pid of its child)."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()
    os.kill(child, signal.SIGKILL)


def refused(workdir) -> str:
    """The one line with which `workdir` is refused."""
    with pytest.raises(UserError) as error, locked(workdir):
        pass
    message = str(error.value)
    assert str(workdir) in message and "\n" not in message
    return message


def test_a_second_process_is_kept_out_and_says_why(tmp_path, holder):
    assert "another run" in refused(tmp_path / "run")
    with locked(tmp_path / "other"):
        pass


def test_a_killed_process_leaves_nothing_to_clean_up(tmp_path, holder):
    """Its own children, which live on, do not hold the lock either."""
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "run"):
        pass


def test_a_finished_process_frees_the_workdir(tmp_path, holder):
    holder.stdin.close()
    assert holder.wait(timeout=30) == 0
    with locked(tmp_path / "run"):
        pass


def test_within_one_process_the_lock_holds_too(tmp_path):
    with locked(tmp_path):
        assert "another run" in refused(tmp_path)
    with locked(tmp_path):
        pass


def test_a_failure_inside_frees_the_workdir(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass


def test_the_workdir_is_made_and_its_files_are_left_alone(tmp_path):
    workdir = tmp_path / "a" / "b"
    with locked(workdir):
        (workdir / "results.json").write_text("[]")
    with locked(workdir):
        assert (workdir / "results.json").read_text() == "[]"


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for workdir in (file, file / "below", pathlib.Path("/proc/listopd"), tmp_path / ("x" * 300)):
        refused(workdir)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_workdir_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    refused(tmp_path)
    refused(tmp_path / "below")


# ---- SIGTERM


def test_sigterm_sets_the_flag_and_nothing_else():
    before = signal.getsignal(signal.SIGTERM)
    with sigterm_flag() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(10)
        os.kill(os.getpid(), signal.SIGTERM)  # an impatient second one does not kill either
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("out", "code"), [(">/dev/full", 1), ("| true", 0)])
def test_output_that_is_lost_is_no_traceback_but_a_failure(out, code):
    program = "from listopd_jax.lifecycle import end; print(1); end(0)"
    # Not unbuffered, whatever the environment says: the line is to be lost at the end.
    command = f"set -o pipefail; unset PYTHONUNBUFFERED; {sys.executable} -c '{program}' {out}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (code, "")


def test_the_handler_is_put_back_after_a_failure():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), sigterm_flag():
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_the_flag_stays_down():
    seen = []

    def work():
        with sigterm_flag() as stop:
            seen.append(stop.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def handler():
    """The handler of SIGTERM, put back after the test."""
    handler = signal.getsignal(signal.SIGTERM)
    yield handler
    signal.signal(signal.SIGTERM, handler)


def test_elsewhere_sigterm_stops_the_job_at_once():
    reached = False
    with pytest.raises(Interrupted), interruptible():
        terminate()
        reached = True
    assert not reached


def test_a_second_sigterm_does_not_cut_the_way_out_short():
    """Neither while the stack is unwound nor after."""
    cleaned = False
    with pytest.raises(Interrupted), interruptible():
        try:
            terminate()
        finally:
            terminate()
            cleaned = True
    terminate()
    assert cleaned


def test_a_job_that_ends_by_itself_leaves_the_handler_as_it_was(handler):
    with interruptible(), sigterm_flag():
        assert signal.getsignal(signal.SIGTERM) is not handler
    assert signal.getsignal(signal.SIGTERM) is handler


def test_no_handler_of_errors_takes_it_for_one():
    with pytest.raises(Interrupted), interruptible():
        try:
            terminate()
        except Exception as e:
            raise AssertionError from e


def test_between_steps_it_is_a_flag_and_not_lost():
    """A SIGTERM that nobody looked at any more stops the job where the steps end."""
    done = []
    with pytest.raises(Interrupted), interruptible():
        with sigterm_flag():
            terminate()
            done.append("steps")
        done.append("evaluation")
    assert done == ["steps"]


def test_a_failure_is_not_hidden_by_a_sigterm():
    with pytest.raises(KeyError), interruptible(), sigterm_flag():
        terminate()
        raise KeyError


def test_a_result_that_is_cut_short_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.write_text(path, "old")
    monkeypatch.setattr(files.os, "fsync", lambda _: terminate())
    with pytest.raises(Interrupted), interruptible():
        files.write_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"] and path.read_text() == "old"
