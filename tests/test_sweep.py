"""opd.sweep: options at several values in one run. Each point trains as a run of its own would."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
from processes import REPO
from test_plain_lambdas import settings
from test_report import Page

from launch.grid import open_grid
from listopd_jax import config as config_module
from listopd_jax.config import at_point, sweep_labels
from listopd_jax.errors import UserError
from listopd_jax.export import export
from listopd_jax.metrics_log import read_metrics
from listopd_jax.models.hf import load_hf
from listopd_jax.records import RESULTS, RUNS, read_results, read_runs
from listopd_jax.report.inputs import read_inputs
from listopd_jax.report.write import render, write_report
from listopd_jax.stages import opd as opd_stage
from listopd_jax.stages.opd import program_options
from listopd_jax.stages.pipeline import run_stages

POINTS = ["clip=1.5 ratio=teacher_student", "clip=inf ratio=none"]
ZIP = "clip/ratio=1.5/teacher_student|inf/none"
PLAIN = {
    "opd.plain_lambdas": (),
    "opd.estimator": "sampled",
    "opd.guard.margin": 0.0,
    "opd.guard.fallback": "teacher",
    "opd.guard.scope": "all",
}


def swept(sweep, **fields):
    return settings(**PLAIN | {"opd.sweep": sweep} | fields)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A workdir of two points, and the one of a run without a sweep that has the options of the first."""
    folder, alone = (tmp_path_factory.mktemp(name) for name in ("sweep", "alone"))
    (folder / "config.json").write_text(json.dumps({"config": config_module.to_json(swept(ZIP))}))
    run_stages(swept(ZIP), folder)
    run_stages(settings(**PLAIN | {"opd.clip": 1.5, "opd.ratio": "teacher_student"}), alone)
    write_report(folder)
    return folder, alone


def distilled(workdir):
    return [r for r in read_results(workdir / RESULTS) if r.stage == "opd"]


@pytest.mark.parametrize(
    ("sweep", "labels"),
    [
        ("", [""]),
        ("clip=1.5", ["clip=1.5"]),
        (" clip = 1.50 | inf , guard.margin=1|1.25", [
            "clip=1.5 guard.margin=1.0", "clip=1.5 guard.margin=1.25",
            "clip=inf guard.margin=1.0", "clip=inf guard.margin=1.25",
        ]),
        ("clip/lr=1.5/1e-5|5/1e-6, normalize=True|False", [
            "clip=1.5 lr=1e-05 normalize=True", "clip=1.5 lr=1e-05 normalize=False",
            "clip=5.0 lr=1e-06 normalize=True", "clip=5.0 lr=1e-06 normalize=False",
        ]),
        ("lambdas/seeds=1.2/7|1.5/8", ["lambdas=1.2 seeds=7", "lambdas=1.5 seeds=8"]),
    ],
)  # fmt: skip
def test_the_points_of_a_sweep_in_their_order(sweep, labels):
    config = config_module.defaults()
    config.opd.sweep = sweep
    assert sweep_labels(config.opd) == labels


def test_a_point_has_its_options_and_the_rest_of_the_config():
    before = swept(ZIP).to_dict()
    at = at_point(swept(ZIP), "clip=inf seeds=3 guard.margin=1.5 updates_per_batch=2").to_dict()
    changed = {"clip": math.inf, "seeds": (3,), "updates_per_batch": 2, "sweep": ""}
    guard = before["opd"]["guard"] | {"margin": 1.5}
    assert at == before | {"opd": before["opd"] | changed | {"guard": guard}}


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ("clp=1|2", "opd.sweep='clp' is unknown; did you mean 'clip'"),
        ("sweep=1", "opd.sweep='sweep' is unknown"),
        ("clip=a|2", "opd.sweep: clip='a' is not a value of float"),
        ("rollouts=1.5", "opd.sweep: rollouts='1.5' is not a value of int"),
        ("normalize=yes", "opd.sweep: normalize='yes' is not a value of bool"),
        ("clip", "write FIELD=VALUE"),
        ("clip/lr=1.5|5", "for values that go together"),
        ("clip=1|1.0", "a point appears twice"),
        ("clip=1|2, clip=3|4", "clip is named twice"),
        (",".join(f"{name}=0.1|0.2|0.3|0.4" for name in "clip lr b2 ema kl_to_base".split()), "1024 points"),
        (
            "/".join(["collapse.length_change"] * 6) + "=" + "/".join(["0.5"] * 6),
            "longer than 120 characters|named twice",
        ),
        ("clip=2|-2", "opd.sweep, clip=-2.0: opd.clip"),
        ("ratio=none|nothing", "opd.sweep, ratio=nothing: opd.ratio='nothing' is unknown"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_point(sweep, said):
    with pytest.raises(UserError, match=said.replace("(", r"\(")) as e:
        swept(sweep)
    assert "\n" not in str(e.value)


def test_a_sweep_is_refused_where_one_curve_is_meant(tmp_path):
    with pytest.raises(UserError, match="opd.recommend is about one curve"):
        swept("clip=2|3", **{"opd.recommend": True})
    with pytest.raises(UserError, match="section predict is about one curve"):
        swept("clip=2|3", **{"predict.anchors": (1.0, 2.0)})
    for module, flags in (
        ("plan", ["--topology=cpu:1"]),
        ("prereg", ["lock", "--out=lock.json", "--threshold=1.1"]),
    ):
        command = [sys.executable, "-m", f"listopd_jax.{module}", *flags]
        command += ["--config=configs/fashion.py:tiny", "--config.opd.sweep=clip=2|3"]
        said = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False).stderr
        assert said.splitlines()[-1].startswith("error: ") and "opd.sweep" in said, said
    with pytest.raises(UserError, match="run main"):
        open_grid(tmp_path, (), swept("clip=2|3"))


