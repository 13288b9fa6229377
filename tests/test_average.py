"""The average of the weights and the decay of the learning rate: by definition, and resumed exactly."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from listopd_jax.stages.opd import learning_rate
from listopd_jax.train.checkpoints import Checkpoints, abstract
from listopd_jax.train.loop import Run, Saving, checkpoint_folder, train
from listopd_jax.train.optimizer import (
    TrainState,
    apply_gradients,
    average_rate,
    init_state,
    linear_lr,
    with_average,
)

TX = optax.scale_by_adam()
DECAY = 0.8
RUN = Run("opd_lambda1.2_seed0", "opd", lam=1.2, seed=0, steps=7)


@given(steps=st.integers(1, 12), decay=st.floats(0.01, 0.999), seed=st.integers(0, 9))
def test_the_average_is_the_weighted_mean_of_the_weights_after_each_step(steps, decay, seed):
    """Whatever the run started from: float64 over all that was visited, by the definition."""
    visited = np.random.default_rng(seed).normal(size=(steps, 3))
    state = TrainState(None, None, {"w": jnp.full(3, 1e3)})
    for step, weights in enumerate(visited):
        params = {"w": jnp.asarray(weights, jnp.float32)}
        state = with_average(state._replace(params=params), jnp.float32(average_rate(step, decay)))
    counts = decay ** np.arange(steps - 1, -1, -1.0)
    expected = counts @ visited / counts.sum()
    np.testing.assert_allclose(state.average["w"], expected, atol=2e-4)  # it began at 1e3, in float32


def test_the_average_takes_no_part_in_training():
    start = {"w": jnp.arange(4.0)}
    plain, averaged = init_state(jax.tree.map(jnp.copy, start), TX), init_state(start, TX, average=True)
    for step in range(3):
        grads = {"w": jnp.arange(4.0) - step}
        plain, averaged = (apply_gradients(s, grads, jnp.float32(0.1), TX) for s in (plain, averaged))
        averaged = with_average(averaged, jnp.float32(average_rate(step, DECAY)))
        assert (plain.params["w"] == averaged.params["w"]).all()
    assert (averaged.params["w"] != averaged.average["w"]).any()
    assert plain.average is None and set(plain.trees) == {"params", "opt_state"}


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_a_linear_decay_ends_at_0_after_the_last_step(steps):
    rates = [linear_lr(step, steps, 2e-4) for step in range(steps + 1)]
    np.testing.assert_allclose(rates, np.linspace(2e-4, 0, steps + 1), atol=1e-18)


@pytest.mark.parametrize("decay, last", [("none", 1.0), ("linear", 0.1)])
def test_the_learning_rate_rises_over_the_warm_up(decay, last):
    def rates(warmup_steps: int) -> list[float]:
        opd = SimpleNamespace(lr=1.0, lr_decay=decay, warmup_steps=warmup_steps)
        return [learning_rate(opd, step, 10) for step in range(10)]

    np.testing.assert_allclose(rates(4)[:4], np.array([0.25, 0.5, 0.75, 1]) * rates(0)[:4])
    assert rates(4)[4:] == rates(0)[4:] and rates(4)[-1] == pytest.approx(last)


# ---- in the loop


class Numbers:
    """0, 1, 2, …"""

    def __init__(self):
        self.count = 0

    def __next__(self):
        self.count += 1
        return self.count - 1

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"]


def update(state, batch, step):
    grads = jax.tree.map(lambda w: w - batch, state.params)
    state = apply_gradients(state, grads, jnp.float32(linear_lr(step, RUN.steps, 0.5)), TX)
    state = with_average(state, jnp.float32(average_rate(step, DECAY)))
    return state, {"loss": 0.0, "tokens": 1}


def start():
    return init_state({"w": jnp.arange(5.0)}, TX, average=True)


def test_the_result_is_the_average_resumed_exactly(tmp_path):
    """From every step, and once more where the run is only loaded."""
    whole = np.asarray(train(tmp_path / "whole", RUN, start, Numbers(), update, Saving(1, 1))["w"])
    again = train(tmp_path / "whole", RUN, start, Numbers(), update, Saving(1, 1))["w"]
    assert np.asarray(again).tobytes() == whole.tobytes()
    for steps in range(1, RUN.steps + 1):
        pieces = train(tmp_path / "pieces", RUN._replace(steps=steps), start, Numbers(), update, Saving(1, 1))
    assert np.asarray(pieces["w"]).tobytes() == whole.tobytes()
    state = start()
    for step in range(RUN.steps):
        state, _ = update(state, step, step)
    assert np.asarray(state.average["w"]).tobytes() == whole.tobytes()


def test_a_finished_run_reads_the_average_alone(tmp_path):
    train(tmp_path, RUN, start, Numbers(), update, Saving(1, 1))
    folder, labels = checkpoint_folder(tmp_path, RUN.name), RUN.labels
    with Checkpoints(folder, 1, labels) as checkpoints:
        saved = checkpoints.restore(abstract(start()), final=RUN.steps).state
        average = checkpoints.params_at(RUN.steps, abstract(start()))
    assert saved.params is None and saved.opt_state is None
    assert (saved.average["w"] == average["w"]).all()
