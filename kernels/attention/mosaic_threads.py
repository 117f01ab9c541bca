"""What code below Pallas says of a warpgroup's threads, in MLIR."""

from __future__ import annotations

from collections.abc import Callable

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf

WARPS, THREADS = 4, 128  # of a warpgroup


def for_each_place(ref: ir.Value, visit: Callable[[ir.Value], object]) -> None:
    """visit(place) for every place of a vector in memory, divided among the threads of a warpgroup."""
    (length,) = ir.MemRefType(ref.type).shape
    thread = index(arith.andi(utils.thread_idx(), i32(THREADS - 1)))
    stop, step = (arith.constant(ir.IndexType.get(), n) for n in (length, THREADS))
    loop = scf.ForOp(thread, stop, step)
    with ir.InsertionPoint(loop.body):
        visit(loop.induction_variable)
        scf.yield_([])


def i32(value: int) -> ir.Value:
    return utils.c((value + 2**31) % 2**32 - 2**31, ir.IntegerType.get_signless(32))


def index(value: ir.Value) -> ir.Value:
    return arith.index_cast(ir.IndexType.get(), value)
