"""Have the compiled programs grown? Instructions, FLOPs, bytes and temporaries against the last recorded ones.

    make bench-smoke                           # compare; exit code 1 if one grew by more than 15 %
    python -m benchmarks.smoke --record        # after an intended change

Nothing runs and no time is measured, so a busy machine changes nothing. Counts are of one compiler: with another jax
than the recorded one the ratios are printed and decide nothing.
"""

import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence

import jax

from benchmarks.presets import cpu
from benchmarks.shape import Shape
from listopd_jax import files
from listopd_jax.config import validate
from listopd_jax.errors import Parser, exit_code
from listopd_jax.parallel.mesh import AXES, make_mesh
from listopd_jax.plan.compile import Program, compile_update, rollout_programs
from listopd_jax.plan.hlo import parse
from listopd_jax.plan.kernels import kernels
from listopd_jax.plan.search import shapes_of, vocabulary
from listopd_jax.rollout.decode import cache_sizes

RECORD = pathlib.Path(__file__).with_name("results") / "smoke.json"
MOST = 1.15


def programs(completions: int) -> Iterator[tuple[str, Program]]:
    """Prefill, a decode step without and with drafts, and the update, at the shape that peers are compared in."""
    config = cpu(Shape(completions=completions))
    mesh, budget = make_mesh(dict.fromkeys(AXES, 1)), config.task.max_response
    arguments = shapes_of(config), vocabulary(config), mesh
    for drafts in (0, 7):
        config.rollout.draft_tokens = drafts
        first, (decode,) = rollout_programs(validate(config), *arguments, cache_sizes(budget, drafts)[-1:])
        if not drafts:
            yield f"n={completions} prefill", first
        yield f"n={completions} decode step, at most {drafts} drafted", decode
    yield f"n={completions} update", compile_update(validate(config), *arguments)


def figures(program: Program) -> dict[str, float]:
    """Figures that may not grow; loops of unknown length count once."""
    found = list(kernels(program.text))
    return {
        "instructions": sum(map(len, parse(program.text).values())),
        "flops": sum(k.runs * k.flops for k in found),
        "bytes": sum(k.runs * (k.read + k.written) for k in found),
        "temporaries": program.temporaries,
    }


def compare(now: Mapping[str, dict[str, float]], then: Mapping[str, dict[str, float]]) -> list[str]:
    """Print a line per program; those figures that grew by more than MOST."""
    grown = [
        f"{name}: recorded, but no longer compiled; --record" for name in sorted(then.keys() - now.keys())
    ]
    for name, found in now.items():
        ratios = {k: v / max(1, then[name][k]) for k, v in found.items() if name in then}
        print(f"{name:36}", *(f"{k} {ratio:5.2f}" for k, ratio in ratios.items() or [("new", 1)]), sep="  ")
        grown += [f"{name}: {k} {r:.2f} times the recorded" for k, r in ratios.items() if r > MOST]
    return grown


def main(argv: Sequence[str]) -> int:
    """0; 1 if a figure grew."""
    parser = Parser(prog="python -m benchmarks.smoke")
    parser.add_argument("--record", action="store_true", help="make today's figures the recorded ones")
    args = parser.parse_args(argv)
    now = {name: figures(program) for n in (1, 8) for name, program in programs(n)}
    if args.record:
        files.write_json(RECORD, {"jax": jax.__version__, "programs": now})
        return 0
    record = json.loads(RECORD.read_text())
    grown = compare(now, record["programs"])
    if record["jax"] != jax.__version__:
        print(f"recorded with jax {record['jax']}, not {jax.__version__}: no verdict")
        return 0
    print(*grown, sep="\n")
    return 1 if grown else 0


if __name__ == "__main__":
    os.environ.pop("XLA_FLAGS", None)  # what is recorded is compiled with XLA's defaults
    jax.config.update("jax_platforms", "cpu")
    sys.exit(exit_code(main, sys.argv[1:]))
