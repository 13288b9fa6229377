"""launch.slurm: what it asks submitit for, and a real array on a one-node cluster with tasks killed and requeued."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from configs import fashion
from launch import slurm, slurm_task
from launch.grid import open_grid
from listopd_jax import config as config_module
from listopd_jax.errors import UserError

REPO = pathlib.Path(__file__).resolve().parents[1]
TINY = (
    "--config=configs/fashion.py:tiny --config.data.synthetic.products=12 --config.data.validation_share=0.25 "
    "--config.evaluation.max_lists=6 --config.evaluation.batch_size=6 --config.evaluation.bootstrap=50 "
    "--config.sft.teacher.steps=4 --config.sft.student.steps=3 --config.sft.teacher.batch_size=4 "
    "--config.sft.student.batch_size=4 --config.opd.batch_size=4 --config.opd.steps=6 --config.opd.lambdas=1.0,2.0 "
    "--config.opd.seeds=0,1 --config.train.checkpoint_every=2 --config.train.export=False "
    "--config.task.max_response=48 --config.forecast.lambdas=() --config.opd.rollouts=2 "
    "--config.teacher.num_layers=1 --config.student.num_layers=1"
).split()


def parameters(*options):
    parser = slurm._parser()
    return slurm._parameters(parser.parse_args(["--config=x", "--root=y", "--minutes=30", *options]))


def test_options_reach_sbatch(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", lambda _: 2)
    executor = submitit.SlurmExecutor(tmp_path)
    executor.update_parameters(
        **parameters(
            "--partition=gpu", "--gpus-per-node=8", "--nodes=2", "--mem=200GB", "--sbatch=reservation=r1"
        )
    )
    text = executor._make_submission_file_text("true", "0")
    for option in (
        "partition=gpu", "gpus-per-node=8", "nodes=2", "ntasks-per-node=1", "mem=200GB", "time=30", "reservation=r1",
        "kill-on-invalid-dep=yes", "requeue", "signal=USR2@90",
    ):  # fmt: skip
        assert re.search(rf"^#SBATCH --{option}$", text, re.M), option


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--minutes=0"], "argument --minutes: '0' is not a whole number of at least 1"),
        (
            ["--gpus-per-node=0"],
            "argument --gpus-per-node: '0' is neither a number nor TYPE:NUMBER, e.g. 4 or a100:4",
        ),
        (["--gpus-per-node=a100:"], "'a100:' is neither a number nor TYPE:NUMBER"),
        (["--gpus=8"], "unrecognized arguments: --gpus=8"),
        (["--sbatch=--exclusive"], "write OPTION=VALUE without dashes"),
        (["--sbatch=exclusive"], "write OPTION=VALUE without dashes"),
    ],
)
def test_a_wrong_option_is_one_line(options, says):
    with pytest.raises(UserError, match=re.escape(says)):
        parameters(*options)


def test_without_slurm_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="SLURM is not available"):
        slurm.queued_jobs()


def test_a_task_lets_its_command_save_before_it_is_requeued(tmp_path):
    """SIGUSR2, which SLURM sends to every process, must not end the command; SIGTERM must, and be waited for."""
    submitit = pytest.importorskip("submitit")
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    code = (
        "import pathlib, signal, sys, time\n"
        f"save = lambda *_: (time.sleep(0.3), pathlib.Path({str(saved)!r}).touch(), sys.exit(0))\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "while True: time.sleep(0.05)\n"
    )
    task = slurm_task.Task([sys.executable, "-c", code])
    again = []

    def announced(*_):
        again.append(task.checkpoint())

    before = signal.signal(signal.SIGUSR2, announced)
    try:
        driver = subprocess.Popen(
            [sys.executable, "-c", f"import os, time, pathlib\nwhile not pathlib.Path({str(ready)!r}).exists(): "
             f"time.sleep(0.05)\nos.kill({os.getpid()}, {signal.SIGUSR2.value})"]
        )  # fmt: skip
        task()
        driver.wait()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert saved.exists()
    assert (
        isinstance(again[0], submitit.helpers.DelayedSubmission) and again[0].function.command == task.command
    )


def test_a_command_sees_every_gpu_of_its_node(tmp_path, monkeypatch):
    """jax.distributed gives a process of a SLURM job one GPU unless it is told which."""
    submitit = pytest.importorskip("submitit")
    submitted = []

    class Job:
        job_id = "5"

    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", lambda _: 2)
    monkeypatch.setattr(submitit.SlurmExecutor, "submit", lambda _, task: submitted.append(task) or Job())
    config = config_module.validate(fashion.get_config("tiny"))
    grid = open_grid(tmp_path, ["--config=configs/fashion.py:tiny"], config)
    assert slurm._submit(grid, ["common"], parameters("--gpus-per-node=8"), 1) == {"common": "5"}
    seen = tmp_path / "seen"
    code = f"import os, pathlib; pathlib.Path({str(seen)!r}).write_text(os.environ['JAX_LOCAL_DEVICE_IDS'])"
    slurm_task.Task([sys.executable, "-c", code], submitted[0].environment)()
    assert seen.read_text() == "0,1,2,3,4,5,6,7"
    assert "--name=common" in submitted[0].command


@pytest.mark.parametrize(
    ("options", "gpus"),
    [
        (["--gpus-per-node=4"], 4),
        (["--gpus-per-node=a100:4"], 4),
        (["--sbatch=gres=gpu:4"], 4),
        (["--sbatch=gres=gpu:a100:4"], 4),
        (["--sbatch=gres=gpu:a100:4(S:0-1),nvme:1"], 4),
        (["--sbatch=gres=gpu:a100:2,gpu:h100:1"], 3),
        (["--sbatch=gres=gpu:a100"], 1),
        (["--sbatch=gres=gpu"], 1),
        (["--sbatch=gpus-per-node=h100:8"], 8),
        (["--sbatch=gpus-per-task=2"], 2),
        (["--sbatch=gpus=h100:8", "--nodes=2"], 4),
        (["--sbatch=tres-per-node=gres/gpu:a100:4"], 4),
        (["--sbatch=gres=nvme:1"], 0),
        ([], 0),
    ],
)
def test_gpus_are_counted_in_whichever_form_a_cluster_wants(options, gpus):
    """Uncounted, jax takes one of them."""
    assert slurm.gpus_of_node(parameters(*options)) == gpus


def test_a_submission_from_inside_a_job_does_not_inherit_it(monkeypatch):
    """sbatch reads the shell's binding and memory per CPU as options of the new job; what a site sets stays."""
    pytest.importorskip("submitit")
    inherited = (
        "SLURM_JOB_ID",
        "SLURM_CPU_BIND",
        "SLURM_MEM_PER_CPU",
        "SLURM_CPUS_PER_TASK",
        "SRUN_CPUS_PER_TASK",
    )
    kept = ("SLURM_CONF", "SBATCH_ACCOUNT", "HOME")
    for name in (*inherited, *kept):
        monkeypatch.setenv(name, "5")
    with slurm.outside_any_job():
        assert not [name for name in inherited if name in os.environ]
        assert all(os.environ[name] == "5" for name in kept)
    assert all(os.environ[name] == "5" for name in (*inherited, *kept))


