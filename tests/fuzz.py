"""Fuzz the parser, the readers of data, records and models: no crash, no hang, no disagreement with the oracles.

    python tests/fuzz.py --seconds=600 --out=docs/results/fuzz.json      # each target; `make fuzz`
    python tests/fuzz.py --only=reviews --case=17                        # one case again, with its traceback

A case is drawn from the target's name, `--seed` and its number alone. What is wrong is a failed assertion of a target,
any exception but a UserError, a UserError of several lines, or a case that takes longer than LONGEST seconds: said once
for each place that it comes from. Exit code 1 if there was any.
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import gc
import itertools
import logging
import os
import pathlib
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import fuzz_targets

from listopd_jax import files

REPO = pathlib.Path(__file__).resolve().parents[1]
LONGEST = 20  # seconds
MEMORY = 6 << 30  # bytes beyond what the libraries take: a file must not make a reader fill the machine


class Hang(BaseException):
    """A case took longer than LONGEST; no Exception, so that nothing takes it for a fault of a file."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a target: `found` has one entry for each place that something went wrong in."""

    target: str
    seconds: float
    cases: int
    found: list[dict]


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Raise Hang inside if it takes longer."""

    def stop(*_):
        raise Hang(f"takes longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(name: str, seconds: float, seed: int) -> Outcome:
    """Cases of one target until its time is over."""
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = fuzz_targets.TARGETS[name](pathlib.Path(folder))
        began = time.monotonic()
        for case in itertools.count():
            if (spent := time.monotonic() - began) >= seconds and case:
                return Outcome(name, round(spent, 1), case, list(found.values()))
            if (wrong := attempt(run, name, seed, case)) and wrong["where"] not in found:
                found[wrong["where"]] = wrong
                print(f"{name}: case {case}: {wrong['where']}: {wrong['says']}", flush=True)


def attempt(run: Callable[[random.Random], None], name: str, seed: int, case: int) -> dict | None:
    """One case: None, or what went wrong where."""
    try:
        with patience(LONGEST):
            run(random.Random(f"{name} {seed} {case}"))
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # Rust's panics and Hang are no Exceptions
        return {"case": case, "where": place(e), "says": f"{type(e).__name__}: {e}"[:300]}
    return None


def place(e: BaseException) -> str:
    """Where in the library, or else in the targets, an exception came from, and its type."""
    frames = [f for f in traceback.extract_tb(e.__traceback__) if f.filename != __file__]
    own = [f for f in frames if "/listopd_jax/" in f.filename] or [
        f for f in frames if "/tests/" in f.filename
    ]
    last = own[-1] if own else frames[-1]
    line = f":{last.lineno}" if isinstance(e, AssertionError) else ""  # a check of a target: each is its own
    return f"{pathlib.Path(last.filename).name}{line}:{last.name}: {type(e).__name__}"


def limit_memory() -> None:
    """A reader that asks for more than MEMORY gets a MemoryError."""
    if sys.platform == "linux":
        taken = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.RLIM_INFINITY))


def arguments(argv: list[str]) -> argparse.Namespace:
    """The flags of the docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="of each target")
    parser.add_argument(
        "--only", choices=fuzz_targets.TARGETS, action="append", help="a target; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this case alone; needs --only")
    parser.add_argument(
        "--out", type=pathlib.Path, help="JSON of outcomes; those of other targets in it are kept"
    )
    args = parser.parse_args(argv)
    if args.case is not None and len(args.only or ()) != 1:
        parser.error("--case needs one --only")
    return args


def write(path: pathlib.Path, outcome: Outcome) -> None:
    """Put one outcome into a file of them, in the order of TARGETS."""
    kept = {entry["target"]: entry for entry in (files.read_json(path) if path.exists() else [])}
    kept[outcome.target] = dataclasses.asdict(outcome)
    files.write_json(path, [kept[name] for name in fuzz_targets.TARGETS if name in kept])


def main(argv: list[str]) -> int:
    """Run the targets one after another."""
    args = arguments(argv)
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    limit_memory()
    if args.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            (name,) = args.only
            fuzz_targets.TARGETS[name](pathlib.Path(folder))(random.Random(f"{name} {args.seed} {args.case}"))
        return 0
    wrong = 0
    for name in args.only or fuzz_targets.TARGETS:
        try:
            outcome = fuzz(name, args.seconds, args.seed)
        except fuzz_targets.Absent as e:
            print(f"{name}: skipped: {e}", flush=True)
            continue
        print(
            f"{name}: {outcome.cases} cases in {outcome.seconds:.0f} s, {len(outcome.found)} found",
            flush=True,
        )
        wrong += len(outcome.found)
        if args.out:
            write(args.out, outcome)
        gc.collect()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
