"""The same tiny on-policy distillation step by us and by others, side by side, in turn.

    python -m benchmarks.peers [--peers=ours,torch,trl,tunix] [--completions=1,8] [--steps=7] [--json]
                               [--tunix-python=PATH]    the interpreter of a virtual environment with google-tunix
    python -m benchmarks.peers --workdir=RUN [--policy=NAME] [--peers=ours,torch,torch_lookup,trl] …

The first is with random weights and forced lengths. The second is with what a finished run trained, on its first
held-out prompts: its teacher, its SFT student as the base, and as the student NAME of its results.json, by default the
most useful distilled policy. Answers end where they end, and the table says how long they were and how many parsed.

Every peer runs in a process of its own (its memory is its own), on the same weights and prompts, two cores and two
threads, and the processes take turns step by step. An idle process waits on its standard input. The first turns
(compilation) are not counted. `update` is scoring, loss, gradient and optimizer; `score` and `gradient` are its parts
where a peer times them apart. Ratios are of a turn: × ours = the peer's seconds / ours, median and middle half.

Memory is a process's largest resident set: `peak` of the measured turns, `start-up peak` of everything before them
(loading, compiling). Both include the interpreter, libraries, weights of three models and optimizer state.

Before the turns, ours and torch compute the loss of the same sampled tokens at the same weights: it must agree.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.shape import Shape
from benchmarks.table import spread
from listopd_jax.errors import Parser, UserError, exit_code, positive
from listopd_jax.lifecycle import say
from listopd_jax.report import wording

STAGES = ("rollout", "update", "score", "gradient", "step")
WARM_UP = 3
SAME_OBJECTIVE = ("ours", "torch", "torch_lookup")
TOLERANCE = 1e-4  # relative difference of two losses of the same tokens
LEAST_DIFFERENCE = 1e-5  # that matters: a loss is a mean of both signs, and a trained student's is near 0
CANNOT = {
    "ours": "",
    "torch": "no shared prompt: n completions are n whole sequences in rollout, scoring and update; no strict parse",
    "torch_lookup": "torch with transformers' prompt-lookup decoding, which takes one sequence at a time",
    "trl": "another objective: the teacher's full-vocabulary reverse KL, no λ and no base (one scoring pass less); "
    "no shared prompt, no strict parse",
    "tunix": "no on-policy distillation of its own: Sampler and DistillationTrainer put together; another objective: "
    "the teacher's full-vocabulary forward KL, no λ and no base (one scoring pass less); no shared prompt, no "
    "strict parse",
}
CORES = 2
PAUSE = 0.3  # seconds in which the threads of the peer before stop spinning


class Worker:
    """A peer's process and the lines to it."""

    def __init__(self, peer: str, python: str, shape: Shape, folder: pathlib.Path):
        self.peer = peer
        command = [
            python,
            "-m",
            "benchmarks.worker",
            peer,
            json.dumps(dataclasses.asdict(shape)),
            str(folder),
        ]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment(),
            cwd=pathlib.Path(__file__).parents[1],
        )  # fmt: skip

    def ask(self, line: str) -> dict[str, Any]:
        """The answer to one line; UserError if the process has ended."""
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the empty answer below says so
        answer = self.process.stdout.readline()
        if not answer:
            raise UserError(
                f"--peers: {self.peer} stopped; what it said is above; leave it out or install it"
            )
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def environment() -> dict[str, str]:
    """Two threads for every library, on the CPU, without a network."""
    threads = {f"{library}_NUM_THREADS": str(CORES) for library in ("OMP", "MKL", "OPENBLAS")}
    return threads | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@contextlib.contextmanager
def workers(
    peers: Sequence[str], pythons: Mapping[str, str], shape: Shape, folder: pathlib.Path
) -> Iterator[dict[str, Worker]]:
    """The processes of `peers`, ended on leaving."""
    started: dict[str, Worker] = {}
    try:
        for peer in peers:
            started[peer] = Worker(peer, pythons.get(peer, sys.executable), shape, folder)
        yield started
    finally:
        for worker in started.values():
            worker.close()


