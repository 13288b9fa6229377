"""Weights & Biases (offline) and trackio are told what the logs hold; without their extras nothing changes."""

import json
import os
import sqlite3
import subprocess
import sys
import types

import pytest
from processes import REPO

from listopd_jax import config as config_module
from listopd_jax import main
from listopd_jax.config import defaults, validate
from listopd_jax.errors import UserError
from listopd_jax.metrics_log import COMPLETIONS, MetricsLog, read_metrics
from listopd_jax.trackers import TRACKERS, Trackers, Tracking, require

HOSTILE = "</script><script>alert(1)</script>"
TELL = """
import pathlib, sys
from listopd_jax.metrics_log import MetricsLog
from listopd_jax.trackers import Trackers, Tracking
workdir, tracking = pathlib.Path(sys.argv[2]), Tracking((sys.argv[1],), "proj", {"opd": {"lr": 0.125}})
for start, end in ((0, 4), (2, 6)):  # killed after step 4, resumed from the checkpoint of step 2
    with MetricsLog(workdir, "opd_lambda1.2_seed0", "opd", {"lambda": 1.2, "seed": 0}, start, tracking) as log:
        for step in range(start + 1, end + 1):
            log.log(step, {"loss": 1 / step})
            log.completions(step, [{"failure": "no_json", "output": sys.argv[3], "prompt": "Rank"}] * (step == 3))
with Trackers(tracking, workdir, "report", resumed=True) as told:
    told.table(None, "results", [{"run": "opd_lambda1.2_seed0", "parse": 0.5}])
    told.page("report", workdir / "report.html")
"""


def tell(tracker, workdir):
    """A run that is killed and resumed, and its report, told to `tracker`, in a process and a home of its own."""
    pytest.importorskip(tracker, reason=f"needs the extra {tracker}")
    workdir.mkdir()
    (workdir / "report.html").write_text("<!doctype html><p>the report</p>")
    own = {"HOME": str(workdir), "WANDB_MODE": "offline", "TRACKIO_DIR": str(workdir / "trackio")}
    command = [sys.executable, "-c", TELL, tracker, str(workdir), HOSTILE]
    environment = os.environ | own | {"PYTHONPATH": str(REPO)}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "report" not in ended.stdout  # which is the job's
    return workdir


@pytest.mark.slow
def test_wandb_offline_keeps_tables_and_the_report_in_the_workdir(tmp_path):
    workdir = tell("wandb", tmp_path / "run")
    runs = sorted((workdir / "wandb").glob("offline-run-*"))
    made = json.loads((workdir / "track.json").read_text())["id"]
    # wandb adds "-1" to the folder of a run that is resumed within the second
    names = [run.name.split("-", 3)[-1].removesuffix("-1") for run in runs]
    assert sorted(names) == sorted([f"{made}-opd_lambda1.2_seed0"] * 2 + [f"{made}-report"])
    tables = [json.loads(path.read_text()) for path in workdir.rglob("*.table.json")]
    completions = [t for t in tables if t["columns"] == ["step", "failure", "output", "prompt"]]
    assert completions and all(t["data"] == [[3, "no_json", HOSTILE, "Rank"]] for t in completions)
    assert [t["data"] for t in tables if t["columns"] == ["run", "parse"]] == [[["opd_lambda1.2_seed0", 0.5]]]
    assert [path.read_text() for path in workdir.rglob("media/html/*.html")] == [
        "<!doctype html><p>the report</p>"
    ]
    stored = b"".join(path.read_bytes() for path in workdir.rglob("*.wandb"))
    assert b"0.125" in stored and b"loss" in stored


@pytest.mark.slow
def test_trackio_keeps_every_row_and_goes_on_with_a_resumed_run(tmp_path):
    workdir = tell("trackio", tmp_path / "run")
    rows = sqlite3.connect(workdir / "trackio" / "proj.db").execute(
        "select run_name, step, metrics from metrics"
    )
    told = [(name, step, json.loads(metrics)) for name, step, metrics in rows]
    made = json.loads((workdir / "track.json").read_text())["id"]
    assert {name for name, *_ in told} == {f"opd_lambda1.2_seed0-{made}", f"report-{made}"}
    assert {step: row["loss"] for _, step, row in told if "loss" in row} == {n: 1 / n for n in range(1, 7)}
    assert HOSTILE in json.dumps([row for *_, row in told])
    assert any("results" in row for *_, row in told) and any("report" in row for *_, row in told)


def test_nobody_is_told_by_default(tmp_path):
    config = validate(defaults())
    assert config.track.to == ()
    with MetricsLog(tmp_path, "a", "opd") as log:
        log.log(1, {"loss": 1.0})
    assert not (tmp_path / "track.json").exists()


def test_a_missing_extra_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in TRACKERS:
        with pytest.raises(UserError, match=rf"^track.to={name}: .*pip install 'listopd_jax\[{name}\]'$"):
            require([name])
        with (
            pytest.raises(UserError, match="not installed"),
            Trackers(Tracking((name,), "p"), tmp_path, "a"),
        ):
            pass


def test_a_job_without_the_extra_that_it_asks_for_stops_before_it_begins(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = defaults()
    config.track.to = ("trackio",)
    with pytest.raises(UserError, match="^track.to=trackio"):
        main.run(validate(config), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "said"), [("wandv", "did you mean 'wandb'"), ("", "known: wandb, trackio")])
def test_an_unknown_tracker_is_one_clear_line(name, said):
    config = defaults()
    config.track.to = (name,)
    with pytest.raises(UserError, match=said):
        validate(config)


def test_a_tracker_that_refuses_is_one_clear_line(monkeypatch, tmp_path):
    def refuse(**_):
        raise RuntimeError("no API key\nrun `wandb login`")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    with pytest.raises(UserError, match=r"^track.to=wandb: no API key; WANDB_MODE=offline"):
        Trackers(Tracking(("wandb",), "p"), tmp_path, "a").__enter__()


def test_trackers_may_change_between_calls_on_one_workdir():
    before = config_module.to_json(validate(defaults()))
    config = defaults()
    config.track.update(to=("trackio",), log_completions_every=3)
    assert config_module.changed_field(before, config_module.to_json(validate(config))) is None


def write(workdir, steps, resume_step=0):
    with MetricsLog(workdir, "a", "opd", {"lambda": 1.2, "seed": 0}, resume_step) as log:
        for step in steps:
            log.completions(step, [{"failure": "ok", "output": f"{step} \ud800", "prompt": ""}])


def test_completions_of_a_killed_run_are_those_of_an_uninterrupted_one(tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    write(tmp_path / "whole", range(1, 8))
    write(tmp_path / "killed", range(1, 6))
    with (tmp_path / "killed" / COMPLETIONS).open("a") as file:
        file.write('{"run": "a", "step": 6, "out')
    write(tmp_path / "killed", range(4, 8), resume_step=3)
    whole, killed = ((tmp_path / name / COMPLETIONS).read_bytes() for name in ("whole", "killed"))
    assert whole == killed


@pytest.mark.slow
def test_the_job_logs_completions_with_their_failure_class(finished_job):
    rows = read_metrics(finished_job, COMPLETIONS)
    assert {row["run"] for row in rows} == {"opd_lambda1.0_seed0", "opd_lambda2.0_seed0"}
    assert {row["step"] for row in rows} == {2} and len(rows) == 2 * 3
    assert all(row["prompt"].startswith("Product:") and row["failure"] for row in rows)
