"""How many bytes does a compiled program read and write, operation by operation? From the text of a program for a GPU.

On a GPU every operation of XLA's final program brings its operands from memory and puts its results there, but for what a cache still
holds. So formulations of what is bound by memory can be compared without a GPU; it is no time.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

PRODUCTS, KERNELS, REST = "matrix products", "fused kernels", "the rest"

_BITS = {"pred": 8, "s4": 4, "u4": 4} | {
    f"{kind}{bits}": bits for kind in ("s", "u", "f", "bf") for bits in (8, 16, 32, 64)
}
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\((.*)")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "iota", "partition-id"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # and which operand is what changes


class Traffic(NamedTuple):
    """Bytes of all runs of one operation, its kind (`PRODUCTS`, …), and what of the model XLA made it from, where it says."""

    name: str
    kind: str
    read: int
    written: int
    runs: int
    operation: str

    @property
    def bytes(self) -> int:
        return self.read + self.written


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    line: str


def traffic(program: str) -> list[Traffic]:
    """Of a compiled program's text, the most bytes first. An array of which a slice is read or written counts as the slice; of a
    conditional all branches count."""
    computations = _computations(program)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", program, re.MULTILINE)
    if entry is None:
        raise ValueError("the text of a program has a line that begins with ENTRY")
    return sorted(_of(computations, entry[1], 1), key=lambda found: -found.bytes)


def by_kind(found: list[Traffic]) -> dict[str, int]:
    """Bytes of each kind."""
    bytes_ = collections.Counter({PRODUCTS: 0, KERNELS: 0, REST: 0})
    for operation in found:
        bytes_[operation.kind] += operation.bytes
    return dict(bytes_)


def _computations(program: str) -> dict[str, list[_Instruction]]:
    found: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    for line in program.splitlines():
        if begins := _COMPUTATION.match(line):
            current = found.setdefault(begins[1], [])
        elif match := _INSTRUCTION.match(line):
            name, shape, opcode, rest = match.groups()
            current.append(_Instruction(name, shape, opcode, tuple(_operands(rest)), line))
    return found


def _operands(rest: str) -> list[str]:
    """The names before the parenthesis that closes what `rest` is within."""
    depth = 1
    for i, letter in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return re.findall(r"%([\w.\-]+)", rest[:i])
    return []


def _of(computations: dict[str, list[_Instruction]], name: str, runs: int) -> Iterator[Traffic]:
    shapes = {instruction.name: instruction.shape for instruction in computations[name]}
    for instruction in computations[name]:
        called = _called(instruction.line)
        if instruction.opcode == "while":
            turns = _TURNS.search(instruction.line)
            yield from _of(computations, called["body"][0], runs * int(turns[1]) if turns else runs)
        elif instruction.opcode in ("call", "conditional", "async-start"):
            for inner in (c for names in called.values() for c in names if c in computations):
                yield from _of(computations, inner, runs)
        elif instruction.opcode not in _FREE and not instruction.opcode.endswith(("-done", "-update")):
            fused = computations.get(called.get("calls", [""])[0], [])
            read, written = _fusion(instruction, fused, shapes) if fused else _plain(instruction, shapes)
            made_from = re.search(r'op_name="([^"]*)"', instruction.line)
            kind, operation = _kind(instruction, fused), made_from[1] if made_from else ""
            yield Traffic(instruction.name, kind, runs * read, runs * written, runs, operation)


def _called(line: str) -> dict[str, list[str]]:
    """The computations that an instruction names: {"calls", "body", "branches" …: names}."""
    lists = re.findall(r"(calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line)
    found = {attribute: [name] for attribute, name in lists}
    if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
        found["branches"] = re.findall(r"%?([\w.\-]+)", branches[1])
    return found


def _kind(instruction: _Instruction, fused: list[_Instruction]) -> str:
    target = re.search(r'custom_call_target="([^"]*)"', instruction.line)
    if (target and "cublas" in target[1]) or any(x.opcode in ("dot", "convolution") for x in (instruction, *fused)):
        return PRODUCTS
    return KERNELS if target else REST


def _plain(instruction: _Instruction, shapes: dict[str, str]) -> tuple[int, int]:
    sizes = [_bytes(shapes.get(operand, "")) for operand in instruction.operands]
    written = _bytes(instruction.shape)
    if instruction.opcode in _SLICES:
        return written + sum(sizes[1:]), written
    if instruction.opcode in _IN_PLACE:
        changed = sizes[_IN_PLACE[instruction.opcode]]
        return sum(sizes[1:]), changed
    return sum(dict(zip(instruction.operands, sizes, strict=True)).values()), written


def _fusion(instruction: _Instruction, fused: list[_Instruction], shapes: dict[str, str]) -> tuple[int, int]:
    by_name = {x.name: x for x in fused}
    users = collections.defaultdict(list)
    for x in fused:
        for place, operand in enumerate(x.operands):
            users[operand].append((x, place))
    parameters = {int(re.search(r"parameter\((\d+)\)", x.line)[1]): x for x in fused if x.opcode == "parameter"}
    # An operand that is given twice is read once.
    first = {operand: parameters[n] for n, operand in reversed(list(enumerate(instruction.operands)))}
    read = sum(min(_read_of(x, users), _bytes(shapes.get(name, x.shape))) for name, x in first.items())
    root = next(x for x in fused if re.match(r"\s+ROOT ", x.line))
    results = [by_name[o] for o in root.operands] if root.opcode == "tuple" else [root]
    return read, sum(_written_of(result, by_name) for result in results)


def _read_of(array: _Instruction, users: dict[str, list[tuple[_Instruction, int]]]) -> int:
    total = 0
    for user, place in users[array.name]:
        if user.opcode == "bitcast":
            total += _read_of(user, users)
        elif user.opcode in _SLICES and place == 0:
            total += _bytes(user.shape)
        elif not (user.opcode in _IN_PLACE and place == 0):
            return _bytes(array.shape)
    return min(total, _bytes(array.shape))


def _written_of(result: _Instruction, by_name: dict[str, _Instruction]) -> int:
    while result.opcode == "bitcast":
        result = by_name[result.operands[0]]
    if result.opcode in _IN_PLACE:
        return _bytes(by_name[result.operands[_IN_PLACE[result.opcode]]].shape)
    return _bytes(result.shape)


def _bytes(shape: str) -> int:
    """Of an array, or of all of a tuple."""
    sizes = (
        _BITS.get(kind, 0) * math.prod(map(int, filter(None, axes.split(",")))) for kind, axes in _ARRAY.findall(shape)
    )
    return -(-sum(sizes) // 8)
