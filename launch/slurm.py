"""python -m launch.slurm --root=ROOT --partition=gpu --gpus-per-node=8 --minutes=240 --config=configs/fashion.py:paper

Submit a grid to SLURM by submitit: a job for the common stages and, after it, an array of the points that are not
done. What is done is not submitted, nor what is still in the queue; what failed is submitted again. ROOT and this
folder must be visible on every node. Scripts, logs and the numbers of the jobs are in ROOT/slurm.

A run that is pre-empted or reaches its time limit saves, is requeued and resumes.
Exit code 0: submitted, or nothing to do; 2: a mistake to fix.
"""

import argparse
import contextlib
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch import cli
from launch.grid import COMMON, Grid
from launch.slurm_task import Task
from listopd_jax import files
from listopd_jax.errors import Parser, UserError, exit_code, positive

JOBS = "slurm/jobs.json"


def main(argv: Sequence[str]) -> int:
    """Parse and submit."""
    args, arguments = cli.parse_grid(_parser(), argv)
    parameters = _parameters(args)
    grid = cli.load(args, arguments)
    cli.list_states(grid)
    jobs = submit(grid, parameters, args.requeues)
    for name, job in jobs.items():
        print(f"{name}: job {job}")
    if not jobs:
        print(
            f"nothing to submit; squeue shows what runs, python -m launch.gather --root={args.root} what is done"
        )
    return 0


def _parser() -> Parser:
    parser = cli.grid_parser("launch.slurm", __doc__)
    parser.add_argument("--minutes", type=positive, required=True, help="time limit of a job")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--qos")
    parser.add_argument("--constraint")
    parser.add_argument("--nodes", type=positive, default=1, help="nodes of a point, one process each")
    parser.add_argument("--gpus-per-node", type=_gpus, metavar="[TYPE:]N")
    parser.add_argument("--cpus-per-task", type=positive)
    parser.add_argument("--mem", help="memory of a node, e.g. 200GB")
    parser.add_argument("--parallel", type=positive, default=256, help="points at one time")
    parser.add_argument(
        "--requeues", type=positive, default=100, help="times a job may reach its limit and resume"
    )
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION=VALUE", help="any other of sbatch"
    )
    return parser


def _gpus(text: str) -> str:
    """GPUs of a node, as an argparse type: their number, after their type where the cluster wants it."""
    if not re.fullmatch(r"(?:[\w.-]+:)?[1-9][0-9]*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor TYPE:NUMBER, e.g. 4 or a100:4")
    return text


def _parameters(args: Any) -> dict[str, Any]:
    """submitit's names and values of the options of a job."""
    pairs = [x.partition("=") for x in args.sbatch]
    wrong = next((name for name, _, value in pairs if not name or not value or name.startswith("-")), None)
    if wrong is not None:
        raise UserError(
            f"--sbatch={wrong}: write OPTION=VALUE without dashes, e.g. --sbatch=reservation=mine"
        )
    names = ("partition", "account", "qos", "constraint", "nodes", "gpus_per_node", "cpus_per_task")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    extra = {"requeue": True, "kill-on-invalid-dep": "yes"} | {name: value for name, _, value in pairs}
    extra |= {"mem": args.mem} if args.mem else {}
    times = {"time": args.minutes, "array_parallelism": args.parallel, "ntasks_per_node": 1}
    return given | times | {"additional_parameters": extra}


def submit(grid: Grid, parameters: dict[str, Any], requeues: int) -> dict[str, str]:
    """Submit what is neither done nor queued; {name: job} of what was. UserError if SLURM does not take it."""
    running, jobs = queued_jobs(), read_jobs(grid)
    queued = {name: job for name, job in jobs.items() if job in running}
    new: dict[str, str] = {}
    if not grid.done(COMMON) and COMMON not in queued:
        new |= _submit(grid, [COMMON], parameters, requeues)
        files.write_json(grid.root / JOBS, jobs | new)
    points = [name for name in grid.pending() if name not in queued]
    if points:
        after = (queued | new).get(COMMON)
        dependency = {"dependency": f"afterok:{after}"} if after else {}
        new |= _submit(grid, points, parameters | dependency, requeues)
        files.write_json(grid.root / JOBS, jobs | new)
    return new


