"""The main job as a user runs it: from the command line, with mistakes, killed and started again."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from listopd_jax.stages.pipeline import most_useful
from listopd_jax.train.loop import Run

REPO = pathlib.Path(__file__).resolve().parents[1]
SMALL = (
    "--config.data.synthetic.products=12 --config.data.validation_share=0.25 "
    "--config.evaluation.max_lists=6 --config.evaluation.batch_size=6 "
    "--config.evaluation.bootstrap=50 --config.sft.teacher.steps=4 --config.sft.student.steps=3 "
    "--config.sft.teacher.batch_size=4 --config.sft.student.batch_size=4 --config.opd.batch_size=4 "
    "--config.opd.steps=3 --config.opd.eval_steps=2, --config.opd.lambdas=1.0,2.0 --config.train.checkpoint_every=1 "
    "--config.task.max_response=64 --config.forecast.lambdas=1.5"
).split()


def command(workdir, *more):
    return [
        sys.executable, "-m", "listopd_jax.main", "--config=configs/fashion.py:tiny", f"--workdir={workdir}", *more,
    ]  # fmt: skip


def run(workdir, *more):
    return subprocess.run(command(workdir, *more), cwd=REPO, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run, never interrupted."""
    workdir = tmp_path_factory.mktemp("job") / "whole"
    result = run(workdir, *SMALL)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == f"report: {workdir}/report.html"
    return workdir


def metrics(workdir):
    """Every row of metrics.jsonl but what depends on the clock."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def results(workdir):
    return json.loads((workdir / "results.json").read_text())


def test_every_policy_has_a_whole_record(finished):
    records = results(finished)
    forecasts = [("forecast", lam, 0) for lam in (1.0, 1.5, 2.0)]
    wanted = [
        ("sft_teacher", None, 4),
        ("sft_student", None, 3),
        *forecasts,
        *(("opd", lam, steps) for lam in (1.0, 2.0) for steps in (2, 3)),
    ]
    assert [(r["stage"], r["lambda"], r["steps"]) for r in records] == wanted
    keys = {
        "seed",
        "n",
        "parse",
        "failures",
        "ndcg@1",
        "ndcg@3",
        "ndcg@5",
        "ndcg@10",
        "tau",
        "mae",
        "useful",
        "intervals",
    }
    for r in records:
        assert keys <= r.keys()
        assert r["n"] == 6 == sum(r["failures"].values())
        assert r["parse"] == pytest.approx(r["failures"]["ok"] / 6)


def test_every_step_is_logged_with_every_metric(finished):
    opd = [row for row in metrics(finished) if row["stage"] == "opd"]
    assert [(row["lambda"], row["step"]) for row in opd] == [
        (lam, s) for lam in (1.0, 2.0) for s in (1, 2, 3)
    ]
    wanted = {
        "loss", "advantage_mean", "advantage_structural", "advantage_content", "ratio_max", "clip_fraction",
        "reverse_kl", "entropy", "completion_length", "parse", "grad_norm", "sampler_trainer_gap",
    }  # fmt: skip
    assert all(wanted <= row.keys() for row in opd)
    assert all(row["sampler_trainer_gap"] < 1e-4 for row in opd)


def test_the_run_says_what_it_was(finished):
    saved = json.loads((finished / "config.json").read_text())
    assert saved["config"]["task"]["k"] == 4 and saved["preset"] == "tiny"
    assert saved["revision"] and saved["command"].startswith("python -m listopd_jax.main --config=")
    assert (finished / "tensorboard" / "sft_teacher").is_dir()


def test_exports_load_in_transformers(finished):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(finished / "export" / "opd_lambda1.0_seed0")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "export" / "opd_lambda1.0_seed0")
    assert model.config.vocab_size == len(tokenizer)


def test_running_again_changes_nothing(finished):
    before = {
        name: (finished / name).read_bytes() for name in ("results.json", "metrics.jsonl", "report.html")
    }
    first = json.loads((finished / "config.json").read_text())
    assert run(finished, *SMALL).returncode == 0
    assert before == {name: (finished / name).read_bytes() for name in before}
    again = json.loads((finished / "config.json").read_text())
    resumed = again.pop("resumed")
    assert resumed[-1].keys() == {"command", "revision", "device", "versions"}
    assert len(resumed) == len(first.pop("resumed", [])) + 1
    assert again == first  # the command and revision of the first call stay


def test_the_grid_may_grow_and_what_is_done_stays(finished, tmp_path):
    workdir = tmp_path / "grown"
    shutil.copytree(finished, workdir)
    result = run(workdir, *(arg.replace("lambdas=1.0,2.0", "lambdas=1.0,1.5,2.0") for arg in SMALL))
    assert result.returncode == 0, result.stderr[-2000:]
    before, after = results(finished), results(workdir)
    assert after[: len(before)] == before
    assert [(r["stage"], r["lambda"]) for r in after[len(before) :]] == [("opd", 1.5)] * 2


def test_the_most_useful_budget_is_known(finished, tmp_path):
    """Its checkpoint is kept while the run goes on."""
    runs = [Run("opd_lambda1.0_seed0", "opd", 1.0, 0, steps) for steps in (1, 2, 3)]
    assert most_useful(tmp_path, runs) is None
    useful = {2: 0.25, 3: 0.2}
    records = [r | {"useful": useful[r["steps"]]} for r in results(finished) if r["run"] == runs[0].name]
    (tmp_path / "results.json").write_text(json.dumps(records))
    assert most_useful(tmp_path, runs) == 2
    assert most_useful(tmp_path, runs[2:]) == 3


def test_another_config_in_the_same_workdir_is_refused(finished):
    result = run(finished, *SMALL, "--config.opd.clip=3")
    assert result.returncode == 2
    assert "opd.clip=5.0, not 3.0" in result.stderr and "Traceback" not in result.stderr


def test_a_workdir_without_results_takes_another_config(tmp_path):
    wrong = run(tmp_path / "job", *SMALL, "--config.data.source=clothing", "--config.data.path=absent.zip")
    assert wrong.returncode == 2 and "absent.zip: no such file" in wrong.stderr
    again = run(tmp_path / "job", *SMALL, "--config.data.source=clothing", "--config.data.path=other.zip")
    assert again.returncode == 2 and "other.zip: no such file" in again.stderr


@pytest.mark.slow
def test_killed_at_any_moment_the_job_ends_with_the_same_metrics(finished, tmp_path):
    workdir, delays = tmp_path / "killed", [8.0, 14.0, 20.0, 26.0]
    for delay in delays:
        process = subprocess.Popen(
            command(workdir, *SMALL), cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert run(workdir, *SMALL).returncode == 0
    assert metrics(workdir) == metrics(finished)
    assert results(workdir) == results(finished)


def terminated(workdir, seen, says, times=1):
    """SIGTERM when the job's stderr has `seen`; it exits with 0 and says so in its last line."""
    with (workdir.parent / "log").open("w+") as log:
        process = subprocess.Popen(command(workdir, *SMALL), cwd=REPO, stdout=subprocess.DEVNULL, stderr=log)
        while seen not in pathlib.Path(log.name).read_text() and process.poll() is None:
            time.sleep(0.01)
        for _ in range(times):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        code, text = process.wait(60), pathlib.Path(log.name).read_text()
    assert code == 0 and says in text.splitlines()[-1] and "Traceback" not in text, text[-2000:]