def test_a_broken_list_of_jobs_is_refused(tmp_path):
    config = config_module.validate(fashion.get_config("tiny"))
    grid = open_grid(tmp_path, ["--config=configs/fashion.py:tiny"], config)
    assert slurm.read_jobs(grid) == {}
    (tmp_path / "slurm").mkdir()
    (tmp_path / slurm.JOBS).write_text('{"common": 5}')
    with pytest.raises(UserError, match="jobs.json: not a list of jobs"):
        slurm.read_jobs(grid)


def test_a_failing_command_fails_its_job():
    with pytest.raises(RuntimeError, match="exit code 3"):
        slurm_task.Task([sys.executable, "-c", "raise SystemExit(3)"])()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """SLURM on this machine, started for the tests and stopped after them."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [
        name for name in ("munged", "slurmctld", "slurmd", "srun") if shutil.which(name, path=path) is None
    ]
    if missing:
        pytest.skip(f"needs SLURM, no {missing[0]} here: apt-get install slurm-wlm munge")
    if not os.environ.get("LISTOPD_SLURM"):
        pytest.skip("starts SLURM daemons for minutes: set LISTOPD_SLURM=1")
    pytest.importorskip("submitit")
    folder, script = tmp_path_factory.mktemp("slurm"), REPO / "tests" / "one_node_slurm.sh"
    subprocess.run([script, "start", folder, str(free_port())], check=True, timeout=60)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    yield folder
    del os.environ["SLURM_CONF"]
    subprocess.run([script, "stop", folder], check=True, timeout=60)


def free_port():
    """A port that is free, and the next one."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def launch(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"launch.{module}", *arguments],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )


def wait_for(what, seconds, condition):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.5)


def trained(root, name):
    """The steps that a point's log of metrics has seen."""
    path = root / "points" / name / "metrics.jsonl"
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return sum(row["stage"] == "opd" for row in rows)


def shown(job, field):
    """What SLURM shows of a job."""
    text = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
    return re.search(rf"\b{field}=(\S+)", text)[1]


@pytest.mark.slow
def test_an_array_with_tasks_killed_and_requeued_gives_one_report(cluster, tmp_path):
    """Task 0 is requeued by the administrator's command, task 1 is told that its end is near; all four finish."""
    root = tmp_path / "grid"
    submit = ["slurm", f"--root={root}", "--minutes=30", "--cpus-per-task=1", *TINY]
    first = launch(*submit)
    assert first.returncode == 0, first.stderr
    jobs = dict(line.split(": job ") for line in first.stdout.splitlines())
    names = [f"lambda{lam}_seed{seed}" for seed in (0, 1) for lam in (1.0, 2.0)]
    assert list(jobs) == ["common", *names]
    assert {job.split("_")[0] for job in list(jobs.values())[1:]} == {
        jobs[names[0]].split("_")[0]
    }  # one array

    again = launch(*submit)
    assert again.returncode == 0 and again.stdout.startswith("nothing to submit"), again.stdout

    for name in names[:2]:
        wait_for(f"{name} training", 900, lambda name=name: trained(root, name) >= 1)
        assert not (root / "points" / name / "report.html").exists()
    subprocess.run(["scontrol", "requeue", jobs[names[0]]], check=True)
    step = shown(jobs[names[1]], "JobId") + ".0"
    subprocess.run(["scancel", "--signal=USR2", step], check=True)
    for name in names:
        wait_for(f"{name} done", 900, (root / "points" / name / "report.html").exists)
    for name in names[:2]:
        assert int(shown(jobs[name], "Restarts")) >= 1
        assert trained(root, name) == 6

    gathered = launch("gather", f"--root={root}")
    assert gathered.returncode == 0, gathered.stderr
    opd = [r for r in json.loads((root / "results.json").read_text()) if r["stage"] == "opd"]
    assert [(r["lambda"], r["seed"]) for r in opd] == [(1.0, 0), (2.0, 0), (1.0, 1), (2.0, 1)]
    assert gathered.stdout.strip() == f"4 of 4 points; report: {root}/report.html"
    assert launch(*submit).stdout.startswith("nothing to submit")
