"""Where every OPD run starts: the SFT student in float32, which nothing keeps for the next one."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from listopd_jax.stages import pipeline


def job(frozen: str):
    return SimpleNamespace(config=SimpleNamespace(dtype=SimpleNamespace(frozen=frozen)))


def test_a_float32_base_is_copied():
    """A step donates what it starts from, and the base must stay."""
    base = {"w": jnp.arange(3.0)}
    start = pipeline.student_again(job("float32"), base)
    first, second = start(), start()
    first["w"].delete()
    assert second["w"].tolist() == base["w"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("runs", [1, 3])
def test_else_the_student_is_read_again_for_every_run(monkeypatch, runs):
    read = []
    monkeypatch.setattr(pipeline, "train_sft", lambda job, role: read.append(role))
    start = pipeline.student_again(job("bfloat16"), base=None)
    for _ in range(runs):
        start()
    assert read == ["student"] * runs
