"""Sums along the diagonals of a tile in registers, added to a line in device memory: the transpose of `mosaic.toeplitz`.

A warp of a WGMMA tile has 16 rows, and its lane 4r + c of rows r and r + 8 the columns 8g + 2c and 8g + 2c + 1 for every g.
Its lanes add what they share by shuffles, each time keeping one half of the sums and sending the other, until every sum is in
one lane; the four warps then meet in shared memory. Which lane gives what to which is written once, in `of_a_warp`, for
registers on a GPU and for arrays of 32 lanes in tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, scf, vector

from kernels.attention.mosaic import steps
from kernels.attention.mosaic_threads import THREADS, WARPS, for_each_place, i32, index
from kernels.attention.skew import unskew

ROWS = 64  # of a tile
_WARP_ROWS = 16
_LESS = arith.CmpIPredicate.ult

_LANES = np.arange(32)
_ROW, _PAIR = _LANES // 4, _LANES % 4
# After `of_a_warp` value i of a lane is the sum of diagonal x − y = FIRST[lane] + 32 i − 16.
FIRST = 8 * (_ROW // 2) + (2 * _PAIR - _ROW) % 8


def space(columns: int) -> int:
    """How many values in shared memory `add` needs to add a tile of so many columns; they begin as zeros."""
    return WARPS * _pitch(columns)


def add(line: Any, tile: jax.Array, scratch: Any, *, interpret: bool) -> None:
    """line[x − y + M] += tile[y, x] for a tile `[M, N]` in registers and M + N values in device memory.

    A thread reads what it adds to before all else, and needs no barrier for that because it wrote it itself: so the lines of two calls
    may overlap, but only a multiple of N apart.
    """
    rows, columns = tile.shape
    if interpret:
        sums = jnp.sum(unskew(tile, rows + columns - 1), axis=0)
        line[...] = line[...] + jnp.pad(sums, (1, 0))
        return

    def body(_, tile, line, scratch):
        thread = arith.andi(utils.thread_idx(), i32(THREADS - 1))
        warp = arith.shrui(thread, i32(5))
        first = index(thread)
        parts = (0, arith.cmpi(_LESS, thread, i32(columns))), (columns, arith.cmpi(_LESS, thread, i32(rows)))
        before = [_load_if(within, line, _after(first, start)) for start, within in parts]
        lanes = _Lanes()
        sums = of_a_warp(lanes, _pairs(tile))
        utils.warpgroup_barrier()  # all have read the sums of the tile before
        # A warp's rows are 16 below those of the warp before, so its sums stand 16 to the left.
        own = arith.muli(warp, i32(_pitch(columns) - _WARP_ROWS))
        own = index(arith.addi(own, lanes.table(FIRST)))
        for i, total in enumerate(sums):
            memref.store(total, scratch, [_after(own, rows - _WARP_ROWS + 32 * i)])
        utils.warpgroup_barrier()
        for (start, within), total in zip(parts, before, strict=True):
            with utils.when(within):
                for other in range(WARPS):
                    place = _after(first, start + other * _pitch(columns))
                    total = arith.addf(total, memref.load(scratch, [place]))
                memref.store(total, line, [_after(first, start)])

    plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), plgpu.RefType()))(body)(tile, line, scratch)


def clear(ref: Any, *, interpret: bool) -> None:
    """Zeros for a vector of float32 in device or shared memory, by one warpgroup."""
    if interpret:
        ref[...] = jnp.zeros(ref.shape, jnp.float32)
        return

    def body(_, ref):
        zero = arith.constant(ir.F32Type.get(), 0.0)
        for_each_place(ref, lambda place: memref.store(zero, ref, [place]))
        utils.warpgroup_barrier()

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(body)(ref)


def of_a_warp(lanes: Any, pairs: Sequence[Sequence[tuple[Any, Any]]]) -> list[Any]:
    """The sums along the diagonals of a warp's rows, as `FIRST` says; pairs[s][g] is what a lane has of row r + 8s in group g.

    lanes: `zero`, `add`, `where(lanes, x, y)` and `take(x, sources)`, the last from another lane, with an entry for each lane.
    """
    halves = []
    for e in range(2):
        upper, lower = ([pair[e] for pair in row] for row in pairs)
        # Row r + 8 in group g has the diagonals of row r in group g − 1.
        sums = [lower[0], *map(lanes.add, upper[:-1], lower[1:]), upper[-1]]
        # In lanes whose first diagonal is left of the warp's first row's, everything stands a group later.
        left = 2 * _PAIR + e < _ROW
        sums = zip([*sums, lanes.zero], [lanes.zero, *sums], strict=True)
        halves.append([lanes.where(left, x, y) for x, y in sums])
    # Diagonals repeat after 8, so in every row one lane and column has those of 2c − r. In the row beside it is the other column.
    beside = _lane(_ROW ^ 1, _PAIR - _ROW % 2)
    sums = [lanes.add(kept, lanes.take(sent, beside)) for kept, sent in zip(*halves, strict=True)]
    # Four lanes have the same diagonals now, two rows and one c apart; each ends with every fourth group.
    for bit in (1, 2):
        odd = _ROW & 2 * bit > 0
        across = _lane(_ROW ^ 2 * bit, _PAIR + np.where(odd, -bit, bit))
        sums = [*sums, lanes.zero] if len(sums) % 2 else sums
        sums = [
            lanes.add(lanes.where(odd, y, x), lanes.take(lanes.where(odd, x, y), across))
            for x, y in zip(sums[::2], sums[1::2], strict=True)
        ]
    return sums


def _lane(row: np.ndarray, pair: np.ndarray) -> np.ndarray:
    return 4 * row + pair % 4


class _Lanes:
    """Values in registers of a warp's 32 lanes."""

    def __init__(self):
        self.zero = arith.constant(ir.F32Type.get(), 0.0)
        self.add = arith.addf
        self._own = arith.andi(utils.thread_idx(), i32(31))

    def where(self, lanes: np.ndarray, x: ir.Value, y: ir.Value) -> ir.Value:
        return arith.select(arith.trunci(ir.IntegerType.get_signless(1), self._bit(lanes)), x, y)

    def take(self, x: ir.Value, sources: np.ndarray) -> ir.Value:
        return utils.shfl_bfly(x, self.table(sources ^ _LANES))

    def table(self, numbers: np.ndarray) -> ir.Value:
        """The number of this lane, of 32 below 32."""
        bits = [(numbers >> n) & 1 for n in range(5)]
        total = i32(sum(1 << n for n, bit in enumerate(bits) if bit.all()))
        for n, bit in enumerate(bits):
            if bit.any() and not bit.all():
                total = arith.ori(total, arith.shli(self._bit(bit), i32(n)))
        return total

    def _bit(self, lanes: np.ndarray) -> ir.Value:
        word = int(np.sum(lanes.astype(np.uint32) << _LANES.astype(np.uint32)))
        return arith.andi(arith.shrui(i32(word), self._own), i32(1))


def _pairs(tile: Any) -> list[list[tuple[ir.Value, ir.Value]]]:
    """[s][g] of the tile's registers."""
    registers = tile.registers
    pairs: list[list] = [[None] * registers.shape[1] for _ in range(2)]
    for place in np.ndindex(registers.shape):
        g, s = steps(registers.shape, place)
        pairs[s][g] = tuple(vector.extract(registers[place], [], [e]) for e in range(2))
    return pairs


def _pitch(columns: int) -> int:
    """From one warp's sums in shared memory to the next's: a tile's line, and what the last lanes write beyond it."""
    return ROWS + columns + 32


def _load_if(condition: ir.Value, ref: ir.Value, place: ir.Value) -> ir.Value:
    """The value there, or zero."""
    branch = scf.IfOp(condition, [ir.F32Type.get()], has_else=True)
    with ir.InsertionPoint(branch.then_block):
        scf.yield_([memref.load(ref, [place])])
    with ir.InsertionPoint(branch.else_block):
        scf.yield_([arith.constant(ir.F32Type.get(), 0.0)])
    return branch.results[0]


def _after(place: ir.Value, distance: int) -> ir.Value:
    return arith.addi(place, arith.constant(ir.IndexType.get(), distance))
