"""The benchmarks' arithmetic, their agreement with torch, and that every command runs; never how fast anything is."""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import grid, opd_step, packing, peers, scaling, shared
from benchmarks.confirmed import confirmed
from benchmarks.models import write_models
from benchmarks.presets import PRESETS, cpu, paper
from benchmarks.shape import Shape
from benchmarks.step import Step, random_prompts
from benchmarks.table import markdown, spread, stage_rows
from listopd_jax.config import validate
from listopd_jax.errors import exit_code
from listopd_jax.plan.arithmetic import Layout, Load
from listopd_jax.plan.chips import CHIPS, Topology
from listopd_jax.plan.search import shapes_of
from listopd_jax.stages.pipeline import distillation, frozen_models
from listopd_jax.stages.prepare import job_on_mesh

ROOT = pathlib.Path(__file__).parents[1]
TINY = Shape(
    completions=2, prompts=2, prompt_tokens=12, new_tokens=6, vocab=300, student=(1, 32), teacher=(2, 64),
    head_dim=16,
)  # fmt: skip
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs the test extra's torch"
)


@pytest.mark.parametrize(
    ("main", "flags", "says"),
    [
        (opd_step.main, ["--preset=gpu"], "invalid choice: 'gpu'"),
        (opd_step.main, [], "--preset"),
        (opd_step.main, ["--preset=cpu", "--steps=0"], "'0' is not a whole number of at least 1"),
        (opd_step.main, ["--preset=cpu", "--stesp=3"], "unrecognized arguments: --stesp=3"),
        (opd_step.main, ["--preset=cpu", "--topology=v5e:2x4"], "only the tpu presets"),
        (opd_step.main, ["--preset=tpu", "--trace=x"], "compiles only"),
        (
            opd_step.main,
            ["--preset=cpu", "--confirmed=0.5"],
            "--confirmed=0.5: must be a probability, and needs --drafts",
        ),
        (
            opd_step.main,
            ["--preset=cpu", "--drafts=3", "--confirmed=2"],
            "--confirmed=2: must be a probability",
        ),
        (opd_step.main, ["--preset=paper_small", "--microbatch=3"], "opd.microbatch=3 must divide"),
        (peers.main, ["--peers=ours,jax"], "--peers=ours,jax"),
        (scaling.main, ["--axes=vocabs"], "did you mean 'vocab'?"),
        (scaling.main, ["--peers=ours,jax"], "--peers='jax' is unknown"),
        (scaling.main, ["--peers=torch"], "ours is missing"),
        (scaling.main, ["--peers=ours,ours"], "--peers=ours,ours: give each once"),
        (peers.main, ["--peers=torch"], "give ours and others"),
        (peers.main, ["--completions=1,x"], "--completions: 'x' is not a whole number"),
        (peers.main, ["--peers=ours,tunix"], "--tunix-python"),
        (shared.main, ["--tokens=700"], "--tokens=700: give tokens"),
        (shared.main, ["--layers=4,x"], "--layers=4,x: give layers"),
        (packing.main, ["--k=4"], "required: --path"),
        (packing.main, ["--path=absent.csv"], "absent.csv"),
        (grid.main, ["--workdir=x", "--points=2,x"], "--points=2,x: give numbers of points"),
        (grid.main, ["--workdir=x", "--steps=2"], "--steps=2: give at least 3"),
        (opd_step.main, ["--preset=cpu", "--trace=/proc/x"], "--trace=/proc/x: cannot be written"),
        (opd_step.main, ["--preset=tpu", "--steps=3"], "compiles only"),
        (peers.main, ["--peers=ours,tunix", "--tunix-python=."], "--tunix-python"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line(main, flags, says, capsys):
    assert exit_code(main, flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err


def test_flops_floor_and_utilisation_of_a_known_model_are_those_counted_by_hand():
    shapes = shapes_of(cpu(dataclasses.replace(TINY, completions=1)))
    load, layout = (
        Load(2, 1, 12, 6),
        Layout(dict.fromkeys(("data", "fsdp", "tensor"), 1), 0, "none", "float32"),
    )
    chip = CHIPS["cpu"]._replace(flops=1e9, bandwidth=1e15)
    seconds = {"prefill": 0.1, "decode": 0.3, "rollout": 0.4, "update": 2.0, "step": 2.4}
    rows = {
        r["stage"]: r
        for r in stage_rows(shapes, load, layout, Topology("here", "here", chip, (1,)), [seconds])
    }
    # student: 2 heads of 16, 1 KV head, width 32, 96 units: weights of q, o, k, v and three MLP products
    weights = 32 * (2 * 32 + 2 * 16 + 3 * 96)
    prefill = 2 * 24 * weights + 4 * 2 * 16 * (2 * 12 * 13 / 2)
    decode = 2 * 12 * weights + 4 * 2 * 16 * (2 * 6 * (12 + 3.5)) + 2 * 32 * 300 * 12
    assert rows["prefill"]["flops"] == prefill and rows["decode"]["flops"] == decode
    assert rows["rollout"]["floor_s"] == pytest.approx((prefill + decode) / 1e9)
    assert rows["rollout"]["floor_share"] == pytest.approx((prefill + decode) / 1e9 / 0.4)
    assert rows["decode"]["mfu"] == rows["decode"]["hfu"] == pytest.approx(decode / 1e9 / 0.3)
    # teacher: 2 layers, 4 heads, 2 KV heads, width 64, 192 units; base and student as above, forward + backward = 3
    big = 2 * 64 * (2 * 64 + 2 * 32 + 3 * 192)
    teacher = 2 * 36 * big + 4 * 2 * 4 * 16 * (2 * 12 * 13 / 2 + 2 * 6 * (12 + 3.5)) + 2 * 64 * 300 * 12
    # of a prompt the last layer, the student's only one, computes keys and values, and nothing else
    teacher -= 2 * 24 * 64 * (2 * 64 + 3 * 192) + 4 * 4 * 16 * (2 * 12 * 13 / 2)
    useful = teacher + 4 * (2 * 24 * 32 * 2 * 16 + decode)
    again = 2 * 2 * 16 * (2 * 6 * (12 + 3.5))  # attention's scores, in the backward pass
    assert rows["update"]["mfu"] == pytest.approx(useful / 2e9)
    assert rows["update"]["hfu"] == pytest.approx((useful + again) / 2e9)
    assert rows["step"]["flops"] == pytest.approx(prefill + decode + useful + again)
    assert rows["step"]["tokens_per_s"] == pytest.approx(36 / 2.4)
    assert rows["prefill"]["tokens_per_s"] == pytest.approx(240) and rows["prefill"]["bound_by"] == "flops"


def test_a_phase_that_memory_bounds_has_the_bytes_over_the_bandwidth_as_its_floor():
    shapes, load = shapes_of(cpu(TINY)), Load(2, 2, 12, 6)
    layout = Layout(dict.fromkeys(("data", "fsdp", "tensor"), 1), 0, "none", "float32")
    chip = CHIPS["cpu"]._replace(flops=1e15, bandwidth=1e6)
    seconds = dict.fromkeys(("prefill", "decode", "rollout", "update", "step"), 1.0)
    for row in stage_rows(shapes, load, layout, Topology("here", "here", chip, (1,)), [seconds]):
        assert row["bound_by"] == "hbm" and row["floor_s"] == pytest.approx(row["bytes"] / 1e6)


def test_spread_is_the_median_within_the_middle_half():
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)
    assert spread([7.0]) == (7.0, 7.0, 7.0)


def test_the_paper_preset_is_ecs_step_on_random_weights():
    config, shapes = validate(paper()), shapes_of(paper())
    assert (config.opd.batch_size, config.task.max_prompt, config.task.max_response) == (128, 2048, 512)
    assert config.student.weights == config.teacher.weights == "" and config.dtype.compute == "bfloat16"
    assert (shapes["student"].hidden_size, shapes["teacher"].hidden_size) == (2048, 2560)
    assert PRESETS["paper"][1] == (700, 225)


def test_lengths_are_forced_and_the_rollout_is_cut_to_a_quarter_of_the_budget():
    config = validate(PRESETS["paper_small"][0]())
    prompts = random_prompts(config, 44)
    step = Step(config, prompts, 44, 14)
    rollout = step.rollout()
    assert prompts.shape == (8, 64) and (prompts[:, :44] > 1).all() and not prompts[:, 44:].any()
    assert rollout.tokens.shape == (8, 1, 16) and (np.asarray(rollout.lengths) == 14).all()
    assert not np.asarray(rollout.tokens)[..., 14:].any()


def test_paper_small_gives_a_row_for_every_stage(capsys, tmp_path):
    flags = ["--preset=paper_small", "--steps=1", "--json", f"--trace={tmp_path}"]
    assert exit_code(opd_step.main, flags) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["stage"] for row in result["stages"]] == ["prefill", "decode", "rollout", "update", "step"]
    for row in result["stages"]:
        assert row["seconds_low"] <= row["seconds"] <= row["seconds_high"] and row["floor_s"] > 0
        assert row["mfu"] <= row["hfu"] and row["floor_share"] == pytest.approx(
            row["floor_s"] / row["seconds"]
        )
    assert result["load"] == {"prompts": 8, "rollouts": 1, "prompt": 44, "response": 14}
    assert result["memory_bytes"] > 2**20 and result["remat"] == "full" and result["microbatch"] == 4
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))
    assert len(markdown(result["stages"]).splitlines()) == 7 and "| update |" in opd_step.render(result)


