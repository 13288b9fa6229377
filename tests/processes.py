"""The main job in processes of their own, which share compiled programs and need not import anything again."""

import atexit
import gc
import importlib
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

REPO = pathlib.Path(__file__).resolve().parents[1]


def programs_folder() -> str:
    """The folder of compiled programs that the first process makes and removes, and its children find by a variable."""
    if "LISTOPD_TEST_PROGRAMS" not in os.environ:
        os.environ["LISTOPD_TEST_PROGRAMS"] = folder = tempfile.mkdtemp(prefix="listopd_programs_")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return os.environ["LISTOPD_TEST_PROGRAMS"]


SHARE = {"JAX_COMPILATION_CACHE_DIR": programs_folder(), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
"""What a process is told in order to keep its compiled programs for the others of these tests, and to use theirs."""

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "pytest",
        "grain",
        "transformers.models.auto.tokenization_auto",
        "listopd_jax.main",
        "listopd_jax.stages.pipeline",
        "listopd_jax.report.write",
    ]  # fmt: skip
)

NO_LAMBDA = (
    "--config.data.synthetic.products=12 --config.data.validation_share=0.25 "
    "--config.evaluation.max_lists=6 --config.evaluation.batch_size=6 "
    "--config.evaluation.bootstrap=50 --config.sft.teacher.steps=4 --config.sft.student.steps=3 "
    "--config.sft.teacher.batch_size=4 --config.sft.student.batch_size=4 --config.opd.batch_size=4 "
    "--config.opd.steps=3 --config.opd.eval_steps=2, --config.train.checkpoint_every=1 "
    "--config.task.max_response=64 --config.forecast.lambdas=1.5, --config.forecast.batch_size=6 "
    "--config.track.log_completions_every=2 --config.track.completions=3"
).split()
"""A whole job of seconds, but for its λ: the flags of a tuple add up when they are given twice."""

SMALL = [*NO_LAMBDA, "--config.opd.lambdas=1.0,2.0"]
"""The job that the fixture `finished_job` runs, never interrupted."""


class Ended(NamedTuple):
    """How a process ended and what it said."""

    returncode: int
    stdout: str
    stderr: str


def command(workdir, *more, config="configs/fashion.py:tiny", module="main"):
    """The command line of a user."""
    return [
        sys.executable,
        "-m",
        f"listopd_jax.{module}",
        f"--config={config}",
        f"--workdir={workdir}",
        *more,
    ]


def run_command(arguments, **environment):
    """A command as a user gives it, in the repository, to its end."""
    environment = os.environ | SHARE | environment
    return subprocess.run(arguments, cwd=REPO, capture_output=True, text=True, check=False, env=environment)


class Fork(NamedTuple):
    """A process that runs the main job, and the files of what it says."""

    process: multiprocessing.Process
    said: list[pathlib.Path]

    def end(self, timeout=None) -> Ended:
        """Wait for it."""
        self.process.join(timeout)
        return Ended(self.process.exitcode, *(path.read_text() for path in self.said))


def start_main(folder, arguments, **environment) -> Fork:
    """`arguments` (from `command`) in a fork of a process that has imported it all; what it says goes to `folder`."""
    said = [pathlib.Path(folder, name) for name in ("stdout", "stderr")]
    process = FORKS.Process(target=_main, args=(arguments[2:], said, environment))
    process.start()
    return Fork(process, said)


def run_main(workdir, *more, config="configs/fashion.py:tiny", module="main", **environment):
    """`command` by a fork of a process that has imported it all: seconds faster, and otherwise the same."""
    with tempfile.TemporaryDirectory() as folder:
        return start_main(folder, command(workdir, *more, config=config, module=module), **environment).end()


def _main(arguments, said, environment):
    for descriptor, path in zip((1, 2), said, strict=True):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    gc.disable()  # a tenth of the time, and a job of seconds has room for its garbage
    os.chdir(REPO)
    os.environ.update(environment)
    share_programs()
    sys.argv = arguments  # where ml_collections looks for overrides
    sys.exit(importlib.import_module(arguments[0]).main(arguments))


def share_programs(**other):
    """What SHARE asks for, but for `other` values, where jax is imported already."""
    import jax

    for variable, value in (SHARE | other).items():
        name = variable.lower()
        jax.config.update(name, float(value) if name.endswith("secs") else value)
