"""The log of a run: strict JSON rows, resume, broken lines, TensorBoard events, progress in a log file."""

import errno
import io
import json
import math
import pathlib
import struct
import subprocess
import sys

import numpy as np
import pytest
import tensorboardX
from tensorboardX.proto.event_pb2 import Event

from listopd_jax import metrics_log
from listopd_jax.errors import UserError
from listopd_jax.metrics_log import MetricsLog, progress, read_metrics


def write(workdir, run, steps, **kwargs):
    with MetricsLog(workdir, run, "opd", {"lambda": 1.2, "seed": 0}, **kwargs) as log:
        for step in steps:
            log.log(step, {"loss": step / 4})


def steps_of(workdir, run):
    return [row["step"] for row in read_metrics(workdir) if row["run"] == run]


def events(folder):
    """The events of a folder's TensorBoard files, decoded from the TFRecord framing."""
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_a_row_holds_identity_step_and_floats(tmp_path):
    with MetricsLog(tmp_path, "a", "opd", {"lambda": 1.2, "seed": 3}) as log:
        log.log(np.int64(1), {"loss": np.float32(0.5), "parse": 1})
        during = read_metrics(tmp_path)
    assert during == [
        {"run": "a", "stage": "opd", "lambda": 1.2, "seed": 3, "step": 1, "loss": 0.5, "parse": 1.0}
    ]


def test_no_log_yet_reads_as_no_rows(tmp_path):
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_become_null(tmp_path, value):
    with MetricsLog(tmp_path, "a", "opd") as log:
        log.log(1, {"loss": value, "parse": 0.5})
    row = json.loads((tmp_path / metrics_log.FILE).read_text(), parse_constant=pytest.fail)
    assert row["loss"] is None and row["parse"] == 0.5


def test_resume_forgets_the_steps_after_the_checkpoint_and_keeps_other_runs(tmp_path):
    write(tmp_path, "a", range(1, 6))
    write(tmp_path, "b", range(1, 4))
    write(tmp_path, "a", range(4, 8), resume_step=3)
    assert steps_of(tmp_path, "a") == [1, 2, 3, 4, 5, 6, 7]
    assert steps_of(tmp_path, "b") == [1, 2, 3]


def test_an_interrupted_run_leaves_the_bytes_of_an_uninterrupted_one(tmp_path):
    write(tmp_path / "whole", "a", range(1, 8))
    write(tmp_path / "killed", "a", range(1, 6))
    with (tmp_path / "killed" / metrics_log.FILE).open("a") as file:
        file.write('{"run": "a", "step": 6, "lo')
    write(tmp_path / "killed", "a", range(4, 8), resume_step=3)
    whole, killed = ((tmp_path / name / metrics_log.FILE).read_bytes() for name in ("whole", "killed"))
    assert whole == killed


def test_a_fresh_start_forgets_the_whole_run(tmp_path):
    write(tmp_path, "a", [0, 1, 2])
    write(tmp_path, "a", [0, 1])
    assert steps_of(tmp_path, "a") == [0, 1]


@pytest.mark.parametrize("tail", ['{"run": "a", "st', "\x00\x00\x00", '{"run": "b"}', "[1]\n", '"\\ud8'])
def test_a_broken_last_line_is_passed_over_and_then_dropped(tmp_path, tail):
    write(tmp_path, "a", [1, 2])
    with (tmp_path / metrics_log.FILE).open("a") as file:
        file.write(tail)
    assert steps_of(tmp_path, "a") == [1, 2]
    write(tmp_path, "a", [3], resume_step=2)
    assert steps_of(tmp_path, "a") == [1, 2, 3]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    write(tmp_path, "a", [1, 2])
    path = tmp_path / metrics_log.FILE
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    write(tmp_path, "b", [1])
    assert steps_of(tmp_path, "a") == [1, 2] and steps_of(tmp_path, "b") == [1]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    write(tmp_path, "a", [1, 2, 3])
    path = tmp_path / metrics_log.FILE
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:9], lines[2]]) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: "):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: "):
        write(tmp_path, "a", [4], resume_step=3)


@pytest.mark.parametrize("loss", ["NaN", "1e999"])
def test_a_row_that_could_not_be_written_again_is_broken(tmp_path, loss):
    row = f'{{"run": "a", "step": 3, "loss": {loss}}}\n'
    write(tmp_path, "a", [1, 2])
    with (tmp_path / metrics_log.FILE).open("a") as file:
        file.write(row)
    write(tmp_path, "a", [3], resume_step=2)
    assert steps_of(tmp_path, "a") == [1, 2, 3]
    path = tmp_path / metrics_log.FILE
    path.write_text(row + path.read_text())
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: "):
        write(tmp_path, "a", [4], resume_step=3)


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be"):
        write(tmp_path / "file", "a", [1])


@pytest.mark.parametrize("first", [None, "the save failed"])
def test_a_log_that_cannot_be_closed_is_a_user_error_but_hides_none_before_it(tmp_path, monkeypatch, first):
    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensorboardX.SummaryWriter, "close", full)
    with pytest.raises(UserError, match=first or "cannot be written"), MetricsLog(tmp_path, "run", "opd"):
        if first:
            raise UserError(first)


def test_tensorboard_gets_every_scalar_and_the_step_to_purge_from(tmp_path):
    write(tmp_path, "a", [1, 2, 3, 4])
    write(tmp_path, "a", [3, 4], resume_step=2)
    found = events(tmp_path / "tensorboard" / "a")
    scalars = [(e.step, v.tag, v.simple_value) for e in found for v in e.summary.value]
    assert scalars == [(s, "loss", s / 4) for s in (1, 2, 3, 4, 3, 4)]
    starts = [e.step for e in found if e.HasField("session_log")]
    assert starts == [0, 3]


def test_progress_in_a_log_file_is_few_whole_lines(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in (bar := progress(range(2000), "SFT teacher")):
        bar.set_postfix(loss=0.25)
    text = stream.getvalue()
    assert "\r" not in text and text.endswith("\n")
    lines = text.splitlines()
    assert 1 <= len(lines) <= 3
    assert "SFT teacher" in lines[-1] and "2000/2000" in lines[-1] and "loss=0.25" in lines[-1]


def test_progress_takes_a_total_and_what_was_done_before(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress(10, "OPD", initial=7) as bar:
        for _ in range(3):
            bar.update()
    assert "10/10" in stream.getvalue().splitlines()[-1]


def test_progress_on_a_terminal_redraws_one_line(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in progress(range(3), "eval"):
        pass
    assert "\r" in stream.getvalue() and "3/3" in stream.getvalue()


@pytest.mark.slow
def test_our_modules_do_not_import_torch():
    """TensorBoard's writer and transformers do so where it is installed, 190 MB: not before they are used."""
    root = pathlib.Path(__file__).parents[1]
    code = "import sys, listopd_jax.stages.pipeline; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
