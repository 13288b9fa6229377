"""The targets of fuzz.py by name, in the order in which they run: folder → what runs one case."""

from fuzz_answers import contract, json_answers
from fuzz_data import Absent, reviews, tasks
from fuzz_files import models, run_files

TARGETS = {
    "contract": contract,
    "json": json_answers,
    "reviews": reviews,
    "tasks": tasks,
    "run_files": run_files,
    "models": models,
}
__all__ = ["TARGETS", "Absent"]
