"""Where a thread of the GPU kernels finds what a turn brings it: the arithmetic that it is given, folded by MLIR's own canonicaliser."""

import itertools
import re

import pytest
from jax._src.interpreters import mlir
from jaxlib.mlir import ir, passmanager
from jaxlib.mlir.dialects import arith, func

from kernels.attention import mosaic_turns
from kernels.attention.mosaic_threads import i32

PLACES = list(itertools.product((0, 7, 21, 55), (0, 2, 6), (0, 3, 7), (0, 1), (0, 1)))  # y0, x0, g, s, e


def folded(build):
    """The numbers that `build` makes of constants."""
    with mlir.make_ir_context(), ir.Location.unknown():
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):

            @func.FuncOp.from_py_func()
            def numbers():
                wide = ir.IntegerType.get_signless(64)
                made = (x if x.type != ir.IndexType.get() else arith.index_cast(wide, x) for x in build())
                return [x if x.type == wide else arith.extsi(wide, x) for x in made]

        passmanager.PassManager.parse("builtin.module(canonicalize)").run(module.operation)
        text = str(module)
    constants = {name: int(n) for name, n in re.findall(r"(%[\w\-]+) = arith.constant (-?\d+) : i64", text)}
    return [constants[name] for name in re.search(r"return (.*?) :", text)[1].split(", ")]


def thread(y0, x0):
    made = object.__new__(mosaic_turns._Thread)
    made._y, made._x = i32(y0), i32(x0)
    return made


@pytest.mark.parametrize("row", [mosaic_turns.Y, mosaic_turns.X, mosaic_turns.X_LESS_Y])
@pytest.mark.parametrize("column", [mosaic_turns.X, mosaic_turns.X_LESS_Y, mosaic_turns.Y_LESS_X, mosaic_turns.SUM])
def test_addresses(row, column):
    found = folded(lambda: [thread(y, x).address(row, column, g, s, e) for y, x, g, s, e in PLACES])
    for (y0, x0, g, s, e), address in zip(PLACES, found, strict=True):
        y, x = y0 + 8 * s, x0 + 8 * g + e
        expected = ((row[0] * y + row[1] * x) % 64) * 72 + (column[0] * y + column[1] * x) % 64
        assert address == expected, (y, x)


@pytest.mark.parametrize("coefficients", [(1, 1), (-1, -1), (-1, 1), (1, -1)])
def test_conditions(coefficients):
    found = folded(lambda: [thread(y, x).at(coefficients, g, s, e) for y, x, g, s, e in PLACES] + [i32(-63)])
    a, b = coefficients
    assert found == [a * (y0 + 8 * s) + b * (x0 + 8 * g + e) for y0, x0, g, s, e in PLACES] + [-63]
