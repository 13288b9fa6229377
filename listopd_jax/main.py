"""python -m listopd_jax.main --config=configs/fashion.py:demo --workdir=runs/demo

One run from reviews to report: prepare, SFT of teacher and student, OPD for each λ and seed, strict evaluation.
Stopped at any moment, the same command resumes. Exit code 0: done (or saved on SIGTERM); 2: a mistake to fix.
"""

import contextlib
import gc
import importlib.metadata
import pathlib
import platform
import shlex
import sys
from collections.abc import Callable
from typing import Any

from absl import flags
from ml_collections import config_flags

from listopd_jax import config as config_module
from listopd_jax import files, trackers
from listopd_jax.errors import Interrupted, UserError, mistake, print_error
from listopd_jax.lifecycle import end, interruptible, locked, quiet_libraries
from listopd_jax.parallel import compiler, hosts
from listopd_jax.records import EVALUATE, RESULTS, json_name, read_results

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/NAME.py[:PRESET]; override with --config.field=value"
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder for everything the run writes; the same folder resumes"
)


def main(argv: list[str]) -> int:
    """Run and return the exit code; a user's mistake is one line on stderr."""
    return command(argv, __doc__, _job)


def command(
    argv: list[str], description: str, work: Callable[[Any, pathlib.Path, list[str]], pathlib.Path]
) -> int:
    """The exit code of a command that works alone in a workdir: `work(config, workdir, argv)` returns its report.

    `description` is what --help prints. A user's mistake is one line on stderr.
    """
    if {"--help", "-h"} & set(argv):
        print(description)
        return 0
    try:
        config, workdir = parse(argv)
        quiet_libraries()
        # A backend reads this when it starts, so it comes before anything that may start one.
        compiler.reserve_gpu_memory()
        with (
            # The lock comes second: which process takes it is known only once the hosts have connected.
            hosts.initialize_distributed(config.parallel), _alone(workdir), interruptible(),
            compiler.naming_full_memory(),
        ):  # fmt: skip
            report = work(config, workdir, argv)
    except (UserError, PermissionError) as e:
        print_error(mistake(e))
        return hosts.leave(2, mistake(e))
    except Interrupted as e:
        print(e, file=sys.stderr)
        return hosts.leave(0, str(e))
    except KeyboardInterrupt:
        print("stopped; the same command resumes from the last checkpoint", file=sys.stderr)
        # 128 + SIGINT, as shells report it.
        return hosts.leave(130, "stopped from the keyboard")
    if hosts.is_main():
        print(f"report: {report}")
    return 0


def _job(config: Any, workdir: pathlib.Path, argv: list[str]) -> pathlib.Path:
    with hosts.main_first():
        record_config(config, workdir, argv)
    return run(config, workdir)


def _alone(workdir: pathlib.Path) -> contextlib.AbstractContextManager:
    """The lock on `workdir`; of many hosts the first holds it for all."""
    return locked(workdir) if hosts.is_main() else contextlib.nullcontext()


def parse(argv: list[str]) -> tuple[Any, pathlib.Path]:
    """The checked config and the workdir; UserError for an unknown flag, field, preset or a wrong value."""
    with config_module.flag_mistakes(argv):
        rest = flags.FLAGS(config_module.find_config_file(argv))
        config, workdir = _CONFIG.value, _WORKDIR.value
        if config is not None:
            print(
                f"preset {config.preset}; choose another with --config=configs/NAME.py:PRESET",
                file=sys.stderr,
            )
    if any(arg.startswith("--config.preset") for arg in argv):
        raise UserError("--config.preset: the preset is chosen by --config=configs/NAME.py:PRESET")
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not a flag; overrides are written --config.field=value")
    for name, value in (("--config", config), ("--workdir", workdir)):
        if not value:
            raise UserError(f"{name} is missing: give --config=configs/fashion.py --workdir=runs/NAME")
    return config_module.validate(config_module.for_its_task(config, argv)), pathlib.Path(workdir)


