"""`opd.on_policy` and `opd.jsd`: GKD's other data and other divergences, through the stages of a run."""

import numpy as np
import pytest
from test_reference import config_of, models  # noqa: F401 (a fixture)

from listopd_jax.config import validate
from listopd_jax.errors import UserError
from listopd_jax.metrics_log import read_metrics
from listopd_jax.stages.opd import is_on_policy, right_answers, variant_of
from listopd_jax.stages.pipeline import run_stages
from listopd_jax.stages.prepare import open_job

EXACT = {"opd.estimator": "full_vocab", "opd.ratio": "none"}


def test_the_coin_is_each_steps_own():
    drawn = [is_on_policy(7, step, 0.25) for step in range(4000)]
    assert 0.22 < np.mean(drawn) < 0.28
    assert drawn[100:110] == [is_on_policy(7, step, 0.25) for step in range(100, 110)]  # after a resume, too
    assert drawn != [is_on_policy(8, step, 0.25) for step in range(4000)]
    assert all(is_on_policy(7, step, 1.0) for step in range(100))
    assert not any(is_on_policy(7, step, 0.0) for step in range(100))


def test_right_answers_are_whole_and_end(models, tmp_path):  # noqa: F811
    job = open_job(config_of(models, **EXACT, **{"opd.on_policy": 0.0}), tmp_path)
    batch = next(iter(job.opd_batches(0)))
    found = right_answers(job, batch)
    assert found.tokens.shape[:2] == found.lengths.shape == (2, 2)
    assert (found.lengths[:, 1] == 0).all() and (found.logprobs == 0).all()
    for row, tokens, lengths in zip(batch["index"], found.tokens, found.lengths, strict=True):
        text = job.codec.text(np.asarray(tokens[0][: lengths[0]]))
        assert text == job.task.answer(job.records["train"][int(row)])
        assert tokens[0, lengths[0] - 1] == job.codec.eos and (tokens[0, lengths[0] :] == job.codec.pad).all()


def test_a_run_mixes_both_and_says_of_samples_only_what_was_sampled(models, tmp_path):  # noqa: F811
    config = config_of(models, **EXACT, **{"opd.on_policy": 0.5, "opd.jsd": 0.5, "opd.steps": 6})
    assert variant_of(config.opd).jsd == 0.5
    run_stages(config, tmp_path)
    rows = [row for row in read_metrics(tmp_path) if row["stage"] == "opd"]
    own = [is_on_policy(row["seed"], row["step"] - 1, 0.5) for row in rows]
    assert len(rows) == 6 and len(set(own)) == 2
    for name in ("parse", "ended", "tokens_per_decode_step", "sampler_trainer_gap"):
        assert [name in row for row in rows] == own
    assert all(np.isfinite(row["loss"]) and row["loss"] >= 0 and row["completion_length"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"opd.jsd": 0.5}, "opd.estimator='full_vocab'"),
        ({"opd.on_policy": 0.5}, "opd.estimator='full_vocab'"),
        ({"opd.jsd": 1.5, **EXACT}, "must be in [0, 1]"),
        ({"opd.jsd": 0.5, "opd.guard.mask": True, **EXACT}, "opd.guard.mask"),
        ({"opd.on_policy": 0.5, "opd.on_collapse": "stop", **EXACT}, "opd.on_collapse"),
    ],
)
def test_what_does_not_go_together_is_refused(models, fields, says):  # noqa: F811
    with pytest.raises(UserError) as error:
        validate(config_of(models, **fields))
    assert says in str(error.value)
