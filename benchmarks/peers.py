"""The same tiny on-policy distillation step by us and by others, side by side, in turn.

    python -m benchmarks.peers [--peers=ours,torch,trl] [--completions=1,8] [--steps=7] [--json]

Every peer runs in a process of its own (its memory is its own) on the same weights and prompts, and the processes
take turns step by step, so that whatever else the machine does hits all alike. `update` is scoring and update. Ratios
are medians over turns of peer/ours within a turn; the spread is the middle half. The first two turns (compilation) are
not counted.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

from benchmarks.shape import Shape, write_models

STAGES = ("rollout", "update", "step")
WARM_UP = 2
CANNOT = {
    "ours": "",
    "torch": "no shared prompt in scoring and update: n completions are n whole sequences",
    "trl": "no λ and no base (teacher's full-vocabulary reverse KL), no shared prompt, no strict parse",
}


def measure(peers: list[str], completions: int, steps: int, folder: pathlib.Path) -> dict[str, list[dict]]:
    """For each peer one record a turn: seconds of rollout, update and step, loss, peak_bytes."""
    workers = {peer: _start(peer, completions, folder) for peer in peers}
    try:
        turns = [{peer: _ask(workers[peer], peer) for peer in peers} for _ in range(WARM_UP + steps)][
            WARM_UP:
        ]
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait(timeout=60)
    return {peer: [turn[peer] for turn in turns] for peer in peers}


def _start(peer: str, completions: int, folder: pathlib.Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.worker", peer, str(completions), str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(worker: subprocess.Popen, peer: str) -> dict:
    worker.stdin.write("step\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"error: {peer} stopped; what it said is above")
    record = json.loads(line)
    return record | {"step": record["rollout"] + record["update"]}


def summary(records: dict[str, list[dict]], completions: int) -> list[dict]:
    """One row for each peer and stage: median seconds, ratio to ours with its middle half, peak memory."""
    rows = []
    for peer, turns in records.items():
        for stage in STAGES:
            times = [turn[stage] for turn in turns]
            ratios = [t / ours[stage] for t, ours in zip(times, records["ours"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            rows.append(
                {
                    "completions": completions, "peer": peer, "stage": stage, "seconds": statistics.median(times),
                    "ratio": middle, "ratio_low": low, "ratio_high": high,
                    "peak_mib": max(turn["peak_bytes"] for turn in turns) / 2**20,
                }
            )  # fmt: skip
    return rows


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| n | peer | stage | seconds | × ours (middle half) | peak MiB |", "|---|---|---|---|---|---|"]
    for r in rows:
        ratio = f"{r['ratio']:.2f} ({r['ratio_low']:.2f}–{r['ratio_high']:.2f})"
        head = f"| {r['completions']} | {r['peer']} | {r['stage']} |"
        lines.append(f"{head} {r['seconds']:.3f} | {ratio} | {r['peak_mib']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print; with --json one object on stdout."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.split("\n")[0])
    parser.add_argument("--peers", default="ours,torch,trl")
    parser.add_argument("--completions", default="1,8")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    peers = args.peers.split(",")
    if "ours" not in peers or not set(peers) <= set(CANNOT) or args.steps < 2:
        raise SystemExit(f"error: --peers must hold ours and be of {', '.join(CANNOT)}; --steps at least 2")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_models(Shape(1), pathlib.Path(folder))
        for n in map(int, args.completions.split(",")):
            rows += summary(measure(peers, n, args.steps, pathlib.Path(folder)), n)
    notes = [f"{peer}: {CANNOT[peer]}" for peer in peers if CANNOT[peer]]
    print(json.dumps({"rows": rows, "cannot": notes}) if args.json else "\n".join([table(rows), "", *notes]))


if __name__ == "__main__":
    main()