def measure(
    peers: Sequence[str], pythons: Mapping[str, str], shape: Shape, steps: int, folder: pathlib.Path
) -> dict:
    """{"turns": {peer: [answer of each turn]}, "memory": {peer: {...}}, "losses": {peer: x}} of one shape.

    A turn has the `completions` that it learned from, int32 [prompts, n, T].
    """
    with workers(peers, pythons, shape, folder) as running:
        losses = same_losses(running, folder)
        for _ in range(WARM_UP):
            take_turn(running, folder)
        start_up = {peer: worker.ask("peak")["peak_bytes"] for peer, worker in running.items()}
        for worker in running.values():
            worker.ask("forget")
        turns = [take_turn(running, folder) for _ in range(steps)]
        memory = {
            peer: {"start_up_bytes": start_up[peer], "peak_bytes": worker.ask("peak")["peak_bytes"]}
            for peer, worker in running.items()
        }
    return {
        "turns": {peer: [turn[peer] for turn in turns] for peer in peers}, "memory": memory, "losses": losses
    }  # fmt: skip


def take_turn(running: Mapping[str, Worker], folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """One step of each peer, one after another."""
    answers, tokens = {}, folder / "tokens.npy"
    for peer, worker in running.items():
        time.sleep(PAUSE)
        answers[peer] = worker.ask(f"step {tokens}") | {"completions": np.load(tokens)}
    return answers


def same_losses(running: Mapping[str, Worker], folder: pathlib.Path) -> dict[str, float]:
    """The loss of one set of sampled tokens by each peer of our objective; UserError if they disagree."""
    tokens = folder / "tokens.npy"
    running["ours"].ask(f"sample {tokens}")
    losses = {
        peer: running[peer].ask(f"check {tokens}")["loss"] for peer in SAME_OBJECTIVE if peer in running
    }
    for peer, loss in losses.items():
        if not math.isclose(loss, losses["ours"], rel_tol=TOLERANCE, abs_tol=LEAST_DIFFERENCE):
            raise UserError(
                f"{peer}'s loss {loss} of the same tokens is not ours, {losses['ours']}: no comparison"
            )
    return losses


def summary(
    measured: Mapping[str, Any],
    completions: int,
    judge: Callable[[np.ndarray], dict[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """One row for each peer and stage: seconds, ratio to ours, memory, and means of what `judge` says about a turn."""
    turns, rows = measured["turns"], []
    for peer, own in turns.items():
        judged = [judge(turn["completions"]) for turn in own] if judge else [{}]
        answers = {name: statistics.mean(one[name] for one in judged) for name in judged[0]}
        for stage in (stage for stage in STAGES if stage in own[0]):
            low, seconds, high = spread([turn[stage] for turn in own])
            row = {"completions": completions, "peer": peer, "stage": stage} | measured["memory"][peer]
            row |= {"seconds": seconds, "seconds_low": low, "seconds_high": high}
            rows.append(row | ratio(own, turns["ours"], stage) | answers)
    return rows


def ratio(own: Sequence[Mapping], ours: Sequence[Mapping], stage: str) -> dict[str, float]:
    """The peer's seconds over ours within a turn; nothing for a stage that ours does not time apart."""
    if stage not in ours[0]:
        return {}
    low, middle, high = spread([turn[stage] / we[stage] for turn, we in zip(own, ours, strict=True)])
    return {"ratio": middle, "ratio_low": low, "ratio_high": high}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    head = "n|peer|stage|seconds (middle half)|× ours (middle half)|peak MiB|start-up peak MiB".split("|")
    return wording.markdown(head + ["tokens", "parsed"] * ("parsed" in rows[0]), map(_cells, rows))


def _cells(r: Mapping[str, Any]) -> list[str]:
    times = f"{r['ratio']:.2f} ({r['ratio_low']:.2f}–{r['ratio_high']:.2f})" if "ratio" in r else ""
    seconds = f"{r['seconds']:.3f} ({r['seconds_low']:.3f}–{r['seconds_high']:.3f})"
    memory = (f"{r[name] / 2**20:.0f}" for name in ("peak_bytes", "start_up_bytes"))
    answers = [f"{r['tokens']:.1f}", f"{r['parsed']:.3f}"] if "parsed" in r else []
    return [str(r["completions"]), r["peer"], r["stage"], seconds, times, *memory, *answers]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, lists split; UserError for a mistake."""
    parser = Parser(
        prog="python -m benchmarks.peers", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--workdir", type=pathlib.Path, metavar="RUN")
    parser.add_argument("--policy", default="", metavar="NAME")
    parser.add_argument("--peers")
    parser.add_argument("--completions", default="1,8")
    parser.add_argument("--steps", type=positive, default=7)
    parser.add_argument("--tunix-python", metavar="PATH")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    args.peers = (args.peers or ("ours,torch,torch_lookup,trl" if args.workdir else "ours,torch,trl")).split(
        ","
    )
    args.completions = [_count(n) for n in args.completions.split(",")]
    unknown = set(args.peers) - set(CANNOT)
    if unknown or "ours" not in args.peers or len(set(args.peers)) < len(args.peers):
        raise UserError(
            f"--peers={','.join(args.peers)}: give ours and others of {', '.join(CANNOT)}, each once"
        )
    if args.policy and not args.workdir:
        raise UserError(f"--policy={args.policy}: is of a run; give its --workdir")
    if args.workdir and "tunix" in args.peers:
        raise UserError("--peers: tunix is compared at forced lengths only; leave it out, or --workdir")
    python = pathlib.Path(args.tunix_python or "")
    if "tunix" in args.peers and not (python.is_file() and os.access(python, os.X_OK)):
        raise UserError("--tunix-python=PATH is missing: the interpreter of an environment with google-tunix")
    return args


def _count(text: str) -> int:
    try:
        return positive(text)
    except argparse.ArgumentTypeError as e:
        raise UserError(f"--completions: {e}; give numbers such as 1,8") from e


def main(argv: Sequence[str]) -> None:
    """Measure and print; with --json one object on stdout."""
    args = parse(argv)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    os.environ.update(environment())
    load, rows, losses = os.getloadavg()[0], [], {}
    pythons = {"tunix": args.tunix_python}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        shape, judge, work = prepared(args.workdir, args.policy, folder)
        for n in args.completions:
            measured = measure(
                args.peers, pythons, dataclasses.replace(shape, completions=n), args.steps, folder
            )
            rows += summary(measured, n, judge)
            losses[str(n)] = measured["losses"]
    result = {
        "work": work,
        "rows": rows,
        "losses": losses,
        "cannot": {peer: CANNOT[peer] for peer in args.peers if CANNOT[peer]},
        "load_before": load,
        "steps": args.steps,
    }
    say(json.dumps(result, indent=1, allow_nan=False) if args.json else render(result))


def prepared(
    workdir: pathlib.Path | None, policy: str, folder: pathlib.Path
) -> tuple[Shape, Callable[[np.ndarray], dict[str, float]] | None, str]:
    """The peers' input in `folder`: the shape of the work, a judge of completions where any can parse, and a name."""
    # Both import jax, which reads the environment once.
    if workdir is None:
        from benchmarks.models import write_models

        write_models(Shape(), folder)
        return Shape(), None, "random weights, forced lengths"
    from benchmarks.trained import answered, open_run, write_run

    job = open_run(workdir)
    shape, name = write_run(job, policy, Shape().prompts, folder)
    return shape, functools.partial(answered, job, shape), f"{name}, {shape.prompts} held-out prompts"


def render(result: Mapping[str, Any]) -> str:
    """The result for a reader."""
    losses = [
        f"n={n}: loss of the same tokens " + ", ".join(f"{peer} {loss:.7g}" for peer, loss in by_peer.items())
        for n, by_peer in result["losses"].items()
    ]
    cannot = [f"{peer}: {what}" for peer, what in result["cannot"].items()]
    quiet = f"load average before: {result['load_before']:.2f} (on a busy machine no number here is worth reporting)"
    return "\n".join([result["work"], "", markdown(result["rows"]), "", *losses, *cannot, quiet])


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
