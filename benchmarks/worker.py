"""One peer in a process of its own: a line on stdin asks, a line of JSON on stdout answers.

    python -m benchmarks.worker PEER SHAPE FOLDER        SHAPE: the fields of benchmarks.shape.Shape as JSON

    step FILE    {"rollout": s, "update": s, "score": s, "gradient": s, "loss": x}    parts where the peer has them;
                 the tokens of its rollout, int32 [prompts, completions, tokens], are in FILE
    sample FILE  the same tokens without an update; {}
    check FILE   {"loss": x} of the update on these tokens
    forget       a new peak of memory begins; {}
    peak         {"peak_bytes": n}

A peer is a module benchmarks.peer_NAME with a class Peer(shape, folder): rollout() → r, update(r) → (loss, seconds of
its parts), tokens(r) → array, of_tokens(array) → r.
"""

import importlib
import json
import pathlib
import sys
import time
from typing import Any

import numpy as np

from benchmarks.memory import forget_peak, peak_resident
from benchmarks.shape import Shape


def main(peer: str, shape: str, folder: str) -> None:
    """Answer until stdin ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not an answer
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(shape).items()}
    system = importlib.import_module(f"benchmarks.peer_{peer}").Peer(Shape(**fields), pathlib.Path(folder))
    for line in sys.stdin:
        print(json.dumps(answer(system, *line.split())), file=answers, flush=True)


def answer(system: Any, ask: str, file: str = "") -> dict[str, float]:
    """The answer of `system` to one line."""
    if ask == "step":
        return timed_step(system, file)
    if ask == "sample":
        np.save(file, np.asarray(system.tokens(system.rollout()), np.int32))
    if ask == "check":
        return {"loss": system.update(system.of_tokens(np.load(file)))[0]}
    if ask == "forget":
        forget_peak()
    return {"peak_bytes": peak_resident()} if ask == "peak" else {}


def timed_step(system: Any, file: str) -> dict[str, float]:
    """Seconds of each stage of one step, and its loss; the tokens that it learned from are kept, off the clock."""
    began = time.perf_counter()
    rollout = system.rollout()
    written = time.perf_counter()
    loss, parts = system.update(rollout)
    done = time.perf_counter()
    np.save(file, np.asarray(system.tokens(rollout), np.int32))
    return {"rollout": written - began, "update": done - written, "step": done - began, "loss": loss} | parts


if __name__ == "__main__":
    main(*sys.argv[1:])
