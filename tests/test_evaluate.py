"""`listopd_jax.evaluate`: a checkpoint from elsewhere has the record that a run gives its own, and changes no run."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import SMALL, run_main

from listopd_jax import config as config_module
from listopd_jax.data.tokenizer import load_tokenizer, train_tokenizer
from listopd_jax.errors import UserError
from listopd_jax.main import record_config
from listopd_jax.models import hf
from listopd_jax.models.config import ModelConfig
from listopd_jax.models.decoder import abstract
from listopd_jax.records import Result, read_results
from listopd_jax.report.inputs import Inputs
from listopd_jax.report.write import render, write_report
from listopd_jax.stages.checkpoint import evaluate_checkpoint
from listopd_jax.stages.prepare import open_job


def settings(**fields):
    """A job of six lists whose tokenizer is trained on its own prompts."""
    config = config_module.defaults()
    config.data.synthetic.products, config.task.max_response = 6, 64
    config.data.synthetic.reviews_per_product, config.evaluation.bootstrap = 8, 20
    config.update_from_flattened_dict(fields)
    return config_module.validate(config)


def save_random(folder, tokenizer, rows=None, seed=0):
    """A checkpoint of random weights that answers with the ids of `tokenizer`."""
    shape = ModelConfig(rows or len(tokenizer), 16, 24, 1, 2, 1, 8)
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    hf.save_hf(folder, shape, jax.tree.map(draw, abstract(shape)[1]), tokenizer)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A workdir with the task's tokenizer and the row of one checkpoint, and that checkpoint."""
    folder = tmp_path_factory.mktemp("made")
    open_job(settings(), folder / "workdir")
    model = save_random(folder / "mine", load_tokenizer(folder / "workdir" / "tokenizer"))
    evaluate_checkpoint(settings(), folder / "workdir", str(model))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy of it to change."""
    return shutil.copytree(made, tmp_path / "made")


def test_a_checkpoint_has_its_record_and_its_row(made):
    (record,) = read_results(made / "workdir" / "results.json")
    assert (record.run, record.stage, record.lam, record.seed) == ("mine", "evaluate", None, None)
    assert record.n == sum(record.failures.values()) > 0 and record.extra.keys() == {"weights"}
    page = write_report(made / "workdir").read_text()
    assert "The checkpoint mine parses" in page and '<th scope="row">checkpoint mine</th>' in page


def test_checkpoints_of_several_names_are_several_policies(folder):
    workdir, tokenizer = folder / "workdir", load_tokenizer(folder / "workdir" / "tokenizer")
    other = save_random(folder / "other", tokenizer, seed=1)
    first = read_results(workdir / "results.json")
    made = evaluate_checkpoint(settings(), workdir, str(other))
    assert read_results(workdir / "results.json") == [*first, made] and made.run == "other"


def test_a_record_that_is_there_is_only_read(folder):
    before = (folder / "workdir" / "results.json").read_bytes()
    evaluate_checkpoint(settings(), folder / "workdir", f"{folder}/mine/")
    assert (folder / "workdir" / "results.json").read_bytes() == before


def test_other_weights_under_a_name_that_is_taken_are_refused_and_may_be_linked(folder):
    tokenizer = load_tokenizer(folder / "workdir" / "tokenizer")
    other = save_random(folder / "elsewhere" / "mine", tokenizer, seed=1)
    refused(settings(), folder, other, "another checkpoint that is called 'mine'")
    (folder / "yours").symlink_to(other)
    assert evaluate_checkpoint(settings(), folder / "workdir", str(folder / "yours")).run == "yours"


def refused(config, folder, weights, says):
    """The checkpoint is refused in one line, and no record is written."""
    results = folder / "workdir" / "results.json"
    before = results.read_bytes()
    with pytest.raises(UserError) as error:
        evaluate_checkpoint(config, folder / "workdir", str(weights))
    assert says in str(error.value) and "\n" not in str(error.value)
    assert results.read_bytes() == before


def test_a_tokenizer_that_is_not_the_tasks_is_refused(folder):
    other = train_tokenizer(["another text altogether"] * 3, 270, folder / "other")
    model = save_random(folder / "model", other, rows=700)
    refused(settings(), folder, model, "model: has another vocabulary than tokenizer.path=")


def test_a_checkpoint_without_a_tokenizer_is_refused_where_the_config_names_none(folder):
    refused(settings(), folder, save_random(folder / "bare", None, rows=700), "bare: holds no tokenizer")


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def narrow(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 12}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (pickled, "has only pickled weights"),
        (truncated, "not a complete safetensors file"),
        (narrow, "config.json asks for"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "a LoRA or other adapter"),
        (lambda f: shutil.rmtree(f), "no such folder"),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded_is_refused(folder, change, says):
    change(folder / "mine")
    refused(settings(), folder, folder / "mine", says)


def test_names_in_a_report_are_text():
    hostile = "<script>alert(1)</script>\x1b"
    page = render(Inputs(results=[Result(run=hostile, stage="evaluate", parse=1.0, failures={"ok": 2})]))
    assert "<script>alert" not in page and "\x1b" not in page and "checkpoint &lt;script&gt;" in page


def test_a_run_may_begin_where_only_checkpoints_were_evaluated(folder):
    """It is then the run that config.json describes; what the rows mean cannot change."""
    workdir = folder / "workdir"
    record_config(settings(), workdir, ["evaluate.py", "--a"], "listopd_jax.evaluate")
    with pytest.raises(UserError, match="task.max_response=64, not 80; choose another --workdir"):
        record_config(settings(**{"task.max_response": 80}), workdir, ["main.py", "--b"])
    record_config(settings(**{"opd.steps": 9}), workdir, ["main.py", "--b"])
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["config"]["opd"]["steps"] == 9 and saved["command"] == "python -m listopd_jax.main --b"
    (workdir / "checkpoints").mkdir()
    with pytest.raises(UserError, match="opd.steps=9, not 8"):
        record_config(settings(**{"opd.steps": 8}), workdir, ["main.py", "--b"])


def test_a_later_version_resumes_where_the_fields_that_are_new_are_at_their_defaults(tmp_path):
    """What config.json does not have it never gets: the digest that checkpoints name stays."""
    record_config(settings(), tmp_path, ["main.py"])
    (tmp_path / "checkpoints").mkdir()
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["config"]["data"]["category"], saved["config"]["opd"]["contract_reward"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    record_config(settings(**{"opd.lambdas": (1.0, 9.0)}), tmp_path, ["main.py"])
    resumed = json.loads((tmp_path / "config.json").read_text())
    assert resumed["config"]["opd"].pop("lambdas") == [1.0, 9.0] and len(resumed["resumed"]) == 1
    del saved["config"]["opd"]["lambdas"]
    assert resumed["config"] == saved["config"]
    with pytest.raises(UserError, match="opd.contract_reward=0.0, not 0.5; choose another --workdir"):
        record_config(settings(**{"opd.contract_reward": 0.5, "opd.rollouts": 2}), tmp_path, ["main.py"])


# --- the command, in the workdir of a run

MODULE = {"module": "evaluate"}


def test_a_runs_own_export_has_the_record_that_the_run_gave_it(finished_job, tmp_path):
    workdir = shutil.copytree(finished_job, tmp_path / "job")
    files = [p for p in workdir.rglob("*") if p.is_file() and "compile_cache" not in p.parts]
    before = {path: path.read_bytes() for path in files}
    weights = f"--weights={workdir}/export/sft_student"
    ended = run_main(workdir, *SMALL, "--config.opd.steps=9", weights, **MODULE)
    assert ended.returncode == 0, ended.stderr[-2000:]

    *kept, row = json.loads((workdir / "results.json").read_text())
    assert kept == json.loads((finished_job / "results.json").read_text())
    (own,) = (r for r in kept if r["stage"] == "sft_student")
    head = ("run", "stage", "lambda", "seed", "steps")
    assert [row[name] for name in head] == ["sft_student", "evaluate", None, None, 0]
    assert {k: v for k, v in row.items() if k not in (*head, "weights")} == {
        k: v for k, v in own.items() if k not in head
    }
    examples = json.loads((workdir / "examples.json").read_text())
    outputs = {
        stage: [e["output"] for e in examples if e["stage"] == stage] for stage in ("sft_student", "evaluate")
    }
    assert outputs["evaluate"] == outputs["sft_student"] != []
    said = ended.stdout.splitlines()
    assert said[0].startswith(f"sft_student: parse {own['parse']:.3f}, ended {own['ended']:.3f}")
    assert said[1:] == [f"report: {workdir}/report.html"]
    assert "checkpoint sft_student" in (workdir / "report.html").read_text()

    changed = {path.name for path, data in before.items() if path.read_bytes() != data}
    assert changed == {"results.json", "examples.json", "report.html"}, "what a resume looks at is as it was"
    results = (workdir / "results.json").read_bytes()
    assert run_main(workdir, *SMALL).returncode == 0
    assert (workdir / "results.json").read_bytes() == results


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--weights is missing"),
        (["--weights=absent"], "absent: no such folder"),
        (["--weights=absent", "--config.task.k=3"], "holds a run with task.k=4, not 3"),
        (["--weights=absent", "--wieghts=x"], "wieghts"),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(finished_job, arguments, says):
    before = (finished_job / "results.json").read_bytes()
    result = run_main(finished_job, *SMALL, *arguments, **MODULE)
    errors = [line for line in result.stderr.splitlines() if not line.startswith("preset ")]
    assert result.returncode == 2 and len(errors) == 1 and says in errors[0], result.stderr
    assert (finished_job / "results.json").read_bytes() == before
