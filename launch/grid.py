"""The grid of a launch: its points, the folder they share, and what is done there.

    ROOT/grid.json              the configuration, and the arguments that gave it
    ROOT/common/                workdir of the stages that all points share: data, SFT, calibration, forecast
    ROOT/points/NAME/           workdir of one λ and one seed
    ROOT/logs/NAME.log          what the runs printed (NAME.host3.log: those on host 3)
    ROOT/status/NAME.json       how the last of them ended

The points are opd.lambdas (and opd.plain_lambdas) × opd.seeds of the configuration. What is done is read off the
workdirs, never off the status: a workdir has a report.html if and only if its run came to its end.
"""

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from listopd_jax import config as config_module
from listopd_jax import files
from listopd_jax.errors import UserError

COMMON, RECORD = "common", "grid.json"
GUARDED, PLAIN = "lambdas", "plain_lambdas"
"""The fields of λ that sections opd and forecast have: under opd.guard, if it is on, and without it."""


class Point(NamedTuple):
    """One λ and one seed; `plain`: without the guard that the others have."""

    lam: float
    seed: int
    plain: bool = False

    @property
    def name(self) -> str:
        """Its name in folders and commands, e.g. lambda1.2_seed7."""
        return f"lambda{self.lam}{'_plain' if self.plain else ''}_seed{self.seed}"


class State(NamedTuple):
    """The state of a stage: done, failed, stopped (resumes when run again), started or waiting, and the last output."""

    word: str
    why: str = ""

    def __str__(self) -> str:
        return f"{self.word}: {self.why}" if self.why else self.word


@dataclasses.dataclass(frozen=True)
class Grid:
    """A grid in its folder. `arguments` are --config=FILE[:PRESET] and its overrides, `config` is what they give."""

    root: pathlib.Path
    arguments: tuple[str, ...]
    config: dict[str, Any]
    points: tuple[Point, ...]  # every λ of every seed, in the order in which one run would train them
    forecasts: dict[
        str, tuple[float, ...]
    ]  # every λ that the common stages forecast, by its field of section forecast

    @property
    def names(self) -> list[str]:
        """The names of the points."""
        return [point.name for point in self.points]

    def point(self, name: str) -> Point:
        """The point called `name`; UserError if the grid has none."""
        found = [point for point in self.points if point.name == name]
        if not found:
            raise UserError(f"{name!r} is not a point of this grid: {COMMON}, {', '.join(self.names)}")
        return found[0]

    def workdir(self, name: str) -> pathlib.Path:
        """The workdir of the common stages or of a point."""
        return self.root / COMMON if name == COMMON else self.root / "points" / name

    def main_arguments(self, name: str) -> list[str]:
        """The arguments of listopd_jax.main for the common stages or for a point."""
        if name == COMMON:
            own = {f"forecast.{kind}": lambdas for kind, lambdas in self.forecasts.items()}
        else:
            lam, seed, plain = self.point(name)
            own = {f"opd.{PLAIN if plain else GUARDED}": (lam,), "opd.seeds": (seed,)}
        grids = [f"{section}.{kind}" for kind in self.forecasts for section in ("opd", "forecast")]
        own = dict.fromkeys(grids, ()) | own
        # a tuple given twice is appended to, so what was given for these fields goes
        given = [x for x in self.arguments if x.split("=")[0].removeprefix("--config.") not in own]
        mine = [f"--config.{field}={value}".replace(" ", "") for field, value in own.items()]
        return [*given, *mine, f"--workdir={self.workdir(name)}"]

    def point_command(self, name: str, python: str = "python") -> list[str]:
        """The command that each host runs to bring a stage to its end."""
        return [python, "-m", "launch.point", f"--root={self.root}", f"--name={name}", *self.arguments]

    def done(self, name: str) -> bool:
        """Whether the common stages, or a point, came to their end; a λ new to the grid is still to be forecast."""
        if not (self.workdir(name) / "report.html").exists():
            return False
        if name != COMMON:
            return True
        path = self.workdir(COMMON) / "config.json"
        try:
            saved = files.read_json(path)["config"]["forecast"]
            return all(set(saved[kind]) >= set(lambdas) for kind, lambdas in self.forecasts.items())
        except (KeyError, TypeError) as e:
            raise UserError(f"{path}: not the record of a run; choose another --root") from e

    def state(self, name: str) -> State:
        """The state of the common stages or of a point."""
        if self.done(name):
            return State("done")
        path = self.root / "status" / f"{name}.json"
        if not path.exists():
            return State("waiting")
        saved = files.read_json(path)
        if not isinstance(saved, dict) or saved.keys() != set(State._fields):
            raise UserError(f"{path}: not the state of a point; delete it")
        gone = State("waiting", "was done; what it left is gone, or the grid has a new λ")
        return gone if saved["word"] == "done" else State(**saved)

    def pending(self) -> list[str]:
        """The points that are not done."""
        return [name for name in self.names if not self.done(name)]


