"""The main job as a user runs it: from the command line, with mistakes, killed and started again."""

import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from processes import REPO, SHARE, SMALL, command, run_command
from processes import run_main as run

from listopd_jax.stages.pipeline import most_useful
from listopd_jax.train.loop import Run


@pytest.fixture
def finished(finished_job):
    return finished_job


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
        "ended",
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
        "loss", "tokens_per_decode_step", "advantage_mean", "advantage_structural", "advantage_content", "ratio_max",
        "clip_fraction", "reverse_kl", "entropy", "completion_length", "parse", "ended", "grad_norm",
        "sampler_trainer_gap",
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
    """Its checkpoint is kept while the run continues."""
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


SAVED = "saved at step {}; the same command resumes from there"
STOPS = [  # signal, where, exit code, last words
    ("SIGKILL", "sft_teacher step 2", -signal.SIGKILL, ""),
    ("SIGTERM", "sft_student evaluated 1", 0, "stopped; the same command resumes from there"),
    ("SIGKILL", "opd_lambda1.0_seed0 saving 2", -signal.SIGKILL, ""),
    ("SIGTERM", "opd_lambda2.0_seed0 step 1", 0, f"opd_lambda2.0_seed0: {SAVED.format(1)}"),
]


@pytest.mark.slow
def test_killed_and_stopped_again_and_again_the_job_ends_with_the_same_metrics(finished, tmp_path):
    """kill -9 and SIGTERM, in training, saving and evaluation; SIGTERM exits with 0 and says what is saved."""
    workdir = tmp_path / "job"
    for name, where, code, says in STOPS:
        ended = run(workdir, *SMALL, LISTOPD_SIGNAL_AT=f"{name} {where}")
        assert ended.returncode == code, ended.stderr[-2000:]
        assert ended.stderr.rstrip().endswith(says) and "Traceback" not in ended.stderr, ended.stderr[-2000:]
    assert run(workdir, *SMALL).returncode == 0
    assert metrics(workdir) == metrics(finished)
    assert results(workdir) == results(finished)


@pytest.mark.soak
def test_killed_at_any_moment_the_job_ends_with_the_same_metrics(finished, tmp_path):
    """The same at moments that nobody chose, nine times."""
    workdir, rng = tmp_path / "job", np.random.default_rng()
    for _ in range(9):
        process = subprocess.Popen(
            command(workdir, *SMALL), cwd=REPO, env=os.environ | SHARE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(rng.uniform(4, 20))
        process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
        process.wait(60)
    assert run(workdir, *SMALL).returncode == 0
    assert metrics(workdir) == metrics(finished)
    assert results(workdir) == results(finished)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config.opd.lamdas=1.0"], "did you mean lambdas?"),
        (["--config.opd.lambda=1.2"], "--config.opd.lambda: no such field; did you mean opd.lambdas?"),
        (["--config.opd.lambda.x=1"], "--config.opd.lambda.x: no such field; did you mean opd.lambdas?"),
        (["--config.opd.steps=many"], "--config.opd.steps=many"),
        (["--config.opd.lambdas=1.0,x"], "every lambda is a number"),
        (
            ["--config.opd.lambdas=1,5"],
            "one λ or two? Write --config.opd.lambdas=1.5, or --config.opd.lambdas=1.0,5.0",
        ),
        (["--config.forecast.lambdas=1,05"], "Write --config.forecast.lambdas=1.05"),
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
    result = run(tmp_path / "job", config=config)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and says in result.stderr


def test_auto_is_tiny_on_a_cpu(tmp_path):
    bad = "--config.opd.lr=-1"  # stops it before anything is computed
    arguments = command(tmp_path / "job", bad, config="configs/fashion.py")
    result = run_command(arguments, JAX_PLATFORMS="cpu")
    assert result.returncode == 2
    assert result.stderr.splitlines()[0].startswith("preset tiny; choose another with --config=")
