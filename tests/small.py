"""The small job of processes.py as a config, for the stages in this process."""

import ast

from processes import NO_LAMBDA

from configs import fashion
from listopd_jax.config import validate


def small_config(**fields):
    """What the flags NO_LAMBDA make of `fashion.py:tiny`; `fields` by their dotted names."""
    given = (flag.removeprefix("--config.").split("=") for flag in NO_LAMBDA)
    config = fashion.tiny()
    rarely_saved = {"train.checkpoint_every": 100}  # nobody kills these
    config.update_from_flattened_dict(
        {name: ast.literal_eval(value) for name, value in given} | rarely_saved | fields
    )
    return validate(config)


def start_from(job):
    """The fields of a config that begins with the models that SFT made in another job."""
    fields = {"tokenizer.path": str(job / "export" / "sft_teacher")}
    for role in ("teacher", "student"):
        fields[f"{role}.weights"] = str(job / "export" / f"sft_{role}")
        fields |= {f"sft.{role}.steps": 0, f"sft.{role}.epochs": 0.0}
    return fields