@pytest.mark.parametrize(
    ("probability", "least", "most"), [(1.0, 4.0, 4.0), (0.5, 1.2, 2.8), (0.0, 1.0, 1.0)]
)
def test_drafts_are_confirmed_as_often_as_asked(probability, least, most):
    """Of 3 drafts each step confirms (1 − p⁴)/(1 − p) tokens on average: 4, 1.875 and 1 with the sampled one."""
    config = PRESETS["paper_small"][0]()
    config.rollout.draft_tokens, config.task.max_response = 3, 64
    config = validate(config)
    with confirmed(probability):
        step = Step(config, random_prompts(config, 44), 44, 61)
        step.rollout()
    assert least <= step.tokens_per_step <= most


def test_the_tpu_preset_is_the_planners_command():
    """Only its mistakes here: that libtpu compiles is tested in test_plan_compile.py."""
    argv = [sys.executable, "-m", "benchmarks.opd_step", "--preset=tpu_small", "--topology=v9:2x2"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: --topology=v9:2x2")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_packed_and_unpacked_do_the_same_work(shared):
    path = f"--path={shared / 'data' / 'womens_clothing_reviews.csv.zip'}"
    flags = [path, "--k=2", "--words=8", "--row=512", "--batch=4", "--steps=1", "--buckets=2"]
    result = packing.measure(packing.parse(flags))  # which compares the losses
    assert result["ratio"][1] > 0 and all(0 < share < 1 for share in result["padding"].values())
    row = packing.render(result).splitlines()[-1].split("|")
    assert row[1].strip() == "2 x 8" and f"{result['padding']['packed']:.1%}" in row[7]
    untimed = packing.measure(packing.parse([*flags, "--padding-only"]))
    assert untimed["ratio"] is None and untimed["padding"] == result["padding"]


@pytest.mark.slow
def test_shared_and_unshared_do_the_same_work():
    result = shared.measure(TINY, steps=1)
    assert [row["stage"] for row in result["stages"]] == ["rollout", "update", "step"]
    assert 0.5 < result["flops_ratio"] < 1 and "by arithmetic" in shared.render(result)
    configs = shared.configurations(TINY)
    assert configs["unshared"].opd.batch_size == 4 and configs["unshared"].opd.rollouts == 1
    assert shared.configurations(dataclasses.replace(TINY, completions=1))["shared"].opd.microbatch == 1


@pytest.mark.slow
def test_points_in_one_program_are_the_points_one_after_another(tmp_path):
    """Four λ of one seed and a fifth point of another, after three updates from equal completions."""
    with job_on_mesh(grid.config_of(small=True), tmp_path) as job:
        result = grid.compare(job, distillation(job, frozen_models(job), None), 5, steps=grid.COMPARED)
    assert result["max_abs_difference"] < 1e-4
    assert len(grid.render([result]).splitlines()) == 2 + len(grid.STAGES) + 1


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(TINY, folder)
    return folder


@needs_torch
def test_torch_and_we_find_the_same_loss_of_the_same_sampled_tokens(models):
    from benchmarks import peer_ours, peer_torch

    ours, torch = peer_ours.Peer(TINY, models), peer_torch.Peer(TINY, models)
    tokens = ours.tokens(ours.rollout())
    assert tokens.shape == (2, 2, 6)
    assert (torch.tokens(torch.of_tokens(tokens)) == tokens).all()
    assert torch.tokens(torch.rollout()).shape == tokens.shape
    for _ in range(2):  # the second time after one update of each
        loss, parts = torch.update(torch.of_tokens(tokens))
        assert ours.update(ours.of_tokens(tokens))[0] == pytest.approx(loss, rel=peers.TOLERANCE)
    assert parts.keys() == {"score", "gradient"}


@pytest.mark.parametrize(
    ("n", "given", "used"), [(1, 0, 0), (2, 0, 0), (4, 0, 4), (8, 0, 2), (64, 0, 1), (8, 4, 4)]
)
def test_our_peer_takes_sixteen_completions_per_pass_unless_the_run_says(n, given, used):
    from benchmarks.peer_ours import in_microbatches

    assert in_microbatches(Shape(completions=n, microbatch=given)) == Shape(completions=n, microbatch=used)


def test_our_peer_takes_no_microbatch_that_does_not_divide_the_prompts():
    from benchmarks.peer_ours import in_microbatches

    assert in_microbatches(Shape(prompts=7, completions=8)).microbatch == 0


@pytest.mark.slow
@needs_torch
def test_peers_in_processes_agree_and_give_a_row_for_every_stage(models):
    measured = peers.measure(["ours", "torch"], {}, TINY, 1, models)
    assert measured["losses"].keys() == {"ours", "torch"}
    rows = peers.summary(measured, 2)
    assert [(r["peer"], r["stage"]) for r in rows] == [
        *(("ours", s) for s in ("rollout", "update", "step")), *(("torch", s) for s in peers.STAGES)
    ]  # fmt: skip
    assert all(r["peak_bytes"] > 2**20 and r["seconds"] > 0 for r in rows)
    assert {r["ratio"] for r in rows if r["peer"] == "ours"} == {1.0}
    assert ["ratio" in r for r in rows if r["stage"] in ("score", "gradient")] == [False, False]
    json.dumps(rows, allow_nan=False)
    assert len(peers.markdown(rows).splitlines()) == 2 + len(rows)


def test_scaling_finds_the_slopes_of_a_known_cost(tmp_path, monkeypatch, capsys):
    """Ours does not depend on n and grows as the square of the prompt, torch's is 2 ms per completion and token."""

    def known(peers, pythons, shape, steps, folder):
        seconds = {
            "ours": shape.prompt_tokens**2 * 1e-6,
            "torch": shape.completions * shape.prompt_tokens * 2e-3,
        }
        turns = {peer: [{"step": seconds[peer]}] * steps for peer in peers}
        return {"turns": turns, "memory": {peer: {"peak_bytes": 0, "start_up_bytes": 0} for peer in peers}}

    monkeypatch.setattr(scaling, "measure", known)
    monkeypatch.setattr("benchmarks.models.write_models", lambda shape, folder: None)
    out, figure = tmp_path / "scaling.json", tmp_path / "scaling.png"
    scaling.main(["--axes=completions,prompt_tokens", f"--out={out}", f"--figure={figure}"])
    found = {
        (r["axis"], r["peer"]): (r["exponent"], r["marginal"]) for r in json.loads(out.read_text())["slopes"]
    }
    assert found["completions", "ours"] == pytest.approx((0, 0), abs=1e-12)
    assert found["completions", "torch"] == pytest.approx((1, 256 * 2e-3))
    assert found["prompt_tokens", "ours"][0] == pytest.approx(2)
    assert found["prompt_tokens", "torch"] == pytest.approx((1, 2e-3))
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert (
        "| prompt_tokens | torch | 64: 0.13, 128: 0.26, 256: 0.51, 512: 1.02 | 1.00 | 2 |"
        in capsys.readouterr().out
    )


def test_losses_that_differ_end_the_comparison(tmp_path):
    class Fake:
        def __init__(self, loss):
            self.loss = loss

        def ask(self, line):
            return {"loss": self.loss} if line.startswith("check") else {}

    assert peers.same_losses({"ours": Fake(2.0), "torch": Fake(2.0001)}, tmp_path) == {
        "ours": 2.0,
        "torch": 2.0001,
    }
    with pytest.raises(peers.UserError, match="torch's loss 2.01"):
        peers.same_losses({"ours": Fake(2.0), "torch": Fake(2.01)}, tmp_path)


def test_a_peer_that_cannot_start_is_one_line(tmp_path):
    worker = peers.Worker("none", sys.executable, TINY, tmp_path)
    with pytest.raises(peers.UserError, match="none stopped"):
        worker.ask("step")
    worker.close()
    assert worker.process.returncode not in (None, 0)
