"""Experiment trackers, optional: Weights & Biases and trackio, whose interfaces agree.

`track.to` names those that a run logs to, extras of their names install them. Accounts, servers and offline mode are
configured by their own environment variables (WANDB_MODE=offline, TRACKIO_DIR).
"""

import contextlib
import importlib
import importlib.util
import pathlib
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from listopd_jax import files
from listopd_jax.errors import UserError, first_line

TRACKERS = ("wandb", "trackio")
STAMP = "track.json"


class Tracking(NamedTuple):
    """The trackers of a job, the project that they log to, and the configuration that they show."""

    to: tuple[str, ...] = ()  # of TRACKERS
    project: str = ""
    config: Mapping[str, Any] = {}  # JSON


UNTRACKED = Tracking()


def require(names: Sequence[str]) -> None:
    """UserError if a tracker of `names` is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"track.to={name}: {name} is not installed; pip install 'listopd_jax[{name}]'")


class Trackers:
    """Context manager: one run in every tracker of `tracking`; of many processes only process 0 logs.

    Args:
      workdir: names the group of its runs; has wandb's files and the id that keeps its runs apart from others.
      run: e.g. "opd_lambda1.2_seed0".
      resumed: whether rows of the run were logged before. Rows logged again are equal: trackers may keep either.

    UserError if a tracker cannot be reached or refuses.
    """

    def __init__(self, tracking: Tracking, workdir: pathlib.Path, run: str, resumed: bool = False):
        self._tracking, self._workdir, self._run, self._resumed = tracking, workdir, run, resumed
        self._runs: list[tuple[Any, Any]] = []  # library, its run

    def __enter__(self) -> "Trackers":
        if files.on_process_0():
            self._runs = [self._opened(name) for name in self._tracking.to]
        return self

    def _opened(self, name: str) -> tuple[Any, Any]:
        require([name])
        unique = _unique_id(self._workdir)
        options = {
            "project": self._tracking.project,
            "group": f"{self._workdir.absolute().name}-{unique}",
            "config": dict(self._tracking.config),
            "resume": "allow" if self._resumed else "never",
        }
        with _output_to_stderr(name):
            library = importlib.import_module(name)
            if name == "wandb":
                own = {"id": f"{unique}-{self._run}", "dir": str(self._workdir)}
                # A unique id says which run to resume; "never" would refuse a run that starts over.
                own["resume"] = "allow" if self._resumed else None
                return library, library.init(name=self._run, **options | own)
            return library, library.init(name=f"{self._run}-{unique}", **options)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log one row of scalars."""
        for _, run in self._runs:
            run.log(dict(values), step=step)

    def table(self, step: int | None, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log a table; every row has the columns of the first."""
        for library, run in self._runs if rows else ():
            data = [list(row.values()) for row in rows]
            run.log({name: library.Table(columns=list(rows[0]), data=data)}, step=step)

    def page(self, name: str, path: pathlib.Path) -> None:
        """Log a self-contained HTML page."""
        for library, run in self._runs:
            run.log({name: library.Html(str(path), inject=False)})

    def __exit__(self, *_: object) -> None:
        for library, _ in self._runs:
            with _output_to_stderr(library.__name__):
                library.finish()


@contextlib.contextmanager
def _output_to_stderr(name: str) -> Iterator[None]:
    """A tracker's output goes to stderr; stdout is the job's. Its exceptions become one line."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except UserError:
        raise
    except Exception as e:  # each library has its own
        how = "; WANDB_MODE=offline keeps everything in the workdir" if name == "wandb" else ""
        raise UserError(f"track.to={name}: {first_line(e)}{how}") from e


def _unique_id(workdir: pathlib.Path) -> str:
    """The unique id of `workdir`, made at the first call: a resumed run keeps it."""
    path = workdir / STAMP
    if not path.exists():
        files.write_json(path, {"id": uuid.uuid4().hex[:8]})
    saved = files.read_json(path)
    if not isinstance(saved, dict) or not isinstance(saved.get("id"), str):
        raise UserError(f"{path}: not the id of a tracked workdir; delete it")
    return saved["id"]
