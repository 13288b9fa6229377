"""docs/bring_your_own.md: its task is short, does what it says, and runs from its file to the report."""

import json
import pathlib
import re

import pytest
from processes import NO_LAMBDA, run_main

from listopd_jax import config as config_module
from listopd_jax.errors import UserError
from listopd_jax.stages.prepare import open_job
from listopd_jax.stages.task_check import check_task
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


def test_a_mistake_has_its_line_where_the_config_names_the_file_from_here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    pathlib.Path("bad.py").write_text("\n1 / 0\n")
    with pytest.raises(UserError, match="bad.py:2: ZeroDivisionError"):
        task_in(pathlib.Path("bad.py"))
    text = CODE.replace("if not found:", "if line.bogus:")
    pathlib.Path("sums.py").write_text(text)
    number = next(i for i, line in enumerate(text.splitlines(), 1) if "bogus" in line)
    config = config_module.defaults()
    config.task.file, config.data.path = "sums.py", "sums.txt"
    with pytest.raises(UserError, match=f"sums.py:{number}: AttributeError"):
        open_job(config_module.validate(config), folder / "run")


def test_mistakes_in_its_data_are_one_line(folder):
    (folder / "sums.txt").write_text("1+1\n1+x\n")
    with pytest.raises(UserError, match=r"sums.txt:2: '1\+x' is not a sum"):
        task_of(folder).splits(folder / "data")
    with pytest.raises(UserError, match="data.path=.*: is a folder"):
        task_of(folder, **{"data.path": str(folder)}).splits(folder / "data")
    with pytest.raises(UserError, match="data.path is empty: task 'sums' needs a file"):
        task_of(folder, **{"data.path": ""}).splits(folder / "data")


NO_FILE = """
from types import SimpleNamespace

from listopd_jax.task.contract import Parsed
from listopd_jax.task.protocol import Splits, Task


class Doubles(Task):
    def splits(self, folder):
        records = [SimpleNamespace(key=str(i), number=i) for i in range(20)]
        return Splits(records[4:], records[:4], {"fingerprint": "doubles", "notes": []})

    def prompt(self, record):
        return f"{record.number}\\n"

    def answer(self, record):
        return str(2 * record.number)

    def parse(self, text, record):
        return Parsed("ok", int(text)) if text.isdecimal() else Parsed("no_number")

    def score(self, parsed, record):
        return {"useful": float(parsed.value == 2 * record.number)}
"""


def test_a_task_that_reads_no_file_needs_none(tmp_path):
    (tmp_path / "doubles.py").write_text(NO_FILE)
    config = config_module.defaults()
    config.task.file = str(tmp_path / "doubles.py")
    job = open_job(config_module.validate(config), tmp_path / "run")
    assert len(job.validation.prompts) == 4 and job.task.answer(job.records["train"][0]) == "8"


def test_a_corruption_that_fails_later_has_its_line_too(tmp_path):
    fails = """
    def one_more(self, record, rng):
        if record.number > 4:
            raise ValueError("mine")
        return "1"

    corruptions = property(lambda self: {"one_more": self.one_more})
"""
    (tmp_path / "doubles.py").write_text(NO_FILE + fails)
    config = config_module.defaults()
    config.task.file, config.sft.teacher.noise = str(tmp_path / "doubles.py"), "one_more:1.0"
    job = open_job(config_module.validate(config), tmp_path / "run")
    number = (NO_FILE + fails).splitlines().index('            raise ValueError("mine")') + 1
    with pytest.raises(UserError, match=f"doubles.py:{number}: ValueError: mine; correct the task file"):
        next(iter(job.sft_batches("teacher")))


def test_the_config_names_every_task_that_is_shipped():
    assert set(config_module.TASKS) == TASKS.keys()


