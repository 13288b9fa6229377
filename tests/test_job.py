"""What a workdir refuses: models trained on one data set are not continued on another."""

import pytest

from listopd_jax.errors import UserError
from listopd_jax.stages.job import refuse_other_data


def test_another_data_set_is_refused_once_models_are_trained(tmp_path):
    refuse_other_data(tmp_path, "a")
    refuse_other_data(tmp_path, "b")  # nothing trained yet
    (tmp_path / "checkpoints").mkdir()
    refuse_other_data(tmp_path, "b")
    with pytest.raises(UserError, match="data files changed") as error:
        refuse_other_data(tmp_path, "a")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        refuse_other_data(tmp_path, "a")  # still refused the second time
