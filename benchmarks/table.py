"""From measured seconds to the table: FLOPs, bytes and floors counted from the configuration, never by XLA."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from listopd_jax.models.config import ModelConfig
from listopd_jax.plan import arithmetic
from listopd_jax.plan.arithmetic import Layout, Load
from listopd_jax.plan.chips import Topology
from listopd_jax.report import wording

PHASES = {
    "prefill": ("prefill",),
    "decode": ("decode",),
    "rollout": ("prefill", "decode"),
    "update": ("score", "update"),
    "step": ("prefill", "decode", "score", "update"),
}
"""The phases of listopd_jax.plan.arithmetic that each measured stage consists of."""


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; of a single value that value three times."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def stage_rows(
    shapes: Mapping[str, ModelConfig],
    load: Load,
    layout: Layout,
    topology: Topology,
    turns: Sequence[Mapping[str, float]],
) -> list[dict[str, Any]]:
    """A row for each stage from the seconds of several turns.

    `flops` includes what the backward pass recomputes, as HFU does; MFU leaves it out. `floor_s`: the slowest resource
    of each phase, one phase after another. `floor_share`: floor_s / seconds.
    """  # fmt: skip
    pair = shapes["student"], shapes["teacher"]
    costs = arithmetic.costs(*pair, load, layout)
    floor = arithmetic.roofline(costs, topology, layout.sizes)["phases"]
    again = arithmetic.recomputed_flops(shapes["student"], load, layout.remat)
    rows = []
    for stage, phases in PHASES.items():
        low, seconds, high = spread([turn[stage] for turn in turns])
        flops, floor_s = sum(costs[p].flops for p in phases), sum(floor[p]["seconds"] for p in phases)
        useful = flops - (again if "update" in phases else 0.0)
        peak = seconds * topology.chip.flops
        rows.append(
            {
                "stage": stage,
                "seconds": seconds,
                "seconds_low": low,
                "seconds_high": high,
                "flops": flops,
                "bytes": sum(costs[p].hbm for p in phases),
                "floor_s": floor_s,
                "bound_by": ", ".join(dict.fromkeys(floor[p]["bound_by"] for p in phases)),
                "floor_share": floor_s / seconds,
                "mfu": useful / peak,
                "hfu": flops / peak,
                "tokens_per_s": stage_tokens(stage, load) / seconds,
            }
        )
    return rows


def stage_tokens(stage: str, load: Load) -> float:
    """Tokens that a stage computes: of the prompts, the completions, or both."""
    prompts = load.tokens - load.completion_tokens
    return {"prefill": prompts, "decode": load.completion_tokens}.get(stage, load.tokens)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    head = "stage|seconds (middle half)|TFLOP|GB|floor s|bound by|share of floor|MFU|HFU|tokens/s".split("|")
    return wording.markdown(head, map(_cells, rows))


def _cells(r: Mapping[str, Any]) -> list[str]:
    return [
        r["stage"],
        f"{r['seconds']:.3g} ({r['seconds_low']:.3g}–{r['seconds_high']:.3g})",
        f"{r['flops'] / 1e12:.3g}",
        f"{r['bytes'] / 1e9:.3g}",
        f"{r['floor_s']:.3g}",
        r["bound_by"],
        f"{r['floor_share']:.0%}",
        f"{r['mfu']:.1%}",
        f"{r['hfu']:.1%}",
        f"{r['tokens_per_s']:,.0f}",
    ]
