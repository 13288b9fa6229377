"""The kernels of a program compiled for a GPU, read from its HLO text: what each computes and moves, and how often.

An instruction that is not bookkeeping is one kernel. Slices count for the bytes that are taken, updates in place for
those that are written. Times are a roofline with the rates of chips.py, one kernel after another: cache hits,
concurrent kernels and autotuning are not modelled.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from listopd_jax.plan.chips import Rates
from listopd_jax.plan.hlo import Instruction, Module, array_bytes, callees, dimensions, elements, ints, parse
from listopd_jax.plan.traffic import arriving, collective, group_of

_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id add-dependency "
    "optimization-barrier".split()
)
_SLICES = ("dynamic-slice", "slice", "gather")
_VIEWS = ("bitcast", "reshape", "copy", "transpose", "convert")
_MOVES = frozenset(
    "copy slice dynamic-slice dynamic-update-slice concatenate pad reshape transpose broadcast".split()
)
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([^\]}]*)[\]}]')
_SCORES = re.compile(r'"intermediate_tensor_shape".*?"dimensions": ?\[([^\]]*)\]')
_WORKSPACE = re.compile(r"\bs8\[\d+\]")

Computation = dict[str, Instruction]


class Kernel(NamedTuple):
    """One kernel: bytes and FLOPs of one run, and its runs in one run of the program.

    kind: product, attention, copy (nothing but data is moved), collective, or other. source: where the program asks for
    it.
    """

    name: str
    kind: str
    source: str
    runs: float
    flops: float
    read: float
    written: float

    def seconds(self, rates: Rates) -> float:
        """The time of all its runs."""
        speed = rates.attention if self.kind == "attention" else rates.product
        width = rates.link if self.kind == "collective" else rates.bandwidth
        return self.runs * (rates.launch + max(self.flops / speed, (self.read + self.written) / width))


def kernels(text: str, turns: float = 1) -> list[Kernel]:
    """All kernels of a compiled program; loops whose end only a run knows have `turns` turns."""
    partitions = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
    return list(_walk(parse(text), "ENTRY", 1.0, turns, int(partitions[1]) if partitions else 1))


def _walk(module: Module, name: str, runs: float, turns: float, devices: int) -> Iterator[Kernel]:
    for i in module[name].values():
        if i.opcode in ("while", "conditional", "call"):
            inner = callees(module, i, turns)
            chosen, count = max(
                inner, key=lambda each: len(module[each[0]])
            )  # of a condition the longest branch
            yield from _walk(module, chosen, runs * count, turns, devices)
        # What is asynchronous was counted where it starts.
        elif i.opcode not in _FREE and not i.opcode.endswith(("-done", "-update")):
            yield _kernel(module, module[name], i, runs, devices)


def _kernel(module: Module, around: Computation, i: Instruction, runs: float, devices: int) -> Kernel:
    if collective(i):
        cost = ("collective", 0.0, 0.0, arriving(i, len(group_of(i.rest, devices))))
    elif i.opcode.removesuffix("-start") in ("fusion", "async"):
        cost = _fused(module, module[callees(module, i)[0][0]])
    elif "__cudnn$fmha" in i.rest:
        cost = ("attention", _attention_flops(i), *_moved(around, i))
    else:
        flops = _product_flops(around, i)
        kind = "product" if flops else "copy" if i.opcode.removesuffix("-start") in _MOVES else "other"
        cost = (kind, flops, *_moved(around, i))
    return Kernel(i.name, cost[0], _source(module, i), runs, *cost[1:])


def _source(module: Module, i: Instruction) -> str:
    """The name that jax gave the operation; of a fusion without a name, the last one inside."""
    inside = [j.rest for name, _ in callees(module, i) for j in module[name].values()]
    named = filter(None, (re.search(r'op_name="([^"]*)"', rest) for rest in (i.rest, *reversed(inside))))
    return next((found[1] for found in named), "")


def _fused(module: Module, body: Computation) -> tuple[str, float, float, float]:
    """Kind, FLOPs, bytes read and written of a fusion."""
    flops = sum(_all_product_flops(module, body))
    read = sum(_read(body, i) for i in body.values() if i.opcode == "parameter")
    written = _written(body, next(i for i in body.values() if i.is_root))
    return "product" if flops else "copy" if _only_moves(body) else "other", flops, read, written


def _all_product_flops(module: Module, body: Computation) -> Iterator[float]:
    for i in body.values():
        yield _product_flops(body, i)
        if i.opcode == "fusion":
            yield from _all_product_flops(module, module[callees(module, i)[0][0]])


def _only_moves(body: Computation) -> bool:
    """Whether all arithmetic is about where to read and write: on single numbers."""
    return all(i.opcode in _MOVES | _FREE or elements(i.shape) == 1 for i in body.values())


def _read(body: Computation, source: Instruction) -> float:
    """Bytes that a fusion takes of a parameter, or of a view of it: slices where it only takes slices."""
    size, taken = _result_bytes(source), 0.0
    for user in (i for i in body.values() if source.name in i.operands):
        first = user.operands[0] == source.name
        if first and user.opcode in _SLICES:
            taken += _result_bytes(user)
        elif first and user.opcode in _VIEWS:
            taken += _read(body, user) * size / max(1, _result_bytes(user))
        elif not (first and user.opcode == "dynamic-update-slice"):
            taken += size
    return min(size, taken)


def _written(body: Computation, root: Instruction) -> float:
    """Bytes that a fusion with this root writes: of an update in place the update."""
    if root.opcode == "tuple":
        return sum(_written(body, body[name]) for name in root.operands)
    if root.opcode in ("bitcast", "get-tuple-element"):
        return min(_result_bytes(root), _written(body, body[root.operands[0]]))
    if root.opcode in ("dynamic-update-slice", "scatter"):
        return _result_bytes(body[root.operands[-1 if root.opcode == "scatter" else 1]])
    return _result_bytes(root)


def _moved(around: Computation, i: Instruction) -> tuple[float, float]:
    """Bytes that an instruction outside fusions reads and writes."""
    if i.opcode == "dynamic-update-slice":
        update = _result_bytes(around[i.operands[1]])
        return update, update
    written = _result_bytes(i)
    if i.opcode in _SLICES or i.opcode in ("copy", "copy-start"):
        return written, written
    return sum(_result_bytes(around[name]) for name in i.operands if name in around), written


def _result_bytes(i: Instruction) -> int:
    """Bytes of an instruction's result, without cuBLAS' workspace; for a copy that is started, of the copy."""
    sizes = array_bytes(_WORKSPACE.sub("", i.shape))
    return sizes[0] if i.opcode == "copy-start" else sum(sizes)


def _product_flops(around: Computation, i: Instruction) -> float:
    """2 × elements of the result × contracted elements, of a dot or a call of cuBLAS; 0 of anything else."""
    if i.opcode != "dot" and not (i.opcode == "custom-call" and "__cublas" in i.rest):
        return 0.0
    left, contracted = dimensions(around[i.operands[0]].shape), ints(_CONTRACTED.search(i.rest)[1])
    return 2.0 * elements(i.shape) * math.prod(left[axis] for axis in contracted)


def _attention_flops(i: Instruction) -> float:
    """Scores and mixture, half of them under a causal mask; five products for two in the backward pass."""
    scores = ints(_SCORES.search(i.rest)[1])
    causal = 0.5 if "CAUSAL" in i.rest else 1.0
    backward = 2.5 if "Backward" in i.rest else 1.0
    head = elements(i.shape) / math.prod(scores[:3])
    return 4.0 * math.prod(scores) * head * causal * backward
