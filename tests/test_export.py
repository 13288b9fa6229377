"""`listopd_jax.export`: a policy of a run in a new folder, from its export or its checkpoint, whole or not at all."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from listopd_jax import config as config_module
from listopd_jax.data.tokenizer import load_tokenizer
from listopd_jax.errors import UserError, exit_code
from listopd_jax.export import export, main
from listopd_jax.models import hf
from listopd_jax.models.config import ModelConfig
from listopd_jax.records import Result, read_results
from listopd_jax.report.card import OPD_FIELDS, model_card
from listopd_jax.report.inputs import Inputs
from listopd_jax.report.wording import decimal
from listopd_jax.stages.export import _on_the_way, _state_like, find_policy, policy_model

POLICY = "opd_lambda1.0_seed0"


@pytest.fixture
def job(finished_job, tmp_path):
    """A copy of a finished run to change."""
    return shutil.copytree(finished_job, tmp_path / "job")


def contents(folder):
    """Every file below a folder, by path, but for the lock."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("policy", ["sft_teacher", "sft_student", POLICY])
@pytest.mark.parametrize("source", ["export", "checkpoints"])
def test_export_and_checkpoint_give_the_runs_own_export_and_a_card(job, tmp_path, policy, source):
    own = {p.name: data for p, data in contents(job / "export" / policy).items()}
    out = tmp_path / "new" / "out"
    shutil.rmtree(job / ({"export", "checkpoints"} - {source}).pop())
    before = contents(job)
    export(job, policy, out)
    written = {p.name: data for p, data in contents(out).items()}
    card = written.pop("README.md").decode()
    assert written == own and "generation_config.json" in written
    assert len(load_tokenizer(out)) == hf.read_config(out).vocab_size
    assert contents(job) == before and list(out.parent.iterdir()) == [out]

    (record,) = (r for r in read_results(job / "results.json") if r.run == policy and r.steps != 2)
    saved = json.loads((job / "config.json").read_text())
    low, high = record.intervals["ndcg@1"] or (None, None)
    wanted = [
        f"| parse | {decimal(record.parse)} |",
        f"\n    {saved['command']}\n",
        saved["revision"],
        "clip-safe λ",
    ]
    wanted += (
        [f"| NDCG@1 | {decimal(record.ndcg_1)} | {decimal(low)} to {decimal(high)} |"]
        if low is not None
        else []
    )
    assert [text for text in wanted if text not in card] == []


def test_a_run_that_stopped_before_its_last_evaluation_gives_what_it_evaluated(job, tmp_path):
    """Its export may be there, of the last step, though the record is of an earlier one."""
    records = json.loads((job / "results.json").read_text())
    kept = [r for r in records if (r["run"], r["steps"]) != (POLICY, 3)]
    export(job, POLICY, tmp_path / "last")
    (job / "results.json").write_text(json.dumps(kept))
    export(job, POLICY, tmp_path / "earlier")
    last, earlier = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("last", "earlier"))
    assert last != earlier and "| steps | 2 |" in (tmp_path / "earlier" / "README.md").read_text()


def test_a_run_of_before_a_field_came_is_exported_from_its_checkpoint_too(job, tmp_path, monkeypatch):
    def newer(defaults=config_module.defaults):
        config = defaults()
        with config.unlocked():
            config.newer = 1
        return config

    monkeypatch.setattr(config_module, "defaults", newer)
    shutil.rmtree(job / "export")
    export(job, POLICY, tmp_path / "first")
    saved = json.loads((job / "config.json").read_text())
    saved["config"]["opd"]["lr"] *= 2
    (job / "config.json").write_text(json.dumps(saved))
    refused(job, "was saved by a run with config=")


def refused(job, says, policy=POLICY, out="out"):
    """The export is refused in one line, and nothing on disk is other than before."""
    before = contents(job.parent)
    with pytest.raises(UserError) as error:
        export(job, policy, job.parent / out)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert contents(job.parent) == before and not (job.parent / "out").exists()


