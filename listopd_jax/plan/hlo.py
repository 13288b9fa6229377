"""The HLO text of a compiled program as data: computations of instructions, and how often each runs."""

import math
import re
from typing import NamedTuple

_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
_ARRAY = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"^(\d+)\)")


class Instruction(NamedTuple):
    """One line of HLO; `rest` is all that follows the opening parenthesis of its operands."""

    name: str
    shape: str
    opcode: str
    rest: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """Names in the parentheses."""
        depth = 1
        for end, letter in enumerate(self.rest):
            # Operands of a tuple type have parentheses of their own, and attributes follow the closing one.
            depth += {"(": 1, ")": -1}.get(letter, 0)
            if not depth:
                return _NAME.findall(self.rest[:end])
        return []


Module = dict[str, dict[str, Instruction]]


def parse(text: str) -> Module:
    """Computations by name, each with its instructions by name, in order; the entry's name is ENTRY."""
    module: Module = {}
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = module["ENTRY" if header[1] else header[2]] = {}
        elif found := _INSTRUCTION.match(line):
            current[found[2]] = Instruction(found[2], found[3], found[4], found[5], bool(found[1]))
    return module


def callees(module: Module, i: Instruction, turns: float | None = None) -> list[tuple[str, float]]:
    """The computations that an instruction runs, and how often; all branches of a condition.

    A loop whose end only a run knows has `turns` turns; None: the largest number in its condition, which for decoding
    is the budget.
    """
    if i.opcode != "while":
        branches = _NAME.findall(" ".join(_BRANCHES.findall(i.rest)))
        return [(name, 1) for name in (*_CALLED.findall(i.rest), *branches) if name in module]
    condition, body = (re.search(rf"{role}=%?([\w.\-]+)", i.rest)[1] for role in ("condition", "body"))
    if known := _TURNS.search(i.rest):
        return [(body, int(known[1]))]
    found = (_CONSTANT.match(c.rest) for c in module[condition].values() if c.opcode == "constant")
    bound = max((int(number[1]) for number in found if number), default=1)
    return [(body, bound if turns is None else turns)]


def array_bytes(shape: str) -> list[int]:
    """Bytes of each array of a shape, which may be a tuple."""
    return [_BYTES[kind] * math.prod(ints(dims)) for kind, dims in _ARRAY.findall(shape)]


def elements(shape: str) -> int:
    """Elements of the first array of a shape."""
    return math.prod(dimensions(shape))


def dimensions(shape: str) -> list[int]:
    """Dimensions of the first array of a shape."""
    return ints(re.search(r"\w+\[([\d,]*)\]", shape)[1])


def ints(text: str) -> list[int]:
    """The whole numbers in a text."""
    return [int(n) for n in re.findall(r"\d+", text)]