def record_config(
    config: Any, workdir: pathlib.Path, argv: list[str], module: str = "listopd_jax.main"
) -> None:
    """Save what this run of `module` is; UserError if the workdir already holds results of another config.

    Of many hosts the first does; the others only check that they share the workdir.
    The grid may grow: finished points are kept, new ones are added. Where only checkpoints from elsewhere were
    evaluated, the config need only judge by the same lists. What a later call was made with is appended
    to the list "resumed". Fields that are newer than the workdir are at their defaults, and are not recorded.
    """
    if not hosts.is_main():
        if not (workdir / config_module.CONFIG).exists():
            raise UserError(
                f"--workdir={workdir}: not seen on every host; choose a folder that all of them share"
            )
        return
    path, now = workdir / config_module.CONFIG, config_module.to_json(config)
    made = description(config, argv, module)
    records = read_results(workdir / RESULTS)
    begun = (workdir / "checkpoints").exists() or any(record.stage != EVALUATE for record in records)
    if not (path.exists() and begun):
        if path.exists() and records:
            refuse_changes(path, config, config_module.EVALUATION)
        files.write_json(path, {"config": now, **made})
        return
    first = refuse_changes(path, config)
    again = {name: made[name] for name in ("command", "revision", "device", "versions")}
    now = config_module.as_first_saved(now, first["config"])
    files.write_json(path, first | {"config": now, "resumed": [*first.get("resumed", []), again]})


def refuse_changes(path: pathlib.Path, config: Any, among: tuple[str, ...] = ("",)) -> dict[str, Any]:
    """The record in a run's config.json; UserError if `config` differs in a field that starts with one of `among`.

    Fields that may change between calls are exempt.
    """
    saved = config_module.read_saved(path)
    if changed := config_module.changed_field(saved["config"], config_module.to_json(config), among):
        field, old, new = changed
        problem = f"this workdir holds a run with {field}={old!r}, not {new!r}"
        if field in config_module.RENAMED:
            problem = f"{field} is {config_module.RENAMED[field]} now"
        raise UserError(f"{path}: {problem}; choose another --workdir")
    return saved


def description(config: Any, argv: list[str], module: str) -> dict[str, Any]:
    """Where and with what a run is made: preset, command, code revision, device and versions."""
    import jax

    packages = (
        "jax",
        "flax",
        "optax",
        "orbax-checkpoint",
        "transformers",
        "grain",
        "tensorflow-datasets",
        "numpy",
    )
    device = jax.devices()[0]
    return {
        "preset": config.preset,
        "notes": list(config.data.synthetic.notes) if config_module.is_embedded(config) else [],
        "command": shlex.join(["python", "-m", module, *argv[1:]]),
        "revision": config_module.code_revision(),
        "device": f"{len(jax.devices())} x {device.device_kind} ({device.platform}), {platform.machine()}",
        "versions": {"python": platform.python_version()}
        | {p: importlib.metadata.version(p) for p in packages},
    }


def run(config: Any, workdir: pathlib.Path) -> pathlib.Path:
    """Every stage in order; returns the path of the report."""
    from listopd_jax.report.write import write_report
    from listopd_jax.stages.job import tracking
    from listopd_jax.stages.pipeline import run_stages

    trackers.require(config.track.to)
    set_up(config, workdir)
    run_stages(config, workdir)
    if not hosts.is_main():
        return workdir
    report = write_report(workdir)
    print(compiler.compile_time(), file=sys.stderr)
    log_results(tracking(config), workdir, report)
    return report


def log_results(tracking: trackers.Tracking, workdir: pathlib.Path, report: pathlib.Path) -> None:
    """Send every policy's results and the report to the trackers."""
    names = ("run", "lam", "seed", "steps", "parse", "useful", "ndcg_1", "tau", "mae")
    rows = [
        {json_name(name): getattr(record, name) for name in names}
        for record in read_results(workdir / RESULTS)
    ]
    with trackers.Trackers(tracking, workdir, "report", resumed=True) as log:
        log.table(None, "results", rows)
        log.page("report", report)


def set_up(config: Any, workdir: pathlib.Path) -> None:
    """Set up this process: compiler options, the cache of compiled programs, garbage collection."""
    collect_rarely()
    compiler.compilations()  # counts from here on
    compiler.exact_float32(config.dtype.compute)
    if config_module.is_small(config):
        compiler.compile_quickly()
    compiler.keep_compiled(workdir / "compile_cache")


def collect_rarely() -> None:
    """Keep garbage collection from looking at the imported libraries again and again: a tenth of a small job."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


if __name__ == "__main__":
    end(main(sys.argv), others=not hosts.alone())
