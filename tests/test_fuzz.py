"""The fuzzer (`make fuzz` runs it for an hour): it finds what is wrong, and a moment of each target finds nothing."""

import fuzz
import pytest
from fuzz_targets import TARGETS, Absent


@pytest.mark.parametrize("name", TARGETS)
def test_a_moment_of_each_target_finds_nothing(name):
    try:
        outcome = fuzz.fuzz(name, 0.3, seed=1)
    except Absent as e:
        pytest.skip(str(e))
    assert outcome.cases > 0 and outcome.found == []


def crash(rng):
    raise KeyError(rng.random())


def disagree(rng):
    assert rng.random() < 0, "differs"


def hang(rng):
    while True:
        pass


@pytest.mark.parametrize(
    ("run", "says"),
    [(crash, "KeyError: "), (disagree, "AssertionError: differs"), (hang, "Hang: takes longer")],
)
def test_what_is_wrong_is_found_once_for_each_place_and_can_be_run_again(monkeypatch, run, says):
    monkeypatch.setitem(TARGETS, "wrong", lambda folder: run)
    monkeypatch.setattr(fuzz, "LONGEST", 0.05)
    (found,) = fuzz.fuzz("wrong", 0.02, seed=0).found
    assert (
        found["says"].startswith(says)
        and found["where"].startswith("test_fuzz.py:")
        and run.__name__ in found["where"]
    )
    assert fuzz.attempt(run, "wrong", 0, found["case"]) == found
