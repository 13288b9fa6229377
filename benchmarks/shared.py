"""What sharing the prompt saves: the n-completion step against our own step that is given each prompt n times.

    python -m benchmarks.shared [--completions=8] [--prompts=4] [--tokens=700,225] [--layers=10,14] [--steps=3] [--json]

Both do the same work (prompts × n completions of the same forced length), in one process, in turn, with the models of
benchmarks.peers made deeper, as the head and the layer in which a shared prompt ends weigh less in real models. Each
runs as many completions in a gradient pass as the other. The ratio is shared / unshared of a turn; `by arithmetic` is
that of their FLOPs.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from benchmarks.shape import Shape
from benchmarks.table import spread
from listopd_jax.errors import Parser, UserError, exit_code, positive
from listopd_jax.lifecycle import say
from listopd_jax.report import wording

STAGES = ("rollout", "update", "step")
HEAD = ("stage", "shared s", "unshared s", "shared / unshared (middle half)")
WARM_UP = 2


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; UserError for a mistake."""
    parser = Parser(
        prog="python -m benchmarks.shared", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--completions", type=positive, default=8)
    parser.add_argument("--prompts", type=positive, default=4)
    parser.add_argument("--tokens", default="700,225")
    parser.add_argument("--layers", default="10,14", help="of student and teacher; the peers have 4,6")
    parser.add_argument("--steps", type=positive, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    args.prompt, args.response = _pair(
        "--tokens", args.tokens, "tokens of prompt and response, such as 700,225"
    )
    args.student, args.teacher = _pair(
        "--layers", args.layers, "layers of student and teacher, such as 16,20"
    )
    return args


def _pair(flag: str, text: str, wanted: str) -> tuple[int, int]:
    try:
        first, second = map(positive, text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise UserError(f"{flag}={text}: give {wanted}") from None
    return first, second


def configurations(shape: Shape) -> dict[str, ml_collections.ConfigDict]:
    """One prompt per gradient pass with its n completions, and n prompts per pass with one each."""
    from benchmarks.presets import cpu
    from listopd_jax.config import validate

    shared, unshared = cpu(shape), cpu(shape)
    shared.opd.microbatch = 1
    unshared.opd.update(
        batch_size=shape.prompts * shape.completions, rollouts=1, microbatch=shape.completions
    )
    return {"shared": validate(shared), "unshared": validate(unshared)}


def measure(shape: Shape, steps: int) -> dict[str, Any]:
    """Seconds and ratios of both, and the ratio of their FLOPs."""
    from benchmarks.step import Step, timed
    from listopd_jax.plan.arithmetic import Load, step_flops
    from listopd_jax.plan.search import shapes_of

    configs, prompts = configurations(shape), shape.prompt_ids()
    given = {"shared": prompts, "unshared": np.repeat(prompts, shape.completions, 0)}
    runs = {
        name: Step(config, given[name], shape.prompt_tokens, shape.new_tokens)
        for name, config in configs.items()
    }
    turns = [{name: timed(run) for name, run in runs.items()} for _ in range(WARM_UP + steps)][WARM_UP:]
    models = shapes_of(configs["shared"])
    flops = {
        name: sum(
            step_flops(
                models["student"], models["teacher"],
                Load(c.opd.batch_size, c.opd.rollouts, shape.prompt_tokens, shape.new_tokens), c.remat,
            ).values()
        )
        for name, c in configs.items()
    }  # fmt: skip
    return {
        "stages": [_row(stage, turns) for stage in STAGES],
        "flops_ratio": flops["shared"] / flops["unshared"],
        "completions": shape.completions,
        "prompts": shape.prompts,
        "tokens": [shape.prompt_tokens, shape.new_tokens],
        "layers": [shape.student[0], shape.teacher[0]],
        "steps": steps,
    }


def _row(stage: str, turns: Sequence[dict]) -> dict[str, Any]:
    low, ratio, high = spread([turn["shared"][stage] / turn["unshared"][stage] for turn in turns])
    seconds = {name: spread([turn[name][stage] for turn in turns])[1] for name in ("shared", "unshared")}
    return {"stage": stage, **seconds, "ratio": ratio, "ratio_low": low, "ratio_high": high}


def render(result: dict[str, Any]) -> str:
    """The result for a reader."""
    prompt, response = result["tokens"]
    lines = [
        f"{result['prompts']} prompts of {prompt} tokens, {result['completions']} completions each of {response}; "
        f"{result['layers'][0]} and {result['layers'][1]} layers; medians of {result['steps']} turns",
        "",
        wording.markdown(HEAD, map(_cells, result["stages"])),
        "",
        f"by arithmetic {result['flops_ratio']:.2f} of the FLOPs of a step",
    ]
    return "\n".join(lines)


def _cells(r: Mapping[str, Any]) -> list[str]:
    ratio = f"{r['ratio']:.2f} ({r['ratio_low']:.2f}–{r['ratio_high']:.2f})"
    return [r["stage"], f"{r['shared']:.3g}", f"{r['unshared']:.3g}", ratio]


def main(argv: Sequence[str]) -> None:
    """Measure and print; with --json one object on stdout."""
    args = parse(argv)
    shape = Shape(args.completions, args.prompts, args.prompt, args.response)
    shape = dataclasses.replace(shape, student=(args.student, 256), teacher=(args.teacher, 384))
    result = measure(shape, args.steps)
    say(json.dumps(result, indent=1, allow_nan=False) if args.json else render(result))


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