def test_the_policies_are_listed_where_a_name_is_wrong(job):
    names = "known: opd_lambda1.0_seed0, opd_lambda2.0_seed0, sft_student, sft_teacher"
    refused(job, "did you mean 'opd_lambda1.0_seed0'?", policy="opd_lambda1.0")
    refused(job, names, policy="forecast")
    refused(job, names, policy="../job/export/sft_student")
    (job / "results.json").unlink()
    refused(job, "known: none yet")


def test_what_is_there_is_not_replaced(job):
    shutil.copytree(job / "export" / "sft_student", job.parent / "model")
    (job.parent / "file").write_text("notes")
    refused(job, "model: already exists and will not be replaced", out="model")
    refused(job, "file: already exists and will not be replaced", out="file")
    (job.parent / "empty").mkdir()
    export(job, POLICY, job.parent / "empty")
    assert (job.parent / "empty" / "README.md").exists()


def test_what_is_damaged_or_gone_is_one_line(job):
    (job / "export" / POLICY / "model.safetensors").write_bytes(b"x")
    refused(job, "is incomplete (")
    whole = (job / "export" / "sft_student" / "model.safetensors").read_bytes()
    (job / "export" / POLICY / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(job, "delete the folder and export again: it is then made from the checkpoint")
    shutil.rmtree(job / "export")
    for path in (job / "checkpoints" / POLICY / "3" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-8])
    refused(job, f"{POLICY}/3: no intact checkpoint (params cannot be read); run the job again")
    shutil.rmtree(job / "checkpoints" / POLICY)
    refused(job, f"has neither an export of {POLICY} at step 3 nor checkpoints/{POLICY}")
    (job / "config.json").write_text('{"config": {"seed": "x"}}')
    refused(job, "seed='x': ")
    (job / "config.json").unlink()
    refused(job, "holds no config.json of a run")


def test_a_folder_that_cannot_be_finished_leaves_nothing(job, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf.save, "save_tokenizer", full)
    refused(job, "cannot be written (No space left on device); free space or choose another folder")


def test_the_command_says_where_or_one_line(job, capsys):
    assert exit_code(main, [f"--workdir={job}", f"--policy={POLICY}", f"--out={job}/out"]) == 0
    assert capsys.readouterr().out == f"{POLICY}: {job}/out\n"
    for arguments, says in (
        ([f"--workdir={job}/absent", "--policy=x", "--out=y"], "absent: no such folder"),
        (["--polcy=x"], "--polcy is unknown; did you mean '--policy'? the following arguments are required"),
        ([f"--workdir={job}", "--policy=x"], "error: the following arguments are required: --out"),
        ([f"--workdir={job}", f"--policy={POLICY}", f"--out={job}/out"], "will not be replaced"),
    ):
        assert exit_code(main, arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and says in line


@pytest.mark.parametrize("name", ["../other/a", "/etc/a", "..", ""])
def test_a_record_never_leads_out_of_the_workdir(tmp_path, name):
    record = Result(run=name, stage="opd", lam=1.0, seed=0, steps=3)
    with pytest.raises(UserError, match="is not the name of a policy"):
        policy_model(config_module.defaults(), tmp_path, record)


def test_another_tokenizer_than_the_runs_is_not_exported_with_its_weights(job):
    config = json.loads((job / "config.json").read_text())
    config["config"]["tokenizer"]["path"] = str(job / "tokenizer")
    (job / "config.json").write_text(json.dumps(config))
    stamp = json.loads((job / "data.json").read_text())
    (job / "data.json").write_text(json.dumps(stamp | {"tokenizer": "of other files"}))
    shutil.rmtree(job / "export")
    refused(job, "the files of tokenizer.path changed since its models were made; restore them")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (dict(stage="opd", steps=2), True),
        (dict(stage="opd", steps=3), False),  # the last step is evaluated anyway, and exported
        (dict(stage="sft_teacher", steps=2), False),  # opd.eval_steps says nothing of its steps
        (dict(stage="opd", steps=4), False),
        (dict(stage="opd", steps=5), True),  # of opd.eval_every
    ],
)
def test_only_an_earlier_step_of_distillation_is_not_what_was_exported(record, expected):
    opd = config_module.defaults().opd
    opd.update(steps=3, eval_steps=(2, 3), eval_every=5)
    assert _on_the_way(opd, Result(run="a", lam=1.0, seed=0, **record)) is expected


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_checkpoint_is_read_in_the_dtypes_that_it_was_trained_in(moments):
    config = config_module.defaults()
    config.sft.teacher.moments = moments
    shape = ModelConfig(16, 8, 16, 1, 2, 1, 4)
    state = _state_like(config, "sft_teacher", shape)
    dtypes = {x.dtype for x in jax.tree.leaves(state.opt_state) if x.ndim}
    assert dtypes == {jnp.dtype(moments)} and {x.dtype for x in jax.tree.leaves(state.params)} == {
        jnp.dtype("float32")
    }


