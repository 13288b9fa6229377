"""docs/bring_your_own.md: its task is short, does what it says, and runs from its file to the report."""

import json
import pathlib
import re

import pytest
from processes import NO_LAMBDA, run_main

from listopd_jax import config as config_module
from listopd_jax.errors import UserError
from listopd_jax.tasks.load import TASKS, load_task, task_in

TEXT = (pathlib.Path(__file__).parents[1] / "docs" / "bring_your_own.md").read_text("utf-8")
CODE = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1]


@pytest.fixture
def folder(tmp_path):
    """The file of the document, and sums to read."""
    (tmp_path / "sums.py").write_text(CODE)
    lines = [f"{i * 37 % 91}+{i * 53 % 83}" for i in range(1, 41)]
    (tmp_path / "sums.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def task_of(folder, **fields):
    config = config_module.defaults()
    config.task.file, config.data.path = str(folder / "sums.py"), str(folder / "sums.txt")
    config.update_from_flattened_dict(fields)
    return load_task(config_module.validate(config))


def test_the_file_is_short_and_judges_as_it_says(folder):
    assert len(CODE.splitlines()) <= 60
    task = task_of(folder)
    splits = task.splits(folder / "data")
    assert {type(task).__name__, task.name} == {"Sums", "sums"} and len(splits.train) == 36
    for record in splits.validation:
        right = task.parse(task.answer(record), record)
        assert task.score(right, record) == {"useful": 1.0, "distance": 0.0}
        assert not task.parse(task.prompt(record), record).ok


def test_it_runs_to_the_report(folder):
    flags = [f for f in NO_LAMBDA if "synthetic" not in f and "max_response" not in f]
    flags += [f"--config.task.file={folder}/sums.py", f"--config.data.path={folder}/sums.txt"]
    ended = run_main(folder / "run", *flags, "--config.task.max_response=8", "--config.opd.lambdas=1.0,")
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stderr.count("task sums: defines no truncate (sft.teacher.noise)") == 1
    records = json.loads((folder / "run" / "results.json").read_text())
    assert {r["stage"] for r in records} == {"sft_teacher", "sft_student", "forecast", "opd"}
    for record in records:
        assert record["failures"].keys() == {"ok", "no_number"} and sum(record["failures"].values()) == 6
        assert list(record["counted"]) == ["parse", "useful", "distance"] and "ndcg@1" not in record
    page = (folder / "run" / "report.html").read_text()
    assert "the share of right sums" in page and "distance" in page
    assert "NDCG" not in page and "K−1" not in page, "nothing of reviews"


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("absent.py", None, "absent.py: no such file"),
        ("task.txt", CODE, "must end in .py"),
        ("task.py", "x = 1", "one class of it must be a Task, found none"),
        ("task.py", CODE + "\n\nclass Other(Sums):\n    pass\n", "found Other, Sums; keep one"),
        ("task.py", CODE.replace("    def parse(", "    def prase("), "Sums lacks parse; define it"),
        ("task.py", "def f(:", "task.py:1: SyntaxError"),
        ("task.py", "import json\n\n1 / 0", "task.py:3: ZeroDivisionError: division by zero; correct"),
        ("task.py", "import no_such_module", "task.py:1: ModuleNotFoundError"),
    ],
)
def test_a_file_that_defines_no_task_is_one_line(tmp_path, name, code, says):
    if code is not None:
        (tmp_path / name).write_text(code)
    with pytest.raises(UserError) as error:
        task_in(tmp_path / name)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_mistakes_in_its_data_are_one_line(folder):
    (folder / "sums.txt").write_text("1+1\n1+x\n")
    with pytest.raises(UserError, match=r"sums.txt:2: '1\+x' is no sum"):
        task_of(folder).splits(folder / "data")
    with pytest.raises(UserError, match="data.path=.*: is a folder"):
        task_of(folder, **{"data.path": str(folder)}).splits(folder / "data")
    with pytest.raises(UserError, match="data.path is empty: task .*sums.py' needs a file"):
        task_of(folder, **{"data.path": ""})


def test_the_config_names_every_task_that_is_shipped():
    assert set(config_module.TASKS) == TASKS.keys()
