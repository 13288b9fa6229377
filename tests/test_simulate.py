"""The simulator against the exact limits, its own conservation laws and runs taken apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from listopd_jax import theory
from listopd_jax.ops.objective import Variant
from listopd_jax.simulate.process import Recipe, _draw_counts, listwise, run_grid, single_position
from listopd_jax.theory.estimators import limit_log_odds

P, B = 0.684, 0.988
SGD = {"lists": 64, "optimizer": "sgd", "lr": 1.0}


@pytest.mark.parametrize(
    "variant",
    [
        Variant("none"),
        Variant("teacher_student"),
        Variant("teacher_student", "no_base"),
        Variant("teacher_student", normalize=True),
    ],
)
def test_sampled_runs_end_at_the_limit_of_their_estimator(variant):
    lams = [1.0, 1.15, 1.3]
    curves = run_grid(single_position(P, B), Recipe(variant, **SGD), lams, [5.0], range(8), [300])
    kind = variant.ratio, variant.advantage, variant.normalize
    expected = [limit_log_odds(P, B, lam, 5.0, *kind) for lam in lams]
    # 8 runs scatter by about .1 in log-odds at this learning rate
    np.testing.assert_allclose(curves.log_odds[:, 0, :, 0, 0].mean(1), expected, atol=0.12)


def test_full_vocab_has_no_noise_at_a_single_position_and_ends_at_the_target():
    recipe = Recipe(Variant("none", estimator="full_vocab"), **SGD)
    theta = run_grid(single_position(P, B), recipe, [1.0, 1.5], [5.0], range(3), [50, 300]).log_odds[..., 0]
    assert np.ptp(theta, axis=2).max() < 1e-5
    target = theory.fixed_point_log_odds(P, B, np.array([1.0, 1.5]))
    np.testing.assert_allclose(theta[:, 0, 0, 1], target, atol=1e-3)


def test_budgets_are_readings_of_one_trajectory_and_the_grid_does_not_matter():
    recipe = Recipe(Variant("none"), **SGD)
    together = run_grid(single_position(P, B), recipe, [1.1, 1.3], [5.0], [3, 4], [20, 40])
    alone = run_grid(single_position(P, B), recipe, [1.3], [5.0], [4], [40])
    np.testing.assert_allclose(together.log_odds[1, 0, 1, 1], alone.log_odds[0, 0, 0, 0], rtol=1e-4)
    assert together.greedy.shape == (2, 1, 2, 2) and together.log_odds.shape == (2, 1, 2, 2, 1)


def test_counts_conserve_lists():
    theta = jnp.array([[0.5, 1.0, -0.5], [8.0, 8.0, 8.0]])
    repeat, ends, lists = (5, 3, 1), (False, True, True), 400
    right, wrong = np.moveaxis(np.array(_draw_counts(jax.random.key(0), theta, repeat, ends, lists)), -1, 0)
    np.testing.assert_array_equal((right + wrong)[:, 0], 5 * lists)  # nothing interrupts the first class
    q = 1 / (1 + np.exp(-np.array(theta)))
    expected = lists * (1 + q[:, 1] + q[:, 1] ** 2)  # a list that ends is not asked again
    np.testing.assert_allclose((right + wrong)[:, 1], expected, rtol=0.06)
    assert np.all((right + wrong)[:, 2] == lists - wrong[:, 1])
    np.testing.assert_allclose(right[:, 0] / (5 * lists), q[:, 0], atol=0.05)


def test_listwise_process_has_its_centers():
    process = listwise((0.999, 0.9), (P, B), spread=(0.5, 0.2), prompts=4000)
    np.testing.assert_allclose(process.teacher[:, 2].mean(), theory.log_odds(P), atol=0.03)
    np.testing.assert_allclose(process.base[:, 2].std(), 0.2, atol=0.02)
    assert np.all(process.teacher[:, 0] == theory.log_odds(0.999)) and process.repeat.tolist() == [
        160,
        6,
        1,
        1,
    ]


def test_lists_truncate_where_mode_flip_says_and_a_clean_teacher_never_collapses():
    recipe = Recipe(Variant("none", estimator="full_vocab"), lists=2, lr=0.1)
    lams = [1.0, 1.15, 1.275, 2.0]  # λ_flip = 1.212; EC Eq. 4 for the clean pair: 1.070 (c = 1.5)
    truncating = run_grid(listwise((0.9993, 0.97), (P, B), prompts=8), recipe, lams, eval_steps=[200])
    clean = run_grid(
        listwise((0.9993, 0.81), (0.9993, 0.81), prompts=8), recipe, lams, [1.5], eval_steps=[200]
    )
    np.testing.assert_array_equal(truncating.greedy[:, 0, 0, 0], [1, 1, 0, 0])
    np.testing.assert_array_equal(clean.greedy[:, 0, 0, 0], 1)
    assert np.all(np.diff(clean.sampled[:, 0, 0, 0]) > 0)  # larger λ: surer of its structure
