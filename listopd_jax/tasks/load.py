"""The task of a run: one that is shipped, by `task.name`, or that of a user's own file, `task.file`."""

import contextlib
import importlib.util
import inspect
import os
import pathlib
import sys
import traceback
import types
from collections.abc import Iterator
from typing import Any

from listopd_jax.errors import UserError, one_line
from listopd_jax.task.protocol import Task
from listopd_jax.tasks.bfcl import Bfcl
from listopd_jax.tasks.cranfield import Cranfield
from listopd_jax.tasks.esci import Esci
from listopd_jax.tasks.json_records import JsonTask
from listopd_jax.tasks.passages import Passages
from listopd_jax.tasks.reviews import Reviews

TASKS = {task.name: task for task in (Reviews, JsonTask, Bfcl, Cranfield, Passages, Esci)}


def load_task(config: Any) -> Task:
    """The task of a checked config; UserError for a file that cannot be loaded, or holds no task that can be made."""
    options = config.task
    if not options.file:
        return TASKS[options.name](config.data, options)
    path = pathlib.Path(options.file)
    kind = task_in(path)
    try:
        task = kind(config.data, options)
    except UserError:
        raise
    except (Exception, SystemExit) as e:
        raise _mistake(path, e) from e
    if not vars(task).keys() >= {"data", "options"}:
        raise UserError(
            f"task.file={path}: {kind.__name__}.__init__ must call super().__init__(data, options); correct it"
        )
    return task


@contextlib.contextmanager
def in_task_file(path: str) -> Iterator[None]:
    """While inside, what fails in the lines of the task file `path` is a UserError; "" for no file."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as e:
        if not _lines(pathlib.Path(path), e):  # no line of the file is to blame
            raise
        raise _mistake(pathlib.Path(path), e) from e


def task_in(path: pathlib.Path) -> type[Task]:
    """The one subclass of Task that a Python file defines; the file is executed.

    Raises UserError: there is no such file, it fails, defines no task or several, or one that lacks a method.
    """
    if not path.is_file():
        raise UserError(f"task.file={path}: no such file; give the Python file that defines your task")
    module = _executed(path)
    # By __module__: a task file also imports Task or FileTask, which are not its own.
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    found = [c for c in own if issubclass(c, Task)]
    if len(found) != 1:
        names = ", ".join(sorted(c.__name__ for c in found)) or "none"
        raise UserError(
            f"task.file={path}: one class of it must be a Task, found {names}; keep one in the file"
        )
    if missing := sorted(found[0].__abstractmethods__):
        raise UserError(f"task.file={path}: {found[0].__name__} lacks {', '.join(missing)}; define it")
    return found[0]


def _executed(path: pathlib.Path) -> types.ModuleType:
    name = f"task_file_{path.stem}"  # no module that is there already
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"task.file={path}: is not a Python file; its name must end in .py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:  # the user's program can raise anything, and exit
        raise _mistake(path, e) from e
    return module


def _mistake(path: pathlib.Path, e: BaseException) -> UserError:
    """The one line for what the user's program raised."""
    lines = _lines(path, e) or ([e.lineno] if isinstance(e, SyntaxError) else [])
    where = f":{lines[-1]}" if lines else ""
    return UserError(f"{path}{where}: {type(e).__name__}: {one_line(e)}; correct the task file")


def _lines(path: pathlib.Path, e: BaseException) -> list[int]:
    """The lines of the file that led to `e`, the last one last."""
    own = os.path.abspath(path)  # as importlib names a file, whatever the config calls it
    return [f.lineno for f in traceback.extract_tb(e.__traceback__) if os.path.abspath(f.filename) == own]
