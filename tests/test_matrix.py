"""The paper's experiments as configs, and their table."""

import json
import math

import pytest

from launch import matrix
from listopd_jax import config as config_module
from listopd_jax.errors import UserError

EXPERIMENTS = matrix.select()
SIZES = ("small", "middle", "large")


@pytest.mark.parametrize("scale", ["tiny", "paper"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_ablation_is_a_config_at_both_scales(name, scale):
    experiment = EXPERIMENTS[name]
    for ablation in experiment.ablations:
        config = experiment.get_config(f"{scale},{ablation}")
        config.data.path = "FILE" if experiment.on_clothing else config.data.path
        config = config_module.validate(config)
        assert (
            config.opd.lambdas == experiment.lambdas and config.opd.steps >= {"tiny": 50, "paper": 42}[scale]
        )
    assert f"configs/paper/{name}.py:tiny" in matrix.importlib.import_module(f"configs.paper.{name}").__doc__


def test_an_ablation_changes_its_field_and_unknown_ones_are_named():
    clip = EXPERIMENTS["clip"]
    assert [clip.get_config(f"tiny,{ablation}").opd.clip for ablation in clip.ablations] == [
        1.5,
        2.0,
        5.0,
        math.inf,
    ]
    assert EXPERIMENTS["budget"].get_config("paper").opd.steps == 196
    assert EXPERIMENTS["budget"].get_config("paper").opd.eval_steps == (42,)
    with pytest.raises(UserError, match="ablation"):
        clip.get_config("tiny,1.6")
    with pytest.raises(UserError, match="scale"):
        clip.get_config("tinny")
    with pytest.raises(UserError, match="experiment"):
        matrix.select("clipp")


def results(folder, curve, steps=50):
    folder.mkdir(parents=True)
    records = [
        {"stage": "opd", "lambda": lam, "seed": seed, "steps": n, "parse": parse if n == steps else 1.0}
        for lam, seeds in curve.items()
        for seed, parse in enumerate(seeds)
        for n in (steps // 2, steps)
    ]
    (folder / "results.json").write_text(json.dumps(records))


def test_the_table_has_what_is_done_and_says_what_is_open(tmp_path):
    chosen = matrix.select("no_base,clip")
    results(tmp_path / "no_base" / "plain", {lam: [0.9, 1.0] for lam in (1.0, 1.15, 1.25, 1.4)})
    page = matrix.page(tmp_path, chosen)
    assert "| no_base | plain | 1.4 | 2 | 0.950 ± 0.635 |" in page, "of the last steps alone"
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines()}
    assert rows["clip"].endswith("| open: no run at λ = 1.15; resume the matrix |")
    figures = matrix.figures(matrix.curves(tmp_path, chosen))
    assert figures[-1] == {"experiment": "no_base", "ablation": "plain", "lambda": 1.4, "parse": [0.9, 1.0]}
    assert "agrees" in page and [line for line in page.splitlines() if line.startswith("| no_base | parse")][
        0
    ].endswith("| yes |")


def test_continued_sft_is_judged_by_the_sft_student(tmp_path):
    chosen = matrix.select("continued_sft")
    for seed in (2, 3, 5):
        folder = tmp_path / "continued_sft" / f"seed{seed}"
        folder.mkdir(parents=True)
        stages = {"sft_teacher": 0.9, "sft_student": 0.01 * seed}
        records = [
            {"stage": s, "lambda": None, "seed": seed, "steps": 170, "parse": p} for s, p in stages.items()
        ]
        (folder / "results.json").write_text(json.dumps(records))
    page = matrix.page(tmp_path, chosen)
    assert "| continued_sft | seed3 | – | 1 | 0.030 |" in page and page.count("| yes |") == 1
    assert "open: no run; resume" in matrix.page(tmp_path / "nothing", chosen)
    tiny = chosen["continued_sft"].get_config("tiny,seed3")
    assert (
        tiny.sft.student.steps == EXPERIMENTS["no_base"].get_config("tiny").sft.student.steps + tiny.opd.steps
    )


def test_a_cliff_without_the_base_disagrees_with_ec(tmp_path):
    chosen = matrix.select("no_base")
    results(tmp_path / "no_base" / "plain", {1.0: [1.0], 1.15: [1.0], 1.25: [1.0], 1.4: [0.1]})
    assert "| **no** |" in matrix.page(tmp_path, chosen)


PRETENDER = """
import pathlib, sys
workdir = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir=")).partition("=")[2])
workdir.mkdir(parents=True, exist_ok=True)
with (workdir / "calls").open("a") as f:
    f.write(" ".join(sys.argv[1:]) + chr(10))
(workdir / "report.html").write_text("done")
"""


def test_models_are_trained_once_and_what_is_done_stays(tmp_path):
    program = tmp_path / "pretender.py"
    program.write_text(PRETENDER)
    root, chosen = tmp_path / "root", matrix.select("temperature,no_base")
    for _ in range(2):
        assert matrix.run(root, chosen, program=[str(program)]) == 0
    calls = {path.parent.relative_to(root).as_posix(): path.read_text() for path in root.rglob("calls")}
    assert sorted(calls) == ["models", "no_base/plain", "temperature/0.5", "temperature/1"]
    assert all(text.count("\n") == 1 for text in calls.values())
    assert f"--config.teacher.weights={root}/models/export/sft_teacher" in calls["temperature/1"]
    assert "--config=configs/paper/temperature.py:tiny,0.5" in calls["temperature/0.5"]


def given(root, name, ablation="", clothing=""):
    """The config fields that the matrix gives an ablation of experiment `name`, the first where none is named."""
    chosen = {name: EXPERIMENTS[name]}
    found = {a.name: a for a in matrix.ablations(chosen)}
    flags = matrix._arguments(
        root, found.get(ablation, next(iter(found.values()))), EXPERIMENTS[name], clothing
    )
    return {k.removeprefix("--config."): v for k, _, v in (flag.partition("=") for flag in flags)}


def test_an_ablation_may_train_a_model_of_its_own_or_have_another_teacher(tmp_path):
    export = f"{tmp_path}/models/export"
    names = ("no_base", "size", "teacher_size", "self_distillation")
    plain, size, larger, itself = (given(tmp_path, name) for name in names)
    weights = {f"{role}.weights": f"{export}/sft_{role}" for role in ("teacher", "student")}
    assert weights.items() <= plain.items() and plain["sft.student.steps"] == "0"
    assert "student.weights" not in size and "sft.student.steps" not in size and "teacher.weights" in size
    assert "teacher.weights" not in larger and "student.weights" in larger
    assert itself["teacher.weights"] == itself["student.weights"] == f"{export}/sft_student"
    assert all("tokenizer.path" in flags for flags in (plain, size, larger, itself))


def test_a_teacher_may_be_trained_further_and_what_it_was_be_the_reference(tmp_path):
    export = f"{tmp_path}/models/export"
    base, before = (given(tmp_path, "reference", ablation) for ablation in ("base", "before"))
    assert before.pop("reference.weights") == f"{export}/sft_teacher"
    assert before.keys() == base.keys() and base["teacher.weights"] == f"{export}/sft_teacher"
    assert "sft.teacher.steps" not in base and base["sft.student.steps"] == "0"


def test_real_reviews_are_run_where_their_file_is_given(tmp_path):
    program = tmp_path / "pretender.py"
    program.write_text(PRETENDER)
    root, chosen = tmp_path / "root", matrix.select("second_category")
    assert matrix.run(root, chosen, program=[str(program)]) == 0 and not (root / "second_category").exists()
    assert matrix.run(root, chosen, "reviews.zip", program=[str(program)]) == 0
    calls = (root / "second_category" / "other" / "calls").read_text()
    assert "--config.data.path=reviews.zip" in calls and "weights" not in calls
    assert not (root / "models").exists(), "no ablation reads them"
    config = chosen["second_category"].get_config("tiny,other")
    assert (config.data.category, config.data.validation_category) == ("Tops", "Dresses")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--only=second_category"], "--clothing=FILE is missing: second_category"),
        (["--clothing=absent.zip"], "--clothing=absent.zip: no such file"),
    ],
)
def test_the_file_of_real_reviews_is_asked_for_before_anything_is_trained(tmp_path, flags, says):
    with pytest.raises(UserError, match=says):
        matrix.main([f"--root={tmp_path}/root", f"--out={tmp_path}/matrix.md", *flags])
    assert not list(tmp_path.iterdir())


def test_sizes_are_those_of_their_names():
    from configs.paper import size, teacher_size

    assert [size.get_config(f"tiny,{ablation}").student.num_layers for ablation in SIZES] == [1, 2, 4]
    assert [teacher_size.get_config(f"tiny,{ablation}").teacher.num_layers for ablation in SIZES] == [1, 3, 5]
    assert size.get_config("paper,small").student.weights == "Qwen/Qwen3-0.6B"
    assert teacher_size.get_config("paper").teacher.weights == "Qwen/Qwen3-1.7B"


@pytest.mark.parametrize("stops", ["models", "1"])
def test_a_job_that_stops_before_its_end_is_not_done(tmp_path, stops):
    """Who is told to stop saves, and exits with 0."""
    program, root = tmp_path / "pretender.py", tmp_path / "root"
    program.write_text(
        PRETENDER.replace('(workdir / "report', f'workdir.name == "{stops}" or (workdir / "report')
    )
    assert matrix.run(root, matrix.select("temperature"), program=[str(program)]) == 1
    assert (root / "temperature" / "0.5").exists() == (stops != "models"), "no ablation without its models"
