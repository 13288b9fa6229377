"""Where every OPD run starts: the SFT student in float32, which nothing keeps for the next one."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from listopd_jax.stages import pipeline


def job(frozen: str, weights: str = ""):
    dtype, reference = SimpleNamespace(frozen=frozen), SimpleNamespace(weights=weights)
    student = SimpleNamespace(lora=SimpleNamespace(rank=0, alpha=1.0, targets=""))
    return SimpleNamespace(config=SimpleNamespace(dtype=dtype, reference=reference, student=student))


def test_a_float32_base_is_copied():
    """A step donates what it starts from, and the base must stay."""
    base = {"w": jnp.arange(3.0)}
    start = pipeline.student_source(job("float32"), base)
    first, second = start(0), start(1)
    first["w"].delete()
    assert second["w"].tolist() == base["w"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("base", [("bfloat16", ""), ("float32", "folder")])
def test_else_the_student_is_read_again_for_every_run(monkeypatch, runs, base):
    """Where the base is not the student in float32."""
    read = []
    monkeypatch.setattr(pipeline, "train_sft", lambda job, role: read.append(role))
    start = pipeline.student_source(job(*base), base=None)
    for seed in range(runs):
        start(seed)
    assert read == ["student"] * runs
