"""`make bench-smoke`: a program that grew is named, one that did not is not."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import smoke
from listopd_jax.plan.compile import Program


def program(layers):
    """`layers` products of 64 x 64 matrices, none of them merged."""

    def run(x):
        for _ in range(layers):
            x = jnp.sin(x @ x)
        return x

    compiled = jax.jit(run).lower(jnp.ones((64, 64))).compile()
    return Program(0, 0, compiled.memory_analysis().temp_size_in_bytes, {}, compiled.as_text())


def test_figures_count_what_the_program_does():
    two, four = smoke.figures(program(2)), smoke.figures(program(4))
    assert two["flops"] == 2 * 2 * 64**3 and four["flops"] == 2 * two["flops"]
    assert four["bytes"] > two["bytes"] >= 4 * 64 * 64 and four["instructions"] > two["instructions"]


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """The command with one program of so many layers, and its record in a folder of its own."""
    monkeypatch.setattr(smoke, "RECORD", tmp_path / "smoke.json")

    def run(layers, *flags):
        monkeypatch.setattr(smoke, "programs", lambda n: [(f"n={n}", program(layers))])
        return smoke.main(flags)

    return run


def test_growth_fails_and_is_named(recorded, capsys):
    assert recorded(3, "--record") == 0
    assert recorded(3) == 0 and recorded(2) == 0
    capsys.readouterr()
    assert recorded(4) == 1
    assert "n=8: flops 1.33 times the recorded" in capsys.readouterr().out


def test_another_jax_decides_nothing(recorded, capsys):
    recorded(2, "--record")
    record = json.loads(smoke.RECORD.read_text()) | {"jax": "0.1"}
    smoke.RECORD.write_text(json.dumps(record))
    assert recorded(5) == 0 and "no verdict" in capsys.readouterr().out


def test_a_program_that_is_gone_is_named(recorded, capsys):
    """Else one that gets another name is never compared again."""
    recorded(2, "--record")
    record = json.loads(smoke.RECORD.read_text())
    record["programs"]["n=9"] = record["programs"]["n=8"]
    smoke.RECORD.write_text(json.dumps(record))
    assert recorded(2) == 1 and "n=9: recorded, but no longer compiled" in capsys.readouterr().out


def test_a_new_program_is_no_growth(recorded):
    recorded(2, "--record")
    smoke.RECORD.write_text(json.dumps({"jax": jax.__version__, "programs": {}}))
    assert recorded(2) == 0
