"""results.json: one record per policy, whatever stood there before."""

import json

import pytest

from listopd_jax.errors import UserError
from listopd_jax.records import RESULTS
from listopd_jax.stages.results import evaluated
from listopd_jax.train.loop import Run

RUN = Run("opd_lambda1.0_seed0", "opd", lam=1.0, seed=0, steps=60)


def test_a_record_is_found_by_stage_lambda_seed_steps_and_guard(tmp_path):
    assert evaluated(tmp_path, RUN) is None
    record = {"stage": "opd", "lambda": 1.0, "seed": 0, "steps": 60, "parse": 0.5}
    changes = ({"seed": 1}, {"lambda": 1.1}, {"steps": 61}, {"stage": "forecast"}, {"guard": "margin=1.25"})
    others = [record | change for change in changes]
    (tmp_path / RESULTS).write_text(json.dumps(others))
    assert evaluated(tmp_path, RUN) is None
    (tmp_path / RESULTS).write_text(json.dumps([*others, record]))
    found = evaluated(tmp_path, RUN)
    assert found.parse == 0.5 and found.to_json().items() >= record.items()


@pytest.mark.parametrize("text", ['[{"a": 1}]', '{"stage": "opd"}', "[1]", "[{", ""])
def test_a_broken_file_is_one_line(tmp_path, text):
    (tmp_path / RESULTS).write_text(text)
    with pytest.raises(UserError, match="results.json: ") as error:
        evaluated(tmp_path, RUN)
    assert "\n" not in str(error.value)
