"""docs/results/size_axis.json from made-up records: pairs by list and by seed; the presets of configs/size_axis.py."""

import json
import math
import pathlib
import shutil

import pytest

from configs import size_axis
from listopd_jax.config import validate
from listopd_jax.errors import UserError
from listopd_jax.report.size_axis import METRICS, figures, main, policies, summary

T_975 = 12.706204736  # Student's t with one degree of freedom, from a printed table
LABELS = [9.0, 4.0, 2.0, 1.0]
BEST, SECOND = [8.0, 3.0, 2.0, 1.0], [3.0, 8.0, 2.0, 1.0]  # NDCG@1 of 1 and of 4/9


def write(folder, preset, seed, answers, stage="sft_teacher", lam=None, **fields):
    """A policy that gives `answers`, scores or None for one that fails, to lists a, b, c …"""
    workdir = folder / preset / str(seed)
    workdir.mkdir(parents=True, exist_ok=True)
    head = {"run": stage, "stage": stage, "lambda": lam, "seed": seed, "steps": 9} | fields
    gains = [None if a is None else LABELS[a.index(max(a))] / LABELS[0] for a in answers]
    parsed = [g for g in gains if g is not None]
    record = head | {
        "n": len(answers),
        "parse": len(parsed) / len(answers),
        "useful": sum(parsed) / len(answers),
        "ndcg@1": sum(parsed) / len(parsed) if parsed else None,
    }
    examples = [
        head | {"key": key, "failure": "ok" if a else "no_json", "true_scores": LABELS, "scores": a}
        for key, a in zip("abcdefgh", answers, strict=False)
    ]
    for name, rows in (("results.json", [record]), ("examples.json", examples)):
        path = workdir / name
        path.write_text(json.dumps([*(json.loads(path.read_text()) if path.exists() else []), *rows]))


def runs(folder):
    """Two seeds: the student loses list b in one and ranks c worse in both; the large model fails d in both."""
    for seed, second in ((0, None), (1, BEST)):
        write(folder, "small", seed, [BEST, second, SECOND, BEST], stage="opd", lam=1.1)
        write(folder, "large", seed, [BEST, BEST, BEST, None])
    return folder


def test_policies_of_one_lambda_are_apart(tmp_path):
    for sweep in ("clip=1.5", "clip=5.0"):
        write(tmp_path, "small", 0, [BEST], stage="opd", lam=1.1, sweep=sweep, run=f"opd_{sweep}")
    write(tmp_path, "small", 0, [SECOND], stage="opd", lam=1.1, guard="margin=1.25", run="opd_guarded")
    names = [f"student, λ = 1.1, {kind}" for kind in ("clip=1.5", "clip=5.0", "guarded")]
    assert sorted(policies(tmp_path)) == names


def test_differences_are_paired_by_list_and_averaged_over_seeds(tmp_path):
    (gap,) = summary(policies(runs(tmp_path)))["differences"]
    assert (gap["small"], gap["less"]) == ("student, λ = 1.1", "large, all lists")
    assert gap["parse"]["mean"] == pytest.approx((0 - 0.5 + 0 + 1) / 4)
    assert gap["useful"]["mean"] == pytest.approx((0 - 0.5 - 5 / 9 + 1) / 4)
    assert gap["ndcg@1"]["mean"] == pytest.approx(
        (0 + 0 - 5 / 9) / 3
    )  # d is not parsed by both, b by seed 1 alone
    low, high = gap["useful"]["by_list"]
    assert -5 / 9 <= low < gap["useful"]["mean"] < high <= 1
    half = T_975 * (1 / 4) / math.sqrt(2) / math.sqrt(2)  # of two seeds whose parse differs by one list
    assert gap["parse"]["by_seed"] == pytest.approx([0.125 - half, 0.125 + half])


def test_the_same_policy_differs_by_nothing(tmp_path):
    for preset, stage, lam in (("small", "opd", 1.0), ("large", "sft_student", None)):
        write(tmp_path, preset, 0, [BEST, SECOND, None], stage, lam)
    (gap,) = summary(policies(tmp_path))["differences"]
    for metric in METRICS:
        assert gap[metric] == {"mean": 0.0, "by_list": [0.0, 0.0], "by_seed": None}


def test_what_no_list_defines_is_null(tmp_path):
    write(tmp_path, "small", 0, [None, None], "opd", 1.0)
    write(tmp_path, "large", 0, [BEST, BEST])
    found = summary(policies(tmp_path))
    assert found["policies"][1]["ndcg@1"] is None
    assert found["differences"][0]["ndcg@1"] == {"mean": None, "by_list": None, "by_seed": None}
    assert found["differences"][0]["useful"]["mean"] == -1.0


