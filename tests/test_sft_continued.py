"""sft.continued: the teacher's run goes on where the student's ends."""

import jax
import numpy as np
import pytest

from listopd_jax import config as config_module
from listopd_jax.errors import UserError
from listopd_jax.stages.prepare import open_job
from listopd_jax.stages.sft import train_sft


def settings(continued, **fields):
    """A job of a few lists whose teacher hardly learns: 1e-9 a step."""
    config = config_module.defaults()
    config.data.synthetic.products, config.task.max_response = 12, 64
    config.data.synthetic.reviews_per_product = 8
    config.sft.continued = continued
    config.sft.student.update(steps=2, batch_size=4, lr=1e-2, seed=1)
    config.sft.teacher.update(steps=1, batch_size=4, lr=1e-9, seed=2)
    config.update_from_flattened_dict(fields)
    return config_module.validate(config)


@pytest.mark.parametrize("continued", [True, False])
def test_the_teacher_starts_from_the_students_end_or_from_its_own_seed(continued, tmp_path):
    job = open_job(settings(continued), tmp_path)
    student, teacher = (jax.tree.leaves(train_sft(job, role)) for role in ("student", "teacher"))
    near = [np.allclose(a, b, atol=1e-7) for a, b in zip(student, teacher, strict=True)]
    assert all(near) if continued else not all(near)


def test_models_of_two_shapes_cannot_be_one_run():
    with pytest.raises(UserError, match="teacher and student must be the same section"):
        settings(True, **{"teacher.num_layers": 3})
