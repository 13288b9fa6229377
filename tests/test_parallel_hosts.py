"""Two real processes on one machine, with gloo between them: what they agree on, and how both end."""

import json
import os
import re
import socket
import sys

import pytest
from processes import NO_LAMBDA, command, start_main

from listopd_jax.config import defaults
from listopd_jax.errors import UserError
from listopd_jax.lifecycle import SIGNAL_VARIABLE
from listopd_jax.parallel import hosts


def addresses():
    """What each of two processes is told of the other, and where they meet."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [shared | {"JAX_PROCESS_ID": str(i)} for i in (0, 1)]


def start_two(folder, *arguments, devices=1, ids=(0, 1)):
    """host_worker.py as processes `ids` of a job of two, each with `devices` CPU devices; what they say is in files."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    told, command = addresses(), [sys.executable, "-m", "host_worker", *arguments]
    folders = [folder / str(i) for i in ids]
    for one in folders:
        one.mkdir()
    return [start_main(one, command, XLA_FLAGS=flags, **told[i]) for one, i in zip(folders, ids, strict=True)]


def finish(processes, limit=300):
    """How each ended, see `without_greetings`."""
    return [without_greetings(*process.end(limit)) for process in processes]


def without_greetings(code, *texts):
    """(exit code, lines of stdout, lines of stderr) without gloo's greetings, which may break into lines."""
    lines = (text.splitlines() for text in texts)
    return code, *([x for x in said if x and "[Gloo]" not in x and "peer ranks" not in x] for said in lines)


def run_two_mains(arguments, folder, of_second):
    """How a job of two processes ended; the second has more in its environment."""
    forks = []
    for i, (told, more) in enumerate(zip(addresses(), ({}, of_second), strict=True)):
        said = folder / str(i)
        said.mkdir(parents=True)
        forks.append(start_main(said, arguments, **told, **more))
    return [without_greetings(*fork.end(1200)) for fork in forks]


def test_rows_values_and_writing_are_shared_out(tmp_path):
    for i, (code, out, errors) in enumerate(finish(start_two(tmp_path, "agree", devices=2))):
        assert code == 0, errors
        assert out == [f"process {i} read {[[0, 1, 2, 3], [4, 5, 6, 7]][i]}"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_with_one_line(victim, tmp_path):
    processes = start_two(tmp_path, "wait", str(victim), "kill")
    processes[victim].end(300)
    ends = finish(processes, limit=60)  # the other hears of it at once, long before jax would
    assert ends[victim][1] == ["going"]
    assert ends[victim][0] == -9
    code, _, errors = ends[1 - victim]
    assert code == 1
    # Where the coordinator is gone, jax may get to say so too, before our line or after it.
    assert f"error: process {victim} of 2 is gone; the same command resumes from what is saved" in errors
    assert len(errors) == 1 or victim == 0


def test_a_mistake_on_one_ends_the_other(tmp_path):
    first, second = finish(start_two(tmp_path, "wait", "1", "mistake"))
    assert (first[0], second[0]) == (2, 2)
    assert second[2] == ["error: field=3: is wrong"]
    assert first[2] == [
        "error: process 1 of 2 stopped: field=3: is wrong; the same command resumes from what is saved"
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_who_waits_in_vain_is_told(number, tmp_path):
    ((code, _, errors),) = finish(start_two(tmp_path, "agree", "2", ids=[number]))
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


@pytest.mark.slow
def test_two_processes_resume_and_reproduce_the_job_of_one(finished_job, tmp_path):
    """Process 1 is killed; the other ends by itself. The same command then finds what one process finds."""
    arguments = command(tmp_path, *NO_LAMBDA, "--config.opd.lambdas=2.0,", "--config.parallel.fsdp=2")
    where = {SIGNAL_VARIABLE: "SIGKILL sft_teacher step 3"}
    (code, _, errors), second = run_two_mains(arguments, tmp_path / "killed", where)
    assert second[0] == -9
    assert code == 1 and errors[-1].startswith("error: process 1 of 2 is gone")

    first, second = run_two_mains(arguments, tmp_path / "resumed", {})
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert first[1] == [f"report: {tmp_path}/report.html"] and second[1] == []
    one, two = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (finished_job, tmp_path)
    )
    one = [row for row in one if row["lambda"] in (None, 2.0)]
    assert [list(row) for row in one] == [list(row) for row in two] and len(one) == 10
    for a, b in zip(one, two, strict=True):
        del a["tokens_per_second"]
        for name, value in a.items():
            near = pytest.approx(value, rel=2e-5, abs=2e-6) if isinstance(value, float) else value
            assert b[name] == near, name
    one, two = (json.loads((folder / "results.json").read_text()) for folder in (finished_job, tmp_path))
    assert [r for r in one if r["lambda"] != 1.0] == [r for r in two if r["lambda"] != 1.0] and len(two) == 6
