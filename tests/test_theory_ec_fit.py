"""The fit to EC's own parse rates: docs/theory.md §10 and docs/results/ec_fit.json say what it gives."""

import json
import pathlib

import numpy as np
import pytest

from listopd_jax.theory import ec_fit
from listopd_jax.theory.ec_figures import ROWS

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def numbers():
    return ec_fit.report()


def leaves(value, path=()):
    """Every scalar of nested JSON values by its path."""
    if not isinstance(value, dict | list):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, x in items for k, v in leaves(x, (*path, key)).items()}


def test_parameters_and_training_errors(numbers):
    fit = numbers["fits"]["fit"]
    found = [
        round(fit[name], digits) for name, digits in zip(ec_fit.Params._fields, (2, 2, 3, 3, 1), strict=True)
    ]
    assert found == [1.00, 0.32, 1.102, 0.069, 21.8]
    errors = [fit["rmse"][name] for name in ("sweep", "five_seeds", "long")]
    np.testing.assert_allclose(errors, [0.040, 0.026, 0.032], atol=6e-4)


def test_held_out_rows(numbers):
    fits, row = numbers["fits"], numbers["rows"]["small_clip"]
    predicted = [0.948, 0.891, 0.738, 0.624, 0.499, 0.263, 0.106]
    np.testing.assert_allclose([at["fit"] for at in row], predicted, atol=6e-4)
    assert fits["fit"]["rmse"]["small_clip"] == pytest.approx(0.115, abs=6e-4)
    assert numbers["small_clip_rmse_without_1.05"] == pytest.approx(0.094, abs=6e-4)
    assert fits["without_five_seeds"]["rmse"]["five_seeds"] == pytest.approx(0.039, abs=6e-4)
    assert fits["fit"]["midpoint_196"] == pytest.approx(1.059, abs=6e-4)


def test_two_budgets_cannot_tell_one_budget_law_from_another(numbers):
    """They fix s(42)/s(196) alone: any law of one τ gives the same curves, and another limit N → ∞."""
    one, other = numbers["fits"]["fit"], numbers["fits"]["hyperbolic"]
    for name in ROWS:
        assert one["rmse"][name] == pytest.approx(other["rmse"][name], abs=1.1e-4)
    assert one["share_flipped_at_1"] == pytest.approx(0.080, abs=1e-3)
    assert other["share_flipped_at_1"] == pytest.approx(0.236, abs=1e-3)
    assert one["parse_at_1"]["inf"] - other["parse_at_1"]["inf"] > 0.1


def test_the_fit_finds_the_parameters_that_made_the_values():
    truth = ec_fit.Params(0.97, 0.4, 1.08, 0.05, 25.0)
    rows = [row._replace(parse=ec_fit.predict(truth, row.lambdas, row.steps)) for row in ROWS.values()]
    np.testing.assert_allclose(ec_fit.fit(rows), truth, rtol=1e-5)


def test_the_committed_numbers_are_those_of_the_command(numbers):
    committed = leaves(json.loads((DOCS / "results" / "ec_fit.json").read_text("utf-8")))
    computed = leaves(numbers)
    assert committed.keys() == computed.keys()
    for path, value in computed.items():
        expected = pytest.approx(value, abs=1e-3) if isinstance(value, float) else value
        assert committed[path] == expected, path


def test_the_command_prints_a_table_or_json(numbers, capsys):
    ec_fit.main(["--json"])
    assert json.loads(capsys.readouterr().out) == numbers
    ec_fit.main([])
    assert "small_clip: λ, EC, fit\n 0.950   0.943   0.948" in capsys.readouterr().out