def test_the_longest_training_of_a_policy_is_found():
    records = [Result(run="a", stage="opd", lam=1.0, seed=0, steps=steps) for steps in (3, 9, 6)]
    records += [
        Result(run="b", stage="evaluate", steps=0),
        Result(run="c", stage="forecast", lam=1.0, steps=0),
    ]
    assert find_policy(records, "a").steps == find_policy(records, "a", "last").steps == 9
    with pytest.raises(UserError, match="known: a$"):
        find_policy(records, "b")


def test_the_most_useful_step_of_a_policy_is_found_and_any_other_by_its_number():
    useful = {3: 0.5, 6: 0.7, 9: None}
    records = [Result(run="a", stage="opd", lam=1.0, seed=0, steps=n, useful=x) for n, x in useful.items()]
    assert find_policy(records, "a", "best").steps == 6
    assert find_policy(records, "a", "3").steps == 3
    with pytest.raises(UserError, match="--steps='4' is unknown; .*known: best, last, 3, 6, 9$"):
        find_policy(records, "a", "4")


@pytest.mark.slow
def test_a_step_on_the_way_is_exported_from_its_checkpoint(job, tmp_path):
    export(job, POLICY, tmp_path / "out", "2")
    (record,) = (r for r in read_results(job / "results.json") if r.run == POLICY and r.steps == 2)
    assert f"| parse | {decimal(record.parse)} |" in (tmp_path / "out" / "README.md").read_text()
    own = (job / "export" / POLICY / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != own


def test_a_card_has_every_field_that_decides_what_distillation_ends_in():
    """Those left out say how it is computed, or stand in the card's head."""
    fields = {name for name, _ in config_module.flatten(config_module.defaults().opd.to_dict())}
    left_out = (
        "lambdas plain_lambdas recommend seeds sweep self_distillation steps epochs eval_steps eval_every"
    )
    left_out += " b2 moments microbatch"
    assert fields - set(OPD_FIELDS) == {*left_out.split(), "head_chunk"}


@pytest.mark.parametrize("guard", ["", "margin=1.25"])
def test_the_card_of_a_plain_policy_names_no_guard(guard):
    config = config_module.defaults()
    config.opd.guard.margin = 1.25
    record = Result(
        run="opd_lambda2.0_seed0", stage="opd", lam=2.0, seed=0, steps=3, guard=guard, parse=0.5, n=2
    )
    card = model_card(config_module.validate(config), Inputs(), record)
    assert ("guard.margin" in card) == bool(guard)


def test_texts_of_a_run_are_no_markup_in_a_card():
    hostile = "<script>|[x](y)`\n\n# z\x1b"
    config = config_module.defaults()
    config.data.source, config.data.path = "clothing", hostile
    record = Result(run=hostile, stage="sft_student", parse=0.5, n=2)
    made = {"command": hostile, "revision": hostile, "versions": {hostile: hostile}}
    inputs = Inputs(config=made, data={"lists": {hostile: 3}, "labels": hostile, "fingerprint": [hostile]})
    card = model_card(config_module.validate(config), inputs, record)
    lines = card.splitlines()
    code = [line for line in lines if line.startswith("    ")]
    assert code == ["    <script>|[x](y)` # z⟨U+001B⟩"]
    text = "\n".join(line for line in lines if line not in code)
    assert "\x1b" not in card and text.count("<script") == text.count("\\<script") > 4
    assert text.count("[x](y)") == 0 and [line for line in lines if line.startswith("# ")] == [lines[7]]
    assert all(line.replace("\\|", "").count("|") == 3 for line in lines[-8:] if line)
