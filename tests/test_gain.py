"""docs/results/gain.json from made-up records: pairs by seed, t intervals, the form that scripts read."""

import json
import math
import pathlib

import pytest

from listopd_jax.config import validate
from listopd_jax.errors import UserError
from listopd_jax.report.gain import main, summary, table
from listopd_jax.report.guards import pairs

T_975 = {1: 12.706204736, 2: 4.302652730}  # Student's t by degrees of freedom, from a printed table
LEVEL = {"same": 1.5, "plain": 1.6, "guarded": 1.4, "independent": 1.7, "independent_guarded": 1.8}
SEED = {7: 0.03, 13: -0.01, 21: 0.0}  # what a seed adds to every policy: pairs cancel it
OWN = {7: 0.01, 13: 0.02, 21: -0.03}  # what it adds to extrapolated ones alone


def record(lam, seed, steps, mae, **fields):
    return {
        "stage": "opd",
        "lambda": lam,
        "seed": seed,
        "steps": steps,
        "parse": 0.9,
        "useful": 0.7,
        "expected_mae": mae,
    } | fields


def ablations(folder, seeds=SEED, **changes):
    """Ablations whose differences to λ = 1 are 0.1 · (…) plus OWN; λ = 1 gains 0.04 from 2N steps in every seed."""
    for ablation, level in (LEVEL | changes).items():
        lam = 1.0 if ablation in ("same", "independent") else 1.5
        own = OWN if lam > 1 else dict.fromkeys(OWN, 0.0)
        rows = [
            record(lam, s, 150, level + SEED[s] + own[s], parse=0.5 if ablation == "plain" else 0.9)
            for s in seeds
        ]
        if ablation == "same":
            rows += [record(1.0, s, 300, level + SEED[s] - 0.04) for s in seeds]
            rows.append({"stage": "sft_teacher", "parse": 0.99, "expected_mae": 1.3, "seed": 3, "steps": 60})
        path = folder / ablation / "results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(rows))
    return folder


def test_the_file_has_the_form_and_the_numbers(tmp_path):
    out = tmp_path / "gain.json"
    main([str(ablations(tmp_path / "runs")), f"--out={out}"])
    found = json.loads(out.read_text())
    assert found.keys() == {"lambda_1", "guarded", "teacher", "controls"}
    assert found["lambda_1"] == pytest.approx({"parse": 0.9, "mae": 1.5 + 0.02 / 3})
    assert found["teacher"] == {"parse": 0.99, "mae": 1.3}
    sd = math.sqrt((0.01**2 + 0.02**2 + 0.03**2) / 2)  # OWN has mean 0
    half = T_975[2] * sd / math.sqrt(3)
    guarded, controls = found["guarded"], found["controls"]
    assert guarded["lambda"] == 1.5 and guarded["mae"] == pytest.approx(1.4 + 0.02 / 3)
    assert guarded["mae_difference"] == pytest.approx({"mean": -0.1, "low": -0.1 - half, "high": -0.1 + half})
    independent = controls["independent_teacher"]
    assert independent["mae_difference"]["mean"] == pytest.approx(0.1)
    longer = controls["longer_lambda_1"]
    assert longer["lambda"] == 1.0 and longer["mae_difference"]["mean"] == pytest.approx(-0.04)
    assert (
        independent.keys() == longer.keys() == guarded.keys() == {"lambda", "parse", "mae", "mae_difference"}
    )


def test_seeds_are_paired_and_those_without_a_partner_left_out_of_the_difference(tmp_path):
    folder = ablations(tmp_path)
    path = folder / "guarded" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:2]))
    found = summary(folder)["guarded"]["mae_difference"]
    half = T_975[1] * 0.005  # of −.09 and −.08
    assert found == pytest.approx({"mean": -0.085, "low": -0.085 - half, "high": -0.085 + half})


@pytest.mark.parametrize("fields", [{"sweep": "clip=5.0"}, {"guard": "margin=1.25"}, {"lambda": 1.6}])
def test_an_ablation_of_several_policies_is_refused(tmp_path, fields):
    """A point of a sweep, or another λ, of the same seed would take the place of the first."""
    path = ablations(tmp_path) / "plain" / "results.json"
    path.write_text(json.dumps([*json.loads(path.read_text()), record(1.5, 7, 150, 1.2) | fields]))
    for read in (lambda: summary(tmp_path), lambda: pairs(tmp_path)):
        with pytest.raises(
            UserError, match=r"plain/results.json: .* has more \(OPD, .*; OPD, .*opd.sweep"
        ) as error:
            read()
        assert "\n" not in str(error.value)


def test_one_seed_has_no_interval(tmp_path):
    found = summary(ablations(tmp_path, seeds=[7]))["guarded"]["mae_difference"]
    assert found == {"mean": pytest.approx(-0.09), "low": None, "high": None}


def test_the_table_says_what_twice_the_training_would_have_given(tmp_path):
    rows = {line.split(" | ")[0].strip("| "): line for line in table(ablations(tmp_path)).splitlines()}
    assert "-0.060 [" in rows["guarded"] and "+0.100 [" in rows["plain"] and "0.500 ± 0.000" in rows["plain"]
    assert rows.keys() >= {*LEVEL, "longer"}


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (
            lambda f: (f / "plain" / "results.json").unlink(),
            "plain/results.json: no policy after 150 steps yet",
        ),
        (lambda f: (f / "same" / "results.json").write_text("[]"), "needs λ = 1 after N and after 2N steps"),
        (
            lambda f: (f / "guarded" / "results.json").write_text(json.dumps([record(1.5, 7, 150, None)])),
            "has no expected_mae; run the ablation with evaluation.expected=True",
        ),
    ],
)
def test_what_is_missing_is_one_line(tmp_path, break_it, says):
    folder = ablations(tmp_path)
    break_it(folder)
    with pytest.raises(UserError) as error:
        main([str(folder)])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_every_arm_is_a_config_and_only_the_guarded_ones_have_a_guard():
    from configs import gain

    configs = {ablation: validate(gain.get_config(ablation)) for ablation in gain.ABLATIONS}
    guards = {ablation: config.opd.guard.margin > 0 for ablation, config in configs.items()}
    assert guards == {ablation: ablation.endswith("guarded") for ablation in gain.ABLATIONS}
    assert all(config.evaluation.expected and len(config.opd.seeds) == 8 for config in configs.values())
    assert configs["same"].opd.eval_steps == (configs["plain"].opd.steps,)
    with pytest.raises(UserError, match="ablation"):
        gain.get_config("other")


def test_the_committed_file_is_what_the_committed_records_give():
    results = pathlib.Path(__file__).resolve().parents[1] / "docs" / "results"
    assert json.loads((results / "gain.json").read_text()) == summary(results / "gain")