def read_jobs(grid: Grid) -> dict[str, str]:
    """The job that each stage was last submitted as."""
    path = grid.root / JOBS
    jobs = files.read_json(path) if path.exists() else {}
    if not isinstance(jobs, dict) or not all(isinstance(job, str) for job in jobs.values()):
        raise UserError(f"{path}: not a list of jobs; delete it when squeue shows none of this grid")
    return jobs


def _submit(grid: Grid, names: Sequence[str], parameters: dict[str, Any], requeues: int) -> dict[str, str]:
    """One job, or an array of them."""
    try:
        import submitit
    except ImportError as e:
        raise UserError("submitit is not installed: pip install -e '.[slurm]'") from e
    on_node = dataclasses.replace(grid, root=grid.root.absolute())
    # one process per node has all its GPUs: under SLURM, jax would give it only the first
    gpus = gpus_of_node(parameters)
    environment = {"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(gpus)))} if gpus else {}
    tasks = [Task(on_node.point_command(name, sys.executable), environment) for name in names]
    try:
        executor = submitit.SlurmExecutor(grid.root / "slurm", max_num_timeout=requeues)
        executor.update_parameters(job_name=f"listopd-{grid.root.name}", **parameters)
        with outside_any_job():
            jobs = executor.submit_array(tasks) if len(tasks) > 1 else [executor.submit(tasks[0])]
    except (RuntimeError, OSError) as e:
        raise UserError(f"SLURM did not take the job: {cli.last_line(e)}") from e
    return {name: job.job_id for name, job in zip(names, jobs, strict=True)}


def gpus_of_node(parameters: Mapping[str, Any]) -> int:
    """How many GPUs a node of a job has, whichever option asks for them; 0 if none does."""
    extra, nodes = parameters["additional_parameters"], parameters.get("nodes", 1)
    options = [(str(parameters.get("gpus_per_node", "")), 1)]
    options += [(extra.get(name, ""), 1) for name in ("gpus-per-node", "gpus-per-task")]
    options += [(extra.get("gpus", ""), nodes)]
    options += [(",".join(x.removeprefix("gpu:") for x in _resources(extra) if x.startswith("gpu")), 1)]
    return max(_count(text) // share for text, share in options)


def _resources(extra: Mapping[str, Any]) -> list[str]:
    """The entries of the options gres, e.g. gpu:a100:4(S:0-1), and tres-per-node, e.g. gres/gpu:a100:4."""
    both = f"{extra.get('gres', '')},{extra.get('tres-per-node', '')}"
    return re.sub(r"\([^)]*\)|\bgres[/:]", "", both).split(",")


def _count(text: str) -> int:
    """The number in an option for GPUs: N, TYPE:N, several of them with commas, or a type alone, which is one."""
    parts = [part.rpartition(":")[2] for part in text.split(",") if part]
    return sum(int(part) if part.isdecimal() else 1 for part in parts)


@contextlib.contextmanager
def outside_any_job() -> Iterator[None]:
    """Hide the job that this process is in, if it is in one: sbatch would take what it has for the new job's.

    What a user or site sets for every submission stays.
    """
    import submitit

    kept = {n: x for n, x in os.environ.items() if n.startswith("SBATCH_") or n == "SLURM_CONF"}
    with submitit.helpers.clean_env():
        os.environ.update(kept)
        yield


def queued_jobs() -> set[str]:
    """The numbers (JOB, or JOB_TASK of an array) of every job that waits or runs."""
    command = ["squeue", "--noheader", "--array", "--format=%i"]
    try:
        return set(
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
        )
    except FileNotFoundError as e:
        raise UserError(
            "SLURM is not available (no squeue); use python -m launch.local, or run this on a login node"
        ) from e
    except subprocess.TimeoutExpired as e:
        raise UserError("squeue does not answer; try again when SLURM is up") from e
    except subprocess.CalledProcessError as e:
        raise UserError(f"squeue failed: {cli.last_line(e.stderr)}") from e


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