def test_every_point_has_its_record_its_log_and_its_plan(job):
    folder, _ = job
    assert [(r.sweep, r.run) for r in distilled(folder)] == [
        (POINTS[0], "opd_lambda2.0_clip=1.5_ratio=teacher_student_seed0"),
        (POINTS[1], "opd_lambda2.0_clip=inf_ratio=none_seed0"),
    ]
    assert [r.sweep for r in read_runs(folder / RUNS) if r.stage == "opd"] == POINTS
    assert {row.get("sweep") for row in read_metrics(folder) if row["stage"] == "opd"} == set(POINTS)
    others = [r.to_json() for r in read_results(folder / RESULTS) if r.stage != "opd"]
    assert not any("sweep" in record for record in others)


def test_a_point_trains_as_a_run_with_its_options_does(job):
    folder, alone = job
    (one,), (first, second) = distilled(alone), distilled(folder)
    numbers = lambda run, workdir: [  # noqa: E731
        {k: v for k, v in row.items() if k not in ("run", "sweep", "tokens_per_second")}
        for row in read_metrics(workdir)
        if row["run"] == run
    ]
    assert numbers(one.run, alone) == numbers(first.run, folder) != numbers(second.run, folder)
    assert one.to_json() | {"run": ""} == {k: v for k, v in first.to_json().items() if k != "sweep"} | {
        "run": ""
    }


def test_where_only_numbers_differ_one_program_trains_all(tmp_path, monkeypatch):
    made = []
    make = opd_stage.make_opd_step
    monkeypatch.setattr(
        opd_stage, "make_opd_step", lambda *args, **kwargs: made.append(1) or make(*args, **kwargs)
    )
    numbers = "clip=1.5|5, kl_to_base=0|0.1, lr=1e-3|1e-4"
    config = swept(numbers)
    assert len({program_options(at_point(config, label).opd) for label in sweep_labels(config.opd)}) == 1
    assert len({program_options(at_point(swept(ZIP), label).opd) for label in POINTS}) == 2
    run_stages(swept("clip=1.5|5", **{"opd.steps": 1}), tmp_path)
    assert len(distilled(tmp_path)) == 2 and len(made) == 1


def test_a_sweep_that_grows_keeps_what_is_done(job, tmp_path):
    shutil.copytree(job[0], tmp_path / "grown")
    before = [r.to_json() for r in read_results(job[0] / RESULTS)]
    run_stages(swept(ZIP + "|5.0/aspo"), tmp_path / "grown")
    after = [r.to_json() for r in read_results(tmp_path / "grown" / RESULTS)]
    assert after[: len(before)] == before and [r["sweep"] for r in after[len(before) :]] == [
        "clip=5.0 ratio=aspo"
    ]


def test_what_was_trained_before_the_sweep_is_a_point_of_its_own(job, tmp_path):
    shutil.copytree(job[1], tmp_path / "run")
    run_stages(
        swept("ratio=none|aspo", **{"opd.clip": 1.5, "opd.ratio": "teacher_student"}), tmp_path / "run"
    )
    inputs = read_inputs(tmp_path / "run")
    found = {
        label: [r.sweep for r in at.results if r.stage == "opd"] for label, at in inputs.points().items()
    }
    assert found == {"no sweep": [""], "ratio=none": ["ratio=none"], "ratio=aspo": ["ratio=aspo"]}
    assert all(
        row.get("sweep", "") == "ratio=aspo"
        for row in inputs.points()["ratio=aspo"].metrics
        if row["stage"] == "opd"
    )
    beside = dataclasses.replace(inputs, beside={"other": inputs})
    text = Page(render(beside)).text
    assert "other ratio=none" in text and "other no sweep" in text


def test_a_base_in_another_dtype_starts_from_the_jobs_sft(tmp_path):
    """There the student is read from its SFT checkpoint again, which is of no point."""
    run_stages(swept("clip=1.5|2.5", **{"dtype.frozen": "bfloat16"}), tmp_path)
    assert [r.sweep for r in distilled(tmp_path)] == ["clip=1.5", "clip=2.5"]


def test_a_policy_of_a_point_is_exported_from_its_checkpoint(job, tmp_path):
    name = distilled(job[0])[1].run
    export(job[0], name, tmp_path / "out")
    shape, params = load_hf(tmp_path / "out")
    assert shape.num_layers == 1 and all(np.isfinite(x).all() for x in map(np.asarray, flat(params)))
    card = (tmp_path / "out" / "README.md").read_text()
    assert POINTS[1] in card and "| opd.ratio | none |" in card


def flat(params):
    import jax

    return jax.tree.leaves(params)


def test_the_report_is_of_the_first_point_and_has_the_others_beside_it(job):
    inputs = read_inputs(job[0])
    assert list(inputs.points()) == POINTS
    first = inputs.points()[POINTS[0]]
    assert inputs.points()[POINTS[1]].config["config"]["opd"]["clip"] == "inf", "as config.json has it"
    assert {r.sweep for r in first.results} == {"", POINTS[0]} and first.config["config"]["opd"][
        "clip"
    ] == 1.5
    text = Page((job[0] / "report.html").read_text()).text
    assert "The points of the sweep" in text and f"The other sections are of {POINTS[0]}" in text
    assert (
        f"{POINTS[1]}, plain differs in opd.clip, opd.ratio" in text
        or f"{POINTS[1]} differs in opd.clip" in text
    )
    assert render(inputs) == (job[0] / "report.html").read_text()
