"""benchmarks/gpu, at a CPU's size: what one short loan of a card runs must not fail there for the first time."""

import json
import pathlib
import subprocess

import pytest

from benchmarks.gpu import correct, profile, record

ROOT = pathlib.Path(__file__).parents[1]


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_attention_agrees_with_float64_forward_and_backward(capsys):
    assert correct.main(["--small", "--only=attention"]) == 0
    checks = lines(capsys)
    assert all(c["passed"] for c in checks) and len(checks) == 7
    assert {"out", "d_q", "d_k", "d_v", "d_past_k", "d_past_v"} == checks[2]["errors"].keys()


def test_a_nan_does_not_pass(capsys):
    assert not correct.say("broken", {"out": float("nan")}, 1.0)
    assert not lines(capsys)[0]["passed"]


def test_the_update_is_profiled_at_a_size_for_a_cpu(capsys):
    profile.main(["update", "--preset=paper_small"])
    said = lines(capsys)
    assert [s["stage"] for s in said] == ["compile and first update", *["update"] * 4]
    assert said[0]["loss"] == said[0]["loss"] and said[1]["seconds"] > 0


def result(name: str) -> dict:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))


def test_the_undrafted_headline_is_what_record_makes_of_the_measurement():
    measured, committed = result("h100_first_light")["third_call"]["result"], result("h100_plain")
    assert record.headline(measured, committed["command"]) == committed
    assert committed["step_s"] <= 8 and committed["update_mfu"] >= 0.45 and committed["peak_gib"] <= 72


@pytest.mark.parametrize("card", ["h100", "h200"])
def test_the_drafted_headline_is_what_record_makes_of_the_measurement(card):
    measured, committed = result(f"{card}_drafts"), result(card)
    assert record.headline(measured["step"], committed["command"]) == committed
    assert committed["confirmed"] == 0.83 and 4 < committed["tokens_per_step"] < 5
    assert committed["update_mfu"] >= 0.45 and committed["peak_gib"] <= 72


def test_the_script_is_valid_shell():
    for script in (ROOT / "benchmarks/gpu").glob("*.sh"):
        assert subprocess.run(["bash", "-n", script]).returncode == 0
