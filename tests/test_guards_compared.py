"""docs/results/guards.json from made-up records: paired differences, the goal, and configs/guards.py."""

import json
import pathlib

import pytest

from listopd_jax.config import guard_text, validate
from listopd_jax.errors import UserError
from listopd_jax.report.guards import against, main, summary

SEED = {7: 0.03, 13: -0.01, 21: 0.0}  # what a seed adds to every policy: pairs cancel it
T_975 = 4.302652730  # Student's t with two degrees of freedom, from a printed table


def write(folder, ablation, mae, parse=0.99, seeds=SEED, own=(0.0, 0.0, 0.0), **fields):
    rows = [
        {
            "stage": "opd",
            "lambda": 1.0 if "one" in ablation else 2.0,
            "seed": seed,
            "steps": 100,
            "parse": parse,
            "useful": 0.7,
            "expected_mae": mae + SEED[seed] + more,
            **fields,
        }
        for seed, more in zip(seeds, own, strict=False)
    ]
    path = folder / ablation / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(rows))


def test_an_arm_is_compared_seed_by_seed_with_the_one_of_its_pair_and_estimator(tmp_path):
    write(tmp_path, "right_one", 1.5)
    write(tmp_path, "right_one_sampled", 1.7)
    write(tmp_path, "right_mask", 1.4, own=(0.01, 0.02, -0.03))
    write(tmp_path, "right_contract_reward", 1.4)
    write(tmp_path, "wrong_one", 1.0)
    write(tmp_path, "wrong_mask", 1.1)
    rows = {(row["pair"], row["ablation"]): row for row in summary(tmp_path)}
    half = T_975 * (0.0014 / 2) ** 0.5 / 3**0.5
    assert rows["right", "mask"]["mae_difference"] == pytest.approx(
        {"mean": -0.1, "low": -0.1 - half, "high": -0.1 + half}
    )
    assert rows["right", "contract_reward"]["mae_difference"]["mean"] == pytest.approx(-0.3)
    assert rows["wrong", "mask"]["mae_difference"]["mean"] == pytest.approx(0.1)
    assert "goal" not in rows["right", "one"] and rows["right", "one"]["lambda"] == 1.0


def test_margins_and_guarded_tokens_are_of_the_seeds_that_have_them(tmp_path, capsys):
    write(tmp_path, "right_one", 1.5)
    write(tmp_path, "right_mask", 1.4, structural_margin=1.25, guarded=0.125)
    path = tmp_path / "right_mask" / "results.json"
    rows = json.loads(path.read_text())
    rows[0] = {k: v for k, v in rows[0].items() if k != "guarded"}
    rows[1]["guarded"] = 0.25
    path.write_text(json.dumps(rows))
    one, mask = sorted(summary(tmp_path), key=lambda row: row["ablation"], reverse=True)
    assert (mask["margin"], mask["guarded"], mask["guarded_seeds"]) == (1.25, 0.1875, 2)
    assert "margin_seeds" not in mask and not {"margin", "guarded", "guarded_seeds"} & one.keys()
    main([str(tmp_path)])
    assert "| 0.188 (2 seeds) | 1.25 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mae", "parse", "own", "met"),
    [
        (1.4, 0.98, (0, 0, 0), True),
        (1.4, 0.96, (0, 0, 0), False),  # loses .03 of parse
        (1.6, 0.99, (0, 0, 0), False),
        (1.49, 0.99, (0.05, -0.05, 0), False),  # the interval holds 0
    ],
)
def test_the_goal_asks_for_both(tmp_path, mae, parse, own, met):
    write(tmp_path, "right_one", 1.5)
    write(tmp_path, "right_mask", mae, parse, own=own)
    assert [row["goal"] for row in summary(tmp_path) if row["ablation"] == "mask"] == [met]


def test_one_seed_meets_no_goal_and_an_arm_without_its_one_is_not_compared(tmp_path, capsys):
    write(tmp_path, "right_one", 1.5)
    write(tmp_path, "right_mask", 1.4, seeds=[7])
    write(tmp_path, "wrong_mask", 1.4)
    out = tmp_path / "guards.json"
    main([str(tmp_path), f"--out={out}"])
    rows = {(row["pair"], row["ablation"]): row for row in json.loads(out.read_text())}
    assert rows["right", "mask"]["goal"] is False and rows["right", "mask"]["mae_difference"]["low"] is None
    assert "mae_difference" not in rows["wrong", "mask"]
    assert capsys.readouterr().out.count("\n| ") >= 3


def test_other_references_are_an_arm_the_teacher_or_a_file(tmp_path):
    write(tmp_path / "runs", "right_one", 1.5)
    write(tmp_path / "runs", "right_mask", 1.4)
    write(tmp_path / "runs", "right_one_mask", 1.45)
    write(tmp_path, "longer", 1.48, steps=200)
    longer = tmp_path / "longer" / "results.json"
    halfway = [row | {"steps": 100, "expected_mae": 9.0} for row in json.loads(longer.read_text())]
    longer.write_text(json.dumps([*json.loads(longer.read_text()), *halfway]))
    path = tmp_path / "runs" / "right_one" / "results.json"
    teacher = {"stage": "sft_teacher", "steps": 60, "useful": 0.6, "expected_mae": 1.6}
    path.write_text(json.dumps([*json.loads(path.read_text()), teacher]))

    def said(reference):
        lines = against(tmp_path / "runs", reference).splitlines()[2:]
        return {line.split(" | ")[1]: line.split(" | ")[2:] for line in lines}

    assert said("one_mask")["mask"][2].startswith("-0.050 [") and "one_mask" not in said("one_mask")
    assert said("teacher")["mask"][1].startswith("+0.100 [")
    assert said("teacher")["mask"][2].startswith("-0.193 [")  # 1.4 and the seeds' mean, 0.02/3
    assert said(str(longer))["mask"][2].startswith("-0.080 ["), "to its last step"
    assert not said("other")


def test_what_is_missing_is_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no workdir"):
        main([str(tmp_path)])
    write(tmp_path, "right_mask", 1.4, useful=None)
    with pytest.raises(UserError, match="seed 7 has no useful"):
        main([str(tmp_path)])


def test_every_arm_is_a_config_whose_guard_is_its_own():
    from configs import guards

    for pair in guards.PAIRS:
        configs = {
            ablation: validate(guards.get_config(f"{pair}_{ablation}")) for ablation in guards.ABLATIONS
        }
        texts = [guard_text(config.opd.guard) for config in configs.values()]
        unguarded = {"one", "plain", "one_sampled", "contract_reward"}
        assert {ablation for ablation, text in zip(configs, texts, strict=True) if not text} == unguarded
        assert len(set(texts)) == len(configs) - len(unguarded)  # one_mask has that of mask, and "" is one
        assert {c.opd.lambdas for ablation, c in configs.items() if not ablation.startswith("one")} == {
            (2.0,)
        }
        assert all(c.evaluation.expected and len(c.opd.seeds) == 8 for c in configs.values())
    with pytest.raises(UserError, match="ablation"):
        guards.get_config("right_other")


def test_the_committed_file_is_what_the_committed_records_give():
    results = pathlib.Path(__file__).resolve().parents[1] / "docs" / "results"
    assert json.loads((results / "guards.json").read_text()) == summary(results / "guards")
