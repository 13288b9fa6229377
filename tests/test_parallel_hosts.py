"""Two real processes on one machine, with gloo between them: what they agree on, and how both end."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import pytest

from listopd_jax.config import defaults
from listopd_jax.errors import UserError
from listopd_jax.parallel import hosts

REPO = pathlib.Path(__file__).resolve().parents[1]


def start_two(command, devices=1, ids=(0, 1)):
    """The command as processes `ids` of a job of two, each with `devices` CPU devices."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": flags}
    return [
        subprocess.Popen(
            [sys.executable, *command], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | shared | {"JAX_PROCESS_ID": str(i), "PYTHONPATH": str(REPO)},
        )
        for i in ids
    ]  # fmt: skip


def finish(processes, limit=300):
    """(exit code, lines of stdout, lines of stderr) of each, without gloo's greetings, which may break into lines."""
    ends = [p.communicate(timeout=limit) for p in processes]
    said = [
        [[x for x in text.splitlines() if x and "[Gloo]" not in x and "peer ranks" not in x] for text in end]
        for end in ends
    ]
    return [(p.returncode, *lines) for p, lines in zip(processes, said, strict=True)]


def test_rows_values_and_writing_are_shared_out():
    for i, (code, out, errors) in enumerate(finish(start_two(["tests/host_worker.py", "agree"], devices=2))):
        assert code == 0, errors
        assert out == [f"process {i} read {[[0, 1, 2, 3], [4, 5, 6, 7]][i]}"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_with_one_line(victim):
    processes = start_two(["tests/host_worker.py", "wait", str(victim), "kill"])
    while processes[victim].stdout.readline() != "going\n":
        assert processes[victim].poll() is None
    began = time.monotonic()
    ends = finish(processes)
    assert time.monotonic() - began < 60
    assert ends[victim][0] == -9
    code, _, errors = ends[1 - victim]
    assert code == 1
    # Where the coordinator is gone, jax may get to say so too.
    assert f"error: process {victim} of 2 is gone; the same command goes on from what is saved" in errors
    assert len(errors) == 1 or victim == 0


def test_a_mistake_on_one_ends_the_other():
    first, second = finish(start_two(["tests/host_worker.py", "wait", "1", "mistake"]))
    assert (first[0], second[0]) == (2, 2)
    assert second[2] == ["error: field=3: is wrong"]
    assert first[2] == [
        "error: process 1 of 2 stopped: field=3: is wrong; the same command goes on from what is saved"
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_who_waits_in_vain_is_told(number):
    ((code, _, errors),) = finish(start_two(["tests/host_worker.py", "agree", "2"], ids=[number]))
    assert code == 2 and len(errors) == 1
    assert re.fullmatch(
        r"error: parallel: not all processes met at the coordinator \S+ \(waited 2 s\).*", errors[0]
    )


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "4"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, {"coordinator_address": "h:1"}),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            {"coordinator_address": "h:1", "num_processes": 2, "process_id": 1},
        ),
    ],
)
def test_the_environment_says_whether_there_are_others(monkeypatch, environment, expected):
    for name in (*hosts.CLUSTERS, "TPU_WORKER_HOSTNAMES", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts._setting(defaults().parallel) == expected


def test_a_process_without_its_number_is_told(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "many")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "h:1")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES=many: must be a whole number"):
        hosts._setting(defaults().parallel)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(UserError, match="parallel.process_id=-1"):
        hosts._setting(defaults().parallel)


SMALL = (
    "--config.data.synthetic.products=12 --config.data.validation_share=0.25 "
    "--config.evaluation.max_lists=6 --config.evaluation.batch_size=6 --config.evaluation.bootstrap=50 "
    "--config.sft.teacher.steps=3 --config.sft.student.steps=2 --config.sft.teacher.batch_size=4 "
    "--config.sft.student.batch_size=4 --config.opd.batch_size=4 --config.opd.steps=2 --config.opd.lambdas=1.5, "
    "--config.task.max_response=64"
).split()


def job(workdir, *more):
    return [
        "-m",
        "listopd_jax.main",
        "--config=configs/fashion.py:tiny",
        f"--workdir={workdir}",
        *SMALL,
        *more,
    ]


@pytest.mark.slow
def test_two_processes_reproduce_the_job_of_one(tmp_path):
    subprocess.run([sys.executable, *job(tmp_path / "one")], cwd=REPO, check=True, capture_output=True)
    first, second = finish(start_two(job(tmp_path / "two", "--config.parallel.fsdp=2")), limit=1200)
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert first[1] == [f"report: {tmp_path}/two/report.html"] and second[1] == []
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [list(row) for row in one] == [list(row) for row in two] and len(one) == 7
    for a, b in zip(one, two, strict=True):
        del a["tokens_per_second"]
        for name, value in a.items():
            near = pytest.approx(value, rel=2e-5, abs=2e-6) if isinstance(value, float) else value
            assert b[name] == near, name
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one == two


@pytest.mark.slow
def test_a_job_goes_on_where_a_host_was_lost(tmp_path):
    """Process 1 is killed in OPD; the other ends by itself, and the same command finishes on another mesh."""
    workdir = tmp_path / "job"
    processes = start_two(job(workdir, "--config.train.checkpoint_every=1"))
    while not list(workdir.glob("checkpoints/sft_teacher/[0-9]*")):
        assert processes[0].poll() is None, finish(processes)
        time.sleep(0.5)
    processes[1].kill()
    code, _, errors = finish(processes)[0]
    assert code == 1 and errors[-1].startswith("error: process 1 of 2 is gone")
    alone = [sys.executable, *job(workdir, "--config.train.checkpoint_every=1")]
    assert subprocess.run(alone, cwd=REPO, check=False, capture_output=True).returncode == 0
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 7