BROKEN = [  # what is written instead, and what is said of it
    ('metrics = ("useful", "distance")', 'metrics = "useful"', "metrics is 'useful'; write a tuple of"),
    ('metrics = ("useful", "distance")', 'metrics = ("useful", 3)', "metrics is ('useful', 3); write a tuple"),
    ('metrics = ("useful", "distance")', 'metrics = ("distance",)', "metrics lacks 'useful', by which"),
    ('"distance")', '"distance", "steps")', "metrics has 'steps', which every record has already; call it"),
    ('"distance")', '"distance", "run")', "metrics has 'run', which every record"),
    ('"distance")', '"distance", "lambda")', "metrics has 'lambda'"),
    ('"distance")', '"distance", "ms_per_token")', "metrics has 'ms_per_token'"),
    ('"distance")', '"distance", "weights")', "metrics has 'weights'"),
    ('"distance")', '"distance")\n    settings = {"seed": 1}', "settings has 'seed'"),
    ('failures = ("ok", "no_number")', 'failures = "ok"', "failures is 'ok'; write a tuple"),
    ('"distance": float', '"distanse": float', "'distanse', which metrics lacks; did you mean 'distance'? add it"),
    ("float(distance)}", "None}", "score of its answer has 'distance': None, which is not a finite number"),
    ("float(distance)}", '"x"}', "score of its answer has 'distance': 'x', which is not a finite"),
    ("float(distance)}", "float('inf')}", "score of its answer has 'distance': inf, which is not a finite"),
    ('return {"useful": 0.0}', "return None", "score of an empty text is None; return a dict, metric → number"),
    ('return {"useful": 0.0}', "return parsed.what", "AttributeError: 'Parsed' object has no attr"),
    ("if not parsed.ok:", "if parsed.failure == 'x':", "TypeError: unsupported operand"),
    ('else Parsed("no_number")', "else None", "parse of an empty text gives None; return Parsed('ok', value)"),
    ('return f"={record.a + record.b}"', "return record.a + record.b", "answer is 96; return a text"),
    ('return f"={record.a + record.b}"', 'return 3 if record.key.endswith(":7") else "=1"', "sums.txt:7: answer is 3;"),
    ('"distance")', '"distance")\n    token_classes = lambda self, pieces: [1]', "of 4 pieces gives [1]; return"),
    ('"distance")', '"distance")\n    token_classes = lambda self, pieces: [10] * len(pieces)', "gives [10, 10,"),
    ('"distance")', '"distance")\n    token_classes = lambda self, pieces: [True] * len(pieces)', "gives [True, True"),
    ('"distance")', '"distance")\n    token_classes = lambda self, pieces: None', "gives None; return one index"),
    ('"distance")', '"distance")\n    token_classes = lambda self, pieces: [0.5] * len(pieces)', "gives [0.5, 0.5"),
    ('"distance")', '"distance")\n    hint = lambda self, records: None', "hint is None; return a text"),
    ('"distance")', '"distance")\n    group = lambda self, record: [1]', "sums.txt:1: group is [1]; return a text"),
    ('"distance")', '"distance")\n    group = lambda self, record: ([1],)', "group is ([1],); return"),
    ('"distance")', '"distance")\n    side = lambda self, record: "foo"', "sums.txt:1: side is 'foo'; return 'train'"),
    ('"distance")', '"distance")\n    side = lambda self, r: "train" if r.a > 50 else None', "side is None; return"),
    ('"distance")', '"distance")\n    settings = None', "settings is None; write a dict"),
    ("float(distance)}", "10**5000}", "score of its answer has 'distance': beyond float64"),
    ('return f"={record.a + record.b + rng.randint(1, 9)}"', "raise ValueError('mine')", "ValueError: mine; correct"),
    ('return f"={record.a + record.b + rng.randint(1, 9)}"', "pass", "corruption 'one_more' is None; return"),
    ('f"{path.name}:{number}", int', "number, int", "task sums: the key of a record is 1; give each record"),
    ("    key: str", "    name: str", "task sums: the key of a record is None; give each"),
    ('yield Sum(f"{path.name}:{number}", int(found[1]), int(found[2]))', "pass", "read gives no records; return"),
    ("if not found:", "if line.bogus:", "AttributeError: 'str' object has no attr"),
    ('return f"{record.a}+{record.b}\\n"', "return record.c", "AttributeError: 'Sum' object has no"),
    ("class Sums(FileTask):", "class Sums(FileTask):\n    def __init__(self):\n        pass\n", "TypeError: Sums"),
    (
        "class Sums(FileTask):",
        "class Sums(FileTask):\n    def __init__(self, data, options):\n        pass\n",
        "Sums.__init__ must call super().__init__(data, options)",
    ),
    ("class Sums(FileTask):", "raise SystemExit(3)\n\n\nclass Sums(FileTask):", "SystemExit: 3; correct the task"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "instead", "says"), BROKEN)
def test_a_task_that_breaks_the_protocol_is_one_line_before_anything_is_trained(folder, part, instead, says):
    assert CODE.count(part) == 1
    (folder / "sums.py").write_text(CODE.replace(part, instead))
    config = config_module.defaults()
    config.task.file, config.data.path = str(folder / "sums.py"), str(folder / "sums.txt")
    config.sft.teacher.noise = "one_more:0.5"
    with pytest.raises(UserError) as error:
        open_job(config_module.validate(config), folder / "run")
    line = str(error.value)
    assert says in line and ("sums.py" in line or "task sums" in line) and "\n" not in line
    assert not (folder / "run" / "tokenizer").exists()


@pytest.mark.parametrize("written", [None, {"c": 3}, {3: str}, ["one_more"]])
def test_corruptions_are_functions_by_name(folder, written):
    task = task_of(folder)
    task.corruptions = written
    config = config_module.defaults()
    config.task.file = str(folder / "sums.py")
    with pytest.raises(UserError, match="corruptions is .*; write a dict as in {'one_more': self.one_more}"):
        check_task(task, task.splits(folder / "data"), config)


def test_noise_is_tried_on_training_records_alone(folder):
    task = task_of(folder)
    splits, tried = task.splits(folder / "data"), []
    config = config_module.defaults()
    config.task.file, config.sft.teacher.noise = str(folder / "sums.py"), "one_more:0.5"
    task.corruptions = {"one_more": lambda record, rng: tried.append(record) or "=1"}
    check_task(task, splits, config)
    assert tried and all(record in splits.train for record in tried)
