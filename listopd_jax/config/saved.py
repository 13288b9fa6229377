"""A configuration as JSON: how a workdir keeps it, and which fields a later call may change."""

import functools
import json
import math
import pathlib
import shutil
import subprocess
from typing import Any

import ml_collections

from listopd_jax import files
from listopd_jax.config.check import validate
from listopd_jax.config.fields import REMOVED, RENAMED, defaults, flatten
from listopd_jax.errors import UserError, one_line, require

CONFIG = "config.json"
"""In a workdir: the config of its run, and what it was made with."""


def to_json(config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict) -> dict[str, Any]:
    """The config as plain JSON values (infinities as the string "inf"), field order fixed."""
    return json.loads(json.dumps(_plain(config.to_dict()), sort_keys=True, allow_nan=False))


def from_json(saved: dict[str, Any]) -> ml_collections.FrozenConfigDict:
    """The checked config whose `to_json` is `saved`; a field that an older config lacks gets its default.

    Fields of REMOVED are dropped. UserError for a field that does not exist, or a value it cannot have.
    """
    require(isinstance(saved, dict), f"the saved config is {type(saved).__name__}, not an object; restore it")
    config, known = defaults(), dict(flatten(defaults().to_dict()))
    for field, value in flatten(saved):
        if field in REMOVED:
            continue
        require(field not in RENAMED, f"{field} is {RENAMED.get(field)} now; rename it in the saved config")
        require(field in known, f"{field}: there is no such field in this version")
        require(value is not None, f"{field}=None: must have a value")
        if isinstance(known[field], float) and value == "inf":
            value = math.inf
        try:
            config.update_from_flattened_dict({field: tuple(value) if isinstance(value, list) else value})
        except (TypeError, ValueError, OverflowError) as e:
            raise UserError(f"{field}={value!r}: {one_line(e)}") from e
    return validate(config)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


MAY_CHANGE = (
    "opd.lambdas",
    "opd.plain_lambdas",
    "opd.seeds",
    "opd.sweep",
    "forecast.lambdas",
    "forecast.plain_lambdas",
    "predict.",
    "parallel.",
    "attention",
    "track.",
    "teacher.server",
)
"""Fields and sections that may differ between calls on one workdir: the grid may grow, devices and trackers change.

A server may move; whether there is one, and for which model, `teacher.served_name` says.
"""


def fixed_fields(saved: dict[str, Any]) -> dict[str, Any]:
    """The dotted fields of a config in JSON values, without those that `MAY_CHANGE`."""
    return {field: value for field, value in flatten(saved) if not field.startswith(MAY_CHANGE)}


EVALUATION = ("task.", "data.", "tokenizer.", "evaluation.", "dtype.compute")
"""Fields and sections that decide what a policy's record says, whatever the policy."""


def changed_field(
    before: dict[str, Any], now: dict[str, Any], among: tuple[str, ...] = ("",)
) -> tuple[str, Any, Any] | None:
    """(name, before, now) of the first of `fixed_fields` in which two configs in JSON values differ.

    A field that `before` lacks had its default; fields of `before` that no longer exist come first. Only fields whose
    names start with one of `among` count.
    """
    old, new = fixed_fields(to_json(defaults())) | fixed_fields(before), fixed_fields(now)
    names = sorted(old.keys() | new.keys(), key=lambda name: (name in new, name))
    differing = (name for name in names if old.get(name) != new.get(name) and name.startswith(among))
    return next(((name, old.get(name), new.get(name)) for name in differing), None)


def as_first_saved(now: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """The config `now`, in JSON values, without the `fixed_fields` that did not exist when `first` was saved.

    So a workdir that a later version resumes keeps the digest that its checkpoints name.
    """
    later = fixed_fields(now).keys() - fixed_fields(first).keys()
    kept: dict[str, Any] = {}
    for field, value in flatten(now):
        *sections, name = field.split(".")
        if field not in later:
            functools.reduce(lambda section, name: section.setdefault(name, {}), sections, kept)[name] = value
    return kept


def read_saved(path: pathlib.Path) -> dict[str, Any]:
    """The record in a run's config.json, with the config as JSON values under `config`; UserError if it is not one."""
    saved = files.read_json(path)
    fits = isinstance(saved, dict) and isinstance(saved.get("config"), dict)
    require(
        fits and isinstance(saved.get("resumed", []), list),
        f"{path}: not the record of a run; restore it, or choose another --workdir",
    )
    return saved


def digest(config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict, workdir: pathlib.Path) -> str:
    """SHA-256 of the fixed fields of a config: of those that it had when the run in `workdir` began."""
    path, now = workdir / CONFIG, to_json(config)
    first = read_saved(path)["config"] if path.exists() else now
    return files.json_sha256(fixed_fields(as_first_saved(now, first)))


def code_revision() -> str:
    """Git commit of the code that runs, with "+changes" if the tree differs; "unknown" outside a checkout."""
    if shutil.which("git") is None:
        return "unknown"
    git = ["git", "-C", str(pathlib.Path(__file__).resolve().parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode != 0:
        return "unknown"
    status = subprocess.run(
        [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")