def test_the_command_prints_tables_and_writes_the_file(tmp_path, capsys):
    out = tmp_path / "size_axis.json"
    main([str(runs(tmp_path / "runs")), f"--out={out}"])
    found = json.loads(out.read_text())
    assert [row["policy"] for row in found["policies"]] == ["large, all lists", "student, λ = 1.1"]
    assert "| student, λ = 1.1 | 0.875 ± 0.177 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (
            lambda f: f.joinpath("large", "0", "examples.json").write_text("[]"),
            "of sft_teacher, seed 0, has 0 of its 4 answers",
        ),
        (lambda f: f.rename(f.with_name("other")), "holds no workdir PRESET/SEED"),
        (lambda f: shutil.rmtree(f / "large"), "only student, λ = 1.1: run presets small and large"),
        (lambda f: f.joinpath("small", "0").rename(f / "small" / "7"), None),
    ],
)
def test_what_is_missing_is_one_line(tmp_path, break_it, says):
    folder = runs(tmp_path / "runs")
    break_it(folder)
    if says is None:  # seed 1 is left to compare
        assert summary(policies(folder))["differences"][0]["parse"]["by_seed"] is None
        return
    with pytest.raises(UserError) as error:
        main([str(folder)])
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("preset", size_axis.PRESETS)
def test_every_preset_and_seed_is_a_config(preset):
    seeds = set()
    for seed in size_axis.SEEDS:
        config = size_axis.get_config(f"{preset},{seed}")
        config.data.path = "reviews.csv" if preset.startswith("smollm2_") else ""
        config = validate(config)
        assert bool(config.opd.lambdas) == preset.endswith("small")
        assert config.evaluation.examples == config.evaluation.max_lists > 0
        seeds |= {config.sft.student.seed, config.sft.teacher.seed}
    assert len(seeds) == 2 * len(size_axis.SEEDS)
    with pytest.raises(UserError, match="seed"):
        size_axis.get_config(f"{preset},9")


@pytest.mark.parametrize("scale", ["", "smollm2_", "smollm2_cpu_"])
def test_large_and_small_read_the_same_lists_and_as_many(scale):
    small, large, control = (size_axis.get_config(scale + name) for name in ("small", "large", "small_sft"))
    for section in ("data", "task", "tokenizer", "evaluation"):
        assert small[section] == large[section] == control[section]
    own = ("seed",)
    recipe = small.sft.student.to_dict()
    assert {k: v for k, v in large.sft.student.to_dict().items() if k not in own} == {
        k: v for k, v in recipe.items() if k not in own
    }
    opd, sft = small.opd, small.sft
    reads = sum(s.steps * s.batch_size for s in (sft.student, sft.teacher))
    reads += opd.steps * opd.batch_size * opd.rollouts
    assert large.sft.teacher.steps * large.sft.teacher.batch_size == reads
    assert large.sft.teacher.noise == sft.teacher.noise == control.sft.teacher.noise


def test_the_large_model_is_about_five_times_larger():
    def weights(size):
        m = size_axis.SIZES[size]
        heads = m["hidden_size"] * 16 * (2 * m["num_heads"] + 2 * m["num_kv_heads"])
        return m["num_layers"] * (heads + 3 * m["hidden_size"] * m["intermediate_size"]), 512 * m[
            "hidden_size"
        ]

    (small, small_rows), (large, large_rows) = weights("small"), weights("large")
    assert 4 < (large + large_rows) / (small + small_rows) < 5 < large / small < 6.1


@pytest.mark.parametrize(("name", "differences"), [("size_axis", 10), ("size_axis_smollm2", 4)])
def test_the_committed_file_has_what_the_committed_records_give(name, differences):
    results = pathlib.Path(__file__).resolve().parents[1] / "docs" / "results"
    committed = json.loads((results / f"{name}.json").read_text())
    found = [figures(policy, found) for policy, found in policies(results / name).items()]
    assert found == committed["policies"] and len(committed["differences"]) == differences
    means = {row["policy"]: row for row in found}
    for gap in committed["differences"]:
        for metric in ("parse", "useful"):
            student, large = (means[gap[side]][metric] for side in ("small", "less"))
            assert gap[metric]["mean"] == pytest.approx(student - large, abs=1e-9)
