"""python -m listopd_jax.evaluate --weights=FOLDER --config=configs/fashion.py:demo --workdir=runs/demo

Judges a checkpoint from elsewhere on the validation lists of the config: greedy answers, strict contract. In the
workdir of a run its row is added to those of the run's policies; the run itself stays as it is. A new workdir is
created. Exit code 0: done; 2: a mistake to fix.
"""

import pathlib
import sys
from typing import Any

from absl import flags

from listopd_jax import config as config_module
from listopd_jax import main as main_module
from listopd_jax.errors import UserError
from listopd_jax.lifecycle import end
from listopd_jax.parallel import hosts

_WEIGHTS = flags.DEFINE_string(
    "weights", None, "folder with a Hugging Face checkpoint in safetensors, a GGUF file, or a hub id"
)


def main(argv: list[str]) -> int:
    """Evaluate and return the exit code; a user's mistake is one line on stderr."""
    return main_module.command(argv, __doc__, _evaluate)


def _evaluate(config: Any, workdir: pathlib.Path, argv: list[str]) -> pathlib.Path:
    from listopd_jax.report.write import write_report
    from listopd_jax.stages.checkpoint import evaluate_checkpoint
    from listopd_jax.stages.results import summary

    if not _WEIGHTS.value:
        raise UserError("--weights is missing: give the folder of a checkpoint")
    with hosts.main_first():
        _record_config(config, workdir, argv)
    main_module.set_up(config, workdir)
    record = evaluate_checkpoint(config, workdir, _WEIGHTS.value)
    if not hosts.is_main():
        return workdir
    print(f"{record.run}: {summary(record)}")
    return write_report(workdir)


def _record_config(config: Any, workdir: pathlib.Path, argv: list[str]) -> None:
    """Save what this run is in a new workdir; in that of a run, only see that it judges by the same lists."""
    path = workdir / config_module.CONFIG
    if hosts.is_main() and path.exists():
        main_module.refuse_changes(path, config, config_module.EVALUATION)
    else:
        main_module.record_config(config, workdir, argv, "listopd_jax.evaluate")


if __name__ == "__main__":
    end(main(sys.argv), others=not hosts.alone())
