"""Where the time of one on-policy distillation step goes, against the floor that arithmetic gives.

    python -m benchmarks.opd_step --preset=cpu [--completions=8]    the shape of benchmarks.peers
    python -m benchmarks.opd_step --preset=paper                    EC's step: Qwen3-1.7B and 4B, for one H100
    python -m benchmarks.opd_step --preset=paper_small              the same programs at a size for a CPU
    python -m benchmarks.opd_step --preset=tpu [--topology=v5p:2x2x2]    compile only: memory and floor, no times

Weights are random and lengths forced. FLOPs and bytes are counted from the configuration. `prefill` is a rollout that
stops after one token, `decode` the rest of the rollout. `--trace=DIR` also writes a profile of one more step:
`xprof DIR` shows it in a browser; DIR/plugins/profile/*/perfetto_trace.json.gz opens in ui.perfetto.dev.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from listopd_jax.config import REMATS
from listopd_jax.errors import Parser, UserError, exit_code, positive
from listopd_jax.lifecycle import say

WARM_UP = 2
RUNS = ("cpu", "paper", "paper_small")
TPU = {"tpu": ("paper", "v5p:2x2x2"), "tpu_small": ("tiny", "v5e:2x4")}  # preset of configs/fashion.py, slice


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; UserError for a mistake."""
    parser = Parser(
        prog="python -m benchmarks.opd_step", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--preset", choices=(*RUNS, *TPU), required=True)
    parser.add_argument("--completions", type=positive, help="of each prompt; default: the preset's")
    parser.add_argument(
        "--microbatch", type=positive, help="prompts per gradient pass; default: the preset's"
    )
    parser.add_argument("--remat", choices=REMATS, help="default: the preset's")
    parser.add_argument("--drafts", type=int, default=0, help="most tokens drafted per row and decode step")
    parser.add_argument(
        "--confirmed",
        type=float,
        help="confirm each drafted token with this probability: random weights do not",
    )
    parser.add_argument("--steps", type=positive, help="measured steps, after two that warm up; default: 5")
    parser.add_argument("--trace", metavar="DIR", help="write a profile of one more step")
    parser.add_argument("--topology", help="of a tpu preset, as listopd_jax.plan takes it")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if args.topology and args.preset not in TPU:
        raise UserError("--topology: only the tpu presets compile for a described slice")
    if args.preset in TPU and any(
        (args.trace, args.completions, args.microbatch, args.remat, args.steps, args.drafts)
    ):
        raise UserError(f"--preset={args.preset} compiles only: it takes --topology and --json")
    if args.confirmed is not None and not (args.drafts and 0 <= args.confirmed <= 1):
        raise UserError(f"--confirmed={args.confirmed:g}: must be a probability, and needs --drafts")
    if args.trace:
        _make_folder(args.trace)
    return args


def _make_folder(folder: str) -> None:
    """So that a profile that cannot be written is refused before anything is measured."""
    try:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--trace={folder}: cannot be written ({e.strerror}); choose another folder") from e


def main(argv: Sequence[str]) -> None:
    """Measure and print; with --json one object on stdout."""
    args = parse(argv)
    if args.preset in TPU:
        compile_only(args)
        return
    from benchmarks.confirmed import confirmed

    config, tokens = configured(args)
    with confirmed(args.confirmed):
        result = fitting(config, tokens, args.steps or 5, args.trace)
    result = {"preset": args.preset, "confirmed": args.confirmed} | result
    say(json.dumps(result, indent=1, allow_nan=False) if args.json else render(result))


def configured(args: argparse.Namespace) -> tuple[Any, tuple[int, int]]:
    """The preset's configuration with the flags' changes, and its mean tokens; UserError if they do not fit."""
    from benchmarks.presets import PRESETS
    from listopd_jax.config import validate

    make, tokens = PRESETS[args.preset]
    config = make()
    config.opd.rollouts = args.completions or config.opd.rollouts
    config.opd.microbatch = args.microbatch or config.opd.microbatch
    config.remat = args.remat or config.remat
    config.rollout.draft_tokens = args.drafts
    return validate(config), tokens


def fitting(config: Any, *arguments: Any) -> dict[str, Any]:
    """`measure`; UserError where the device's memory does not suffice."""
    import jax

    try:
        return measure(config, *arguments)
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        first = str(e).splitlines()[0]
        now = f"microbatch {config.opd.microbatch}, remat {config.remat}"
        raise UserError(f"does not fit this device with {now} ({first}); try a smaller --microbatch") from e


def measure(config: Any, tokens: tuple[int, int], steps: int, trace: str | None = None) -> dict[str, Any]:
    """Run the step `steps` times after warming up: rows of the table, memory, device, versions."""
    import jax

    from benchmarks.device import peak_memory, peak_of
    from benchmarks.memory import forget_peak
    from benchmarks.step import Step, random_prompts, timed_stages
    from benchmarks.table import stage_rows
    from listopd_jax.plan.arithmetic import Load
    from listopd_jax.plan.search import layout_of, shapes_of

    device = jax.devices()[0]
    peak = peak_of(device, config.dtype.compute)
    step = Step(config, random_prompts(config, tokens[0]), *tokens)
    for _ in range(WARM_UP):
        timed_stages(step)
    forget_peak()
    turns = [timed_stages(step) for _ in range(steps)]
    memory, counted = peak_memory(device)
    if trace:
        write_trace(step, trace)
    load = Load(config.opd.batch_size, config.opd.rollouts, *tokens)
    return {
        "device": device.device_kind,
        "versions": versions(),
        "peak_flops": peak.chip.flops,
        "peak_bytes_per_s": peak.chip.bandwidth,
        "peak_source": peak.source,
        "load": load._asdict(),
        "microbatch": config.opd.microbatch,
        "remat": config.remat,
        "compute": config.dtype.compute,
        "drafts": step.drafts,
        "tokens_per_step": step.tokens_per_step,
        "steps": steps,
        "memory_bytes": memory,
        "memory_counts": counted,
        "stages": stage_rows(shapes_of(config), load, layout_of(config, peak.topology), peak.topology, turns),
    }


def write_trace(step: Any, folder: str) -> None:
    """A profile of one rollout and one update into `folder`."""
    import jax

    try:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            with jax.profiler.TraceAnnotation("rollout"):
                rollout = step.rollout()
            with jax.profiler.TraceAnnotation("update"):
                step.update(rollout)
    except OSError as e:
        raise UserError(
            f"--trace={folder}: cannot be written ({e.strerror or e}); choose another folder"
        ) from e


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that make the programs."""
    import platform
    from importlib.metadata import version

    return {"python": platform.python_version()} | {name: version(name) for name in ("jax", "jaxlib", "flax")}


def compile_only(args: argparse.Namespace) -> None:
    """The planner's verdict on a slice that need not exist (docs/planner.md), by its own command."""
    preset, topology = TPU[args.preset]
    root = pathlib.Path(__file__).parents[1]
    flags = [
        f"--config={root / 'configs' / 'fashion.py'}:{preset}",
        f"--topology={args.topology or topology}",
        "--config.parallel.data=1",
        "--config.parallel.fsdp=-1",
    ]
    command = [sys.executable, "-m", "listopd_jax.plan", *flags, *["--json"] * args.json]
    code = subprocess.run(command, cwd=root).returncode
    if code:
        raise SystemExit(code)


def render(result: dict[str, Any]) -> str:
    """The measurement for a reader."""
    from benchmarks.table import markdown

    load, gib = result["load"], result["memory_bytes"] / 2**30
    drafts = f", {result['drafts']} drafts: {result['tokens_per_step']:.2f} tokens per step" * bool(
        result["drafts"]
    )
    software = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return "\n".join(
        [
            f"{result['preset']} on {result['device']} ({software}); medians of {result['steps']} steps",
            f"{load['prompts']} prompts of {load['prompt']:g} tokens, {load['rollouts']} completions each of "
            f"{load['response']:g}; {result['compute']}, microbatch {result['microbatch']}, "
            f"remat {result['remat']}{drafts}",
            f"peak {result['peak_flops'] / 1e9:,.0f} GFLOP/s, {result['peak_bytes_per_s'] / 1e9:,.0f} GB/s "
            f"({result['peak_source']})",
            "",
            markdown(result["stages"]),
            "",
            f"memory {gib:.2f} GiB: {result['memory_counts']}",
        ]
    )


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
