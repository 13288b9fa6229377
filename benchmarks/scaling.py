"""What a step costs as its shape grows: seconds against completions, prompt, answer and vocabulary, ours and others'.

    python -m benchmarks.scaling [--peers=ours,torch] [--axes=completions,vocab] [--steps=5]
                                 [--out=benchmarks/results/scaling_cpu.json] [--figure=docs/figures/scaling.png]

One axis is varied, the others are those of benchmarks.peers. As there, peers take turns in processes of their own and
the first turns are not counted. `exponent` is the slope of log seconds against log size: 0 is a constant cost, 1 a
proportional one. `marginal` is the slope of seconds against size, in ms per unit.
"""

import argparse
import dataclasses
import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.peers import CANNOT, CORES, environment, measure, summary
from benchmarks.shape import Shape
from listopd_jax import files
from listopd_jax.errors import Parser, UserError, exit_code, positive, unknown_name
from listopd_jax.lifecycle import say
from listopd_jax.report import wording

AXES: dict[str, tuple[int, ...]] = {
    "completions": (1, 2, 4, 8),
    "prompt_tokens": (64, 128, 256, 512),
    "new_tokens": (16, 32, 64, 128),
    "vocab": (1024, 4096, 16384, 65536),
}
"""The fields of Shape that are varied, and their values."""

STAGE = "step"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags, lists split; UserError for a mistake."""
    parser = Parser(
        prog="python -m benchmarks.scaling", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--peers", default="ours,torch")
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--steps", type=positive, default=5)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--figure", type=pathlib.Path)
    args = parser.parse_args(argv)
    args.peers, args.axes = args.peers.split(","), args.axes.split(",")
    for flag, known in (("peers", set(CANNOT) - {"tunix"}), ("axes", set(AXES))):
        for name in set(getattr(args, flag)) - known:
            raise unknown_name(f"--{flag}", name, sorted(known))
    for flag, names in (("peers", args.peers), ("axes", args.axes)):
        if len(set(names)) < len(names):
            raise UserError(f"--{flag}={','.join(names)}: give each once")
    if "ours" not in args.peers:
        raise UserError(f"--peers={','.join(args.peers)}: ours is missing; the others are compared with it")
    return args


def points(
    axis: str, sizes: Sequence[int], peers: Sequence[str], steps: int, base: Shape
) -> list[dict[str, Any]]:
    """Seconds of a step of each peer at each size of one axis."""
    from benchmarks.models import write_models  # imports jax, which reads the environment once

    rows = []
    for size in sizes:
        shape = dataclasses.replace(base, **{axis: size})
        with tempfile.TemporaryDirectory() as folder:
            write_models(shape, pathlib.Path(folder))
            measured = measure(peers, {}, shape, steps, pathlib.Path(folder))
        of_step = (row for row in summary(measured, shape.completions) if row["stage"] == STAGE)
        rows += [{"axis": axis, "size": size} | row for row in of_step]
    return rows


def slopes(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Least-squares slopes of each axis and peer: `exponent` of the logarithms, `marginal` in seconds per unit."""
    found = []
    for axis, peer in dict.fromkeys((row["axis"], row["peer"]) for row in rows):
        own = [row for row in rows if (row["axis"], row["peer"]) == (axis, peer)]
        size, seconds = (np.array([row[name] for row in own], float) for name in ("size", "seconds"))
        exponent, marginal = np.polyfit(np.log(size), np.log(seconds), 1)[0], np.polyfit(size, seconds, 1)[0]
        found.append({"axis": axis, "peer": peer, "exponent": float(exponent), "marginal": float(marginal)})
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each axis and peer: seconds by size, then both slopes."""
    lines = []
    for slope in slopes(rows):
        own = [row for row in rows if (row["axis"], row["peer"]) == (slope["axis"], slope["peer"])]
        seconds = ", ".join(f"{row['size']}: {row['seconds']:.2f}" for row in own)
        cells = (
            slope["axis"],
            slope["peer"],
            seconds,
            f"{slope['exponent']:.2f}",
            f"{slope['marginal'] * 1e3:.3g}",
        )
        lines.append(cells)
    return wording.markdown(("axis", "peer", "size: seconds", "exponent", "marginal, ms"), lines)


def draw(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """One panel for each axis, both scales logarithmic."""
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure = Figure(figsize=(3 * len(axes), 3), layout="constrained")
    panels = figure.subplots(1, len(axes), squeeze=False, sharey=True)[0]
    for panel, axis in zip(panels, axes, strict=True):
        for peer in dict.fromkeys(row["peer"] for row in rows):
            own = [row for row in rows if (row["axis"], row["peer"]) == (axis, peer)]
            panel.loglog([r["size"] for r in own], [r["seconds"] for r in own], "o-", label=peer)
        sizes = sorted({row["size"] for row in rows if row["axis"] == axis})
        panel.set_xticks(sizes, sizes)
        panel.set_xticks([], minor=True)  # their labels overlap
        panel.set_xlabel(axis)
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].set_ylabel("seconds per step")
    panels[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str]) -> None:
    """Measure axis by axis; print the table, keep rows and slopes, draw."""
    args = parse(argv)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    os.environ.update(environment())
    load, rows = os.getloadavg()[0], []
    for axis in args.axes:
        rows += points(axis, AXES[axis], args.peers, args.steps, Shape())
    say(table(rows))
    if args.out:
        files.write_json(
            args.out, {"load_before": load, "steps": args.steps, "slopes": slopes(rows), "rows": rows}
        )
    if args.figure:
        draw(rows, args.figure)


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
