"""A token of configs/fashion.py:paper by its compiled program against its floor; for docs/planner.md, prints JSON.

    python tests/measure_decode.py h100:1          # the kernel model of plan --kernels
    python tests/measure_decode.py v5p:2x2x1 4     # tensor 4: the cycles that libtpu's compiler estimates

128 prompts of 700 tokens, 225 tokens each, no drafts. Cycles leave out what is sent between chips: `sent` bytes arrive.
The compiler estimates none for a Pallas kernel. It counts as the bytes that it takes of its operands, at the bandwidth
of the data sheet.
"""

import collections
import json
import re
import sys
from typing import Any

import numpy as np

from listopd_jax.plan.__main__ import set_environment
from listopd_jax.plan.chips import RATES, Topology, parse_topology

LOAD, MXUS, MXU = (128, 1, 700, 225), 8, 128 * 128  # of a v5p chip: two cores of four


def measure(topology: Topology, tensor: int) -> dict[str, float]:
    """Milliseconds per token: the floor and the compiled program's."""
    from configs import fashion
    from listopd_jax.config import validate
    from listopd_jax.parallel.mesh import make_mesh
    from listopd_jax.plan import compile as aot
    from listopd_jax.plan import modelled, search
    from listopd_jax.plan.arithmetic import Load

    config, load = fashion.paper(), Load(*LOAD)
    config.parallel.update(data=1, tensor=tensor)
    config = validate(config)
    decode = search.make_plan(config, topology, load, compile_it=False)["phases"]["decode"]
    mesh = make_mesh(search.layout_of(config, topology).sizes, aot.devices_of(topology))
    turns = modelled.turns_of(config, load)
    programs = aot.rollout_programs(
        modelled.at_mean(config, load), search.shapes_of(config), search.vocabulary(config), mesh,
        [size for size, _ in turns],
    )[1]  # fmt: skip
    found = {"floor_ms": 1e3 * decode["seconds"] / load.response}
    if topology.is_tpu:
        found |= of_cycles(programs, turns, topology)
    else:
        found |= of_kernels(programs, turns, RATES[topology.kind])
    return found | {"ratio": found["compiled_ms"] / found["floor_ms"]}


def of_kernels(programs, turns, rates) -> dict[str, float]:
    """Milliseconds, bytes and kernels of a mean token on a GPU."""
    from listopd_jax.plan.kernels import kernels

    each = [k for p, (_, count) in zip(programs, turns, strict=True) for k in kernels(p.text, count)]
    tokens = sum(count for _, count in turns)
    return {
        "compiled_ms": 1e3 * sum(k.seconds(rates) for k in each) / tokens,
        "bytes": sum(k.runs * (k.read + k.written) for k in each) / tokens,
        "kernels": sum(k.runs for k in each) / tokens,
    }


def of_cycles(programs, turns, topology: Topology) -> dict[str, Any]:
    """Milliseconds and cycles of a mean token on a TPU, the bytes sent to a chip, and `parts` of the first program."""
    each = [per_token(p.text, size, topology.devices) for p, (size, _) in zip(programs, turns, strict=True)]
    cycles, read, sent = np.average(each, axis=0, weights=[count for _, count in turns]).tolist()
    clock = topology.chip.flops / (2 * MXUS * MXU)
    in_kernels = clock * read / topology.chip.bandwidth
    cycles += in_kernels
    found = {"compiled_ms": 1e3 * cycles / clock, "cycles": cycles, "in_kernels": in_kernels, "sent": sent}
    return found | {"parts": parts(programs[0].text, turns[0][0])}


def per_token(text: str, size: int, devices: int) -> tuple[float, float, float]:
    """Of one turn of the loop over `size` tokens: cycles, bytes that kernels read, bytes that it brings to a chip."""
    from listopd_jax.plan.hlo import parse
    from listopd_jax.plan.traffic import arriving, collective, group_of, runs_of

    module, cycles, read, sent = parse(text), 0.0, 0.0, 0.0
    for name, runs in runs_of(module).items():
        for i in module[name].values() if runs >= size else ():
            cycles += runs / size * estimated(i)
            read += runs / size * taken(module[name], i) if "tpu_custom_call" in i.rest else 0
            sent += runs / size * arriving(i, len(group_of(i.rest, devices))) if collective(i) else 0
    return cycles, read, sent


def parts(text: str, size: int) -> dict[str, float]:
    """Cycles of one turn by what it computes, without kernels; `once` is outside the loop over the layers."""
    from listopd_jax.plan.hlo import parse
    from listopd_jax.plan.traffic import runs_of

    module, found = parse(text), collections.Counter()
    for name, runs in runs_of(module).items():
        for i in module[name].values() if runs >= size else ():
            found[part_of(i, runs / size)] += runs / size * estimated(i)
    return dict(found)


def part_of(i, runs: float) -> str:
    """Which part of a token an instruction belongs to, by the name that jax gave its operation."""
    named = re.search(r'op_name="([^"]*)"', i.rest)
    name = named[1] if named else ""
    if runs < 2:
        return (
            "once: new keys turned" if i.opcode == "copy" and estimated(i) > 10**5 else "once: head, sampler"
        )
    if re.search("bk?n?k?t?g[hs],", name):
        return "attention's products"
    weights = name.endswith(("checkpoint/dot_general", "jit(dynamic_index_in_dim)/dynamic_slice"))
    return "products with weights" if weights else "merging, norms, rotations"


def estimated(i) -> int:
    """The compiler's estimate of an instruction's cycles, 0 if it gives none."""
    found = re.search(r'"estimated_cycles":"(\d+)"', i.rest)
    return int(found[1]) if found else 0


def taken(around, kernel) -> float:
    """Bytes that a kernel reads: all of an operand, or one layer of those that have an axis of layers."""
    from listopd_jax.plan.hlo import array_bytes, dimensions

    shapes = [around[name].shape for name in kernel.operands if name in around]
    layers = max(len(dimensions(s)) for s in shapes)
    return sum(
        sum(array_bytes(s)) / (dimensions(s)[0] if len(dimensions(s)) >= layers - 1 else 1) for s in shapes
    )


if __name__ == "__main__":
    described = parse_topology(sys.argv[1])
    set_environment(described)
    print(json.dumps(measure(described, int(sys.argv[2]) if len(sys.argv) > 2 else 1)))
