"""Bytes that a compiled program moves between devices, by mesh axis.

Bytes are those that arrive at one device by a ring. A group of devices is charged to the mesh axes along which it
extends ("data+fsdp").
"""

import math
import re
from collections.abc import Mapping

import numpy as np

from listopd_jax.plan.hlo import Instruction, Module, array_bytes, callees, ints, parse

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def traffic(text: str, sizes: Mapping[str, int]) -> dict[str, float]:
    """Bytes that arrive at one device along each mesh axis of `sizes` (or axes, joined by +) in one run."""
    module = parse(text)
    total: dict[str, float] = {}
    for name, times in runs_of(module).items():
        for i in filter(collective, module[name].values()):
            group = group_of(i.rest, math.prod(sizes.values()))
            if axes := _axes(group, sizes):
                total[axes] = total.get(axes, 0.0) + times * arriving(i, len(group))
    return total


def collective(i: Instruction) -> str:
    """Which of COLLECTIVES an instruction is or starts; empty: none."""
    kind = i.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else ""


def runs_of(module: Module) -> dict[str, float]:
    """How often each computation runs, following calls and loops from the entry."""
    runs: dict[str, float] = {}

    def visit(name: str, times: float) -> None:
        runs[name] = runs.get(name, 0.0) + times
        for i in module[name].values():
            for callee, count in () if collective(i) else callees(module, i):
                visit(callee, times * count)

    visit("ENTRY", 1.0)
    return runs


def group_of(attributes: str, devices: int) -> np.ndarray:
    """One of the groups of devices of a collective; of a permutation, one pair that is not itself."""
    if pairs := re.search(r"source_target_pairs=\{\{(.*?)\}\}", attributes):
        each = [tuple(map(int, pair.split(","))) for pair in pairs[1].split("},{")]
        return np.array(next((pair for pair in each if pair[0] != pair[1]), each[0]))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return np.array([int(n) for n in listed[1].split(",")])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        ids = np.arange(devices).reshape(ints(iota[2]))
        ids = ids.transpose(ints(iota[3])) if iota[3] else ids
        return ids.reshape(ints(iota[1]))[0]
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S*)? ?\{([^}]*)\}", attributes):
        axes = re.findall(r"'([^']+)'=(\d+)", named[1])
        chosen = set(re.findall(r"'([^']+)'", named[2]))
        ids = np.arange(devices).reshape([int(size) for _, size in axes])
        return ids[tuple(slice(None) if name in chosen else 0 for name, _ in axes)].reshape(-1)
    return np.arange(devices)


def _axes(group: np.ndarray, sizes: Mapping[str, int]) -> str:
    """The mesh axes along which the members of `group` differ; device ids count in the mesh's order."""
    coordinates = np.unravel_index(group, tuple(sizes.values()))
    return "+".join(axis for axis, at in zip(sizes, coordinates, strict=True) if np.ptp(at))


def arriving(i: Instruction, group: int) -> float:
    """Bytes that a collective brings to each of the `group` devices that take part."""
    kind, sizes, share = collective(i), array_bytes(i.shape), (group - 1) / group
    if (
        i.opcode.endswith("-start") and kind != "all-reduce"
    ):  # (operands, results, …): the results end on the device
        count = len(i.operands)
        sizes = sizes[count : 2 * count]
    times = {
        "all-gather": share,
        # A reduce-scatter and an all-gather of the result.
        "all-reduce": 2 * share,
        # `sizes` are of the result, 1/g of what is reduced: (g−1)/g of that arrives.
        "reduce-scatter": group - 1,
        "all-to-all": share,
        "collective-permute": 1,
    }
    return sum(sizes) * times[kind]
