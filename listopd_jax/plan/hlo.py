"""Bytes that a compiled program moves between devices, by mesh axis, read from its HLO text.

A collective in a loop's body counts as often as the loop runs: the largest integer constant in its condition, which for
decoding is the budget. Bytes are those that arrive at one device by a ring. A group of devices is charged to the mesh
axes along which it extends ("data+fsdp").
"""

import math
import re
from collections.abc import Mapping

import numpy as np

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_SHAPE = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")
_WHILE = re.compile(r"while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")


def traffic(text: str, sizes: Mapping[str, int]) -> dict[str, float]:
    """Bytes that arrive at one device along each mesh axis of `sizes` (or axes, joined by +) in one run."""
    computations = _computations(text)
    total: dict[str, float] = {}
    for name, times in _runs(computations).items():
        for line in computations[name]:
            if found := _COLLECTIVE.search(line):
                group = _group(line, math.prod(sizes.values()))
                axes = _axes(group, sizes)
                if axes:
                    size = times * _arriving(found[1], found[2], bool(found[3]), len(group))
                    total[axes] = total.get(axes, 0.0) + size
    return total


def _computations(text: str) -> dict[str, list[str]]:
    """Lines of each computation; the entry is named ENTRY."""
    computations, lines = {}, []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = computations["ENTRY" if header[1] else header[2]] = []
        else:
            lines.append(line)
    return computations


def _runs(computations: Mapping[str, list[str]]) -> dict[str, float]:
    """How often each computation runs, following calls and loops from the entry."""
    runs: dict[str, float] = {}

    def visit(name: str, times: float) -> None:
        runs[name] = runs.get(name, 0.0) + times
        for line in computations.get(name, ()):
            for callee, count in _callees(line, computations):
                visit(callee, times * count)

    visit("ENTRY", 1.0)
    return {name: times for name, times in runs.items() if name in computations}


def _callees(line: str, computations: Mapping[str, list[str]]) -> list[tuple[str, int]]:
    if loop := _WHILE.search(line):
        bounds = [int(n) for row in computations.get(loop[1], ()) for n in _CONSTANT.findall(row)]
        return [(loop[2], max(bounds, default=1))]
    if _COLLECTIVE.search(line):
        return []
    called = _CALLED.findall(line)
    for branches in _BRANCHES.findall(line):
        called += re.findall(r"[\w.\-]+", branches)
    return [(name, 1) for name in called]


def _group(line: str, devices: int) -> np.ndarray:
    """One of the groups of devices of a collective; of a permutation, one pair that is not itself."""
    if pairs := re.search(r"source_target_pairs=\{\{(.*?)\}\}", line):
        each = [tuple(map(int, pair.split(","))) for pair in pairs[1].split("},{")]
        return np.array(next((pair for pair in each if pair[0] != pair[1]), each[0]))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return np.array([int(n) for n in listed[1].split(",")])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        ids = np.arange(devices).reshape(_ints(iota[2]))
        ids = ids.transpose(_ints(iota[3])) if iota[3] else ids
        return ids.reshape(_ints(iota[1]))[0]
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S*)? ?\{([^}]*)\}", line):
        axes = re.findall(r"'([^']+)'=(\d+)", named[1])
        chosen = set(re.findall(r"'([^']+)'", named[2]))
        ids = np.arange(devices).reshape([int(size) for _, size in axes])
        return ids[tuple(slice(None) if name in chosen else 0 for name, _ in axes)].reshape(-1)
    return np.arange(devices)


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _axes(group: np.ndarray, sizes: Mapping[str, int]) -> str:
    """The mesh axes along which the members of `group` differ; device ids count in the mesh's order."""
    coordinates = np.unravel_index(group, tuple(sizes.values()))
    return "+".join(axis for axis, at in zip(sizes, coordinates, strict=True) if np.ptp(at))


def _arriving(result: str, kind: str, started: bool, group: int) -> float:
    shapes = [_BYTES[t] * math.prod(_ints(dims) if dims else []) for t, dims in _SHAPE.findall(result)]
    # The result of a start is (operand, result, …): the larger one is what ends on the device.
    is_pair = started and kind in ("all-gather", "collective-permute")
    size = max(shapes) if is_pair else sum(shapes)
    share = (group - 1) / group
    return (
        size
        * {
            "all-gather": share,
            "all-reduce": 2 * share,
            "reduce-scatter": group - 1,
            "all-to-all": share,
            "collective-permute": 1,
        }[kind]
    )