def make_grid(root: pathlib.Path, arguments: Sequence[str], config: dict[str, Any]) -> Grid:
    """The grid that a configuration, as JSON, describes."""
    opd, more = config["opd"], config["forecast"]
    lambdas = [(float(lam), kind == PLAIN) for kind in (PLAIN, GUARDED) for lam in opd.get(kind, ())]
    points = tuple(Point(lam, seed, plain) for seed in opd["seeds"] for lam, plain in lambdas)
    forecasts = {
        kind: tuple(sorted({float(lam) for section in (opd, more) for lam in section.get(kind, ())}))
        for kind in (GUARDED, PLAIN)
    }
    if not forecasts[PLAIN]:  # nothing to leave out of a stage's arguments
        del forecasts[PLAIN]
    return Grid(root, tuple(arguments), config, points, forecasts)


def open_grid(root: pathlib.Path, arguments: Sequence[str], config: Any, record: bool = True) -> Grid:
    """The grid that the checked `config` describes, in `root`; UserError if that holds another one.

    λ and seeds may differ from those of the last launch: the grid is what the last launch says, what is done stays.
    With `record` (or if nothing is recorded yet) `root`/grid.json says from now on what the grid is.
    """
    grid, path = make_grid(root, arguments, config_module.to_json(config)), root / RECORD
    if config.opd.recommend:
        raise UserError("opd.recommend=True: a grid trains the λ of opd.lambdas; leave it off, or run main")
    if config_module.predicts(config):
        raise UserError(
            "section predict: a point of a grid would predict its own λ alone; set predict.anchors=() and "
            "predict.fixed_text_lists=0, or run main"
        )
    if config.opd.sweep:
        raise UserError(
            "opd.sweep: a launch trains λ × seeds; run main, which trains a sweep, or launch each point"
        )
    if not grid.points:
        raise UserError("opd.lambdas is empty: a grid has at least one λ, e.g. --config.opd.lambdas=1.0,1.2")
    if path.exists():
        _refuse_another(path, read_grid(root).config, grid.config)
    elif (root / "config.json").exists():
        raise UserError(f"--root={root}: is the workdir of a run, not of a grid; choose another folder")
    if record or not path.exists():
        files.write_json(path, {"arguments": list(arguments), "config": grid.config})
    return grid


def read_grid(root: pathlib.Path) -> Grid:
    """The grid that `root` holds; UserError if it holds none."""
    path = root / RECORD
    if not path.exists():
        raise UserError(f"{root}: holds no grid (no {RECORD}); give the --root of a launch")
    saved = files.read_json(path)
    try:
        return make_grid(root, saved["arguments"], saved["config"])
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path}: not the record of a grid; delete it and launch again") from e


def _refuse_another(path: pathlib.Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """UserError that names the first field outside the grid in which two configurations differ."""
    if changed := config_module.changed_field(old, new):
        field, before, now = changed
        raise UserError(
            f"{path}: this folder holds a grid with {field}={before!r}, not {now!r}; choose another --root"
        )


def dns_name(prefix: str, name: str) -> str:
    """A name that Kubernetes and Google Cloud accept: small letters, digits and dashes; UserError if there is none."""
    dashed = f"{prefix}-{name}".replace(".", "p").replace("_", "-").replace("+", "")
    if not re.fullmatch(r"[a-z][a-z0-9-]*[a-z0-9]", dashed) or len(dashed) > 40:
        raise UserError(
            f"--name={prefix}: {dashed!r} must be small letters, digits and dashes, begin with a letter and "
            "have at most 40 characters"
        )
    return dashed
