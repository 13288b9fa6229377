"""One peer in a process of its own: a line on stdin asks for a step, a line on stdout answers with its times.

python -m benchmarks.worker PEER COMPLETIONS FOLDER        # "step" → {"rollout": s, "update": s, "loss": x}
"""

import importlib
import json
import pathlib
import resource
import sys
import time

from benchmarks.shape import Shape


def main(peer: str, completions: str, folder: str) -> None:
    """Answer steps until stdin ends; the last answer also holds the process's peak memory."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    system = importlib.import_module(f"benchmarks.peer_{peer}").Peer(
        Shape(int(completions)), pathlib.Path(folder)
    )
    for _ in sys.stdin:
        times, loss = timed_step(system)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(times | {"loss": loss, "peak_bytes": peak}), file=answers, flush=True)


def timed_step(system) -> tuple[dict[str, float], float]:
    """Seconds of each stage of one step, and its loss."""
    began = time.perf_counter()
    rollout = system.rollout()
    written = time.perf_counter()
    loss = system.update(rollout)
    return {"rollout": written - began, "update": time.perf_counter() - written}, loss


if __name__ == "__main__":
    main(*sys.argv[1:])
