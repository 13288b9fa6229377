"""`python -m listopd_jax.theory` as a user meets it."""

import json
import subprocess
import sys

import pytest

from listopd_jax import theory
from listopd_jax.errors import UserError
from listopd_jax.theory.__main__ import run

KEYS = ["lambda_clip", "lambda_clip_base_neutral", "lambda_flip", "fixed_point", "q_c"]


def as_json(*flags):
    return json.loads(run([*flags, "--json"]))


def command(*flags):
    return subprocess.run(
        [sys.executable, "-m", "listopd_jax.theory", *flags], capture_output=True, text=True, check=False
    )


def test_json_has_exactly_the_documented_keys():
    values = as_json("--p=0.9993", "--b=0.8105", "--c=5")
    assert list(values) == KEYS and values["lambda_flip"] is None
    assert (
        round(values["lambda_clip"], 4) == 1.2771 and round(values["lambda_clip_base_neutral"], 4) == 1.2216
    )
    assert values["q_c"] == pytest.approx(1 - 0.0007 / 5)
    assert values["fixed_point"] == theory.fixed_point(0.9993, 0.8105, 1.2)


def test_fixed_point_follows_lam():
    assert as_json("--p=0.9", "--b=0.6", "--lam=1")["fixed_point"] == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("flags", "null", "reason"),
    [
        (["--p=0.684", "--b=0.988"], {"lambda_clip"}, "b < p"),
        (["--p=0.4", "--b=0.3"], {"lambda_clip", "lambda_clip_base_neutral", "lambda_flip"}, "p > ½"),
        (
            ["--p=0.9", "--b=0.5", "--c=1"],
            {"lambda_clip", "lambda_clip_base_neutral", "lambda_flip"},
            "c > 1",
        ),
        (
            ["--p=0.9", "--b=0.5", "--c=inf"],
            {"lambda_clip", "lambda_clip_base_neutral", "lambda_flip"},
            "infinite",
        ),
    ],
)
def test_undefined_is_null_with_a_reason(flags, null, reason):
    values = as_json(*flags)
    assert {key for key in KEYS if values[key] is None} == null
    assert reason in values["reason"]


@pytest.mark.parametrize(
    ("flags", "binding"),
    [
        (["--p=0.9993", "--b=0.81"], "clip"),
        (["--p=0.684", "--b=0.988"], "flip"),
        (["--p=0.4", "--b=0.5"], "none"),
    ],
)
def test_sentences_say_which_threshold_binds(flags, binding):
    line = next(line for line in run(flags).splitlines() if line.startswith("binding"))
    assert binding in line


@pytest.mark.parametrize(
    "flags",
    ["--p=1 --b=.5", "--p=.9 --b=x", "--p=.9", "--p=.9 --b=.5 --c=-1", "--p=.9 --b=.5 --lam=nan",
     "--p=.9 --b=.5 --plot=no/such/folder/a.png"],
)  # fmt: skip
def test_mistakes_are_user_errors_of_one_line(flags):
    with pytest.raises(UserError) as caught:
        run(flags.split())
    assert "\n" not in str(caught.value) and len(str(caught.value)) > 10


def test_exit_codes():
    good, bad = command("--p=0.9", "--b=0.5"), command("--p=1.5", "--b=0.5")
    assert good.returncode == 0 and "λ_clip" in good.stdout
    assert (
        bad.returncode == 2 and bad.stdout == "" and bad.stderr.count("\n") == 1 and "p = 1.5" in bad.stderr
    )


def test_plot_is_a_picture(tmp_path):
    run(["--p=0.9993", "--b=0.81", f"--plot={tmp_path / 'tail.png'}"])
    assert (tmp_path / "tail.png").read_bytes()[:4] == b"\x89PNG"