@pytest.mark.slow
def test_sigterm_in_training_and_in_evaluation_exits_with_0_and_loses_nothing(finished, tmp_path):
    workdir = tmp_path / "job"
    terminated(workdir, "sft_teacher:   0%", "sft_teacher: saved at step ")
    terminated(workdir, "sft_student evaluated:   0%", "stopped; the same command goes on", times=3)
    terminated(workdir, "opd_lambda1.0_seed0:   0%", "opd_lambda1.0_seed0: saved at step ", times=3)
    assert run(workdir, *SMALL).returncode == 0
    assert metrics(workdir) == metrics(finished)
    assert results(workdir) == results(finished)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config.opd.lamdas=1.0"], "did you mean lambdas?"),
        (["--config.opd.steps=many"], "--config.opd.steps=many"),
        (["--config.opd.lambdas=1.0,x"], "every lambda is a number"),
        (["--config.opd.ratio=teacher"], "opd.ratio='teacher' is unknown; did you mean 'teacher_student'?"),
        (["--config.attention=splash"], "attention='splash' needs a TPU, not a cpu"),
        (["--config.opd.clip=1.0"], "opd.clip=1.0: the clip c must be > 1"),
        (["--config.opd.estimator=full_vocab"], "set opd.ratio='none'"),
        (["--config.opd.microbatch=7"], "opd.microbatch=7 must divide opd.batch_size"),
        (["--config.data.source=clothing"], "data.path is empty"),
        (["--config.data.source=clothing", "--config.data.path=absent.zip"], "absent.zip: no such file"),
        (["--config.student.num_kv_heads=3"], "num_heads=4 must be a multiple of num_kv_heads=3"),
        (["--config.student.weights=absent/folder/here"], "tokenizer.path is empty"),
        (["extra"], "'extra' is not a flag"),
        (["--config.preset=paper"], "the preset is chosen by"),
        (["--config.opd.seeds=9999999999"], "in [0, 2^32)"),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(tmp_path, arguments, says):
    result = run(tmp_path / "job", *arguments)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if not line.startswith("preset ")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and says in errors[0], result.stderr
    assert not (tmp_path / "job" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [("configs/fashion.py:tinny", "did you mean 'tiny'?"), ("configs/fashon.py", "fashon.py")],
)
def test_a_wrong_preset_or_file_is_one_clear_line(tmp_path, config, says):
    arguments = [sys.executable, "-m", "listopd_jax.main", f"--config={config}", f"--workdir={tmp_path}/job"]
    result = subprocess.run(arguments, cwd=REPO, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and says in result.stderr


def test_auto_is_tiny_on_a_cpu(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    arguments = [
        sys.executable,
        "-m",
        "listopd_jax.main",
        "--config=configs/fashion.py",
        f"--workdir={tmp_path}/job",
    ]
    bad = "--config.opd.lr=-1"  # stops it before anything is computed
    result = subprocess.run(
        [*arguments, bad], cwd=REPO, capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[0].startswith("preset tiny; choose another with --config=")
