"""A square of a tile read along its diagonals, by way of shared memory: entry (y, x) from one whose row or column is a sum or difference of both.

A table of relative positions met by queries, x_ij = ⟨q_i, A[j − i]⟩, is made by a product with rows of A, which has one column for each j − i. That
column is (j − i) mod 64 of a square of 64, so that what a tile of scores needs are the same 64 × 64 numbers in other places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from kernels.attention.mosaic import steps
from kernels.attention.mosaic_threads import i32, index

SIDE = 64
_LESS = arith.CmpIPredicate.slt
# Rows begin eight banks apart: what a warp writes at once meets no bank twice, and what it reads two at most.
_PITCH = SIDE + 8
SPACE = SIDE * _PITCH

Y, X, X_LESS_Y, Y_LESS_X, SUM = (1, 0), (0, 1), (-1, 1), (1, -1), (1, 1)  # a and b of (a y + b x) mod 64


def put(tile: jax.Array, space: Any, condition: tuple[tuple[int, int], int] | None = None, *, interpret: bool) -> None:
    """Writes a tile `[64, 64]` of float32 to `SPACE` numbers of shared memory, whole before anything is read, or over it where
    a y + b x < c, condition ((a, b), c).
    """
    if interpret:
        before = _square(space)
        after = tile if condition is None else jnp.where(_holds(condition, tile.shape), tile, before)
        space[...] = jnp.pad(after, ((0, 0), (0, _PITCH - SIDE))).reshape(SPACE)
        return

    def body(_, tile, space):
        thread = _Thread(tile.shape)
        if condition is None:
            utils.warpgroup_barrier()  # all have read what was there before
        for place in np.ndindex(tile.registers.shape):
            g, s = steps(tile.registers.shape, place)
            if condition is None:
                vector.store(tile.registers[place], space, [thread.address(Y, X, g, s, 0)])
                continue
            coefficients, bound = condition
            for e in range(2):
                with utils.when(arith.cmpi(_LESS, thread.at(coefficients, g, s, e), i32(bound))):
                    entry = vector.extract(tile.registers[place], [], [e])
                    memref.store(entry, space, [thread.address(Y, X, g, s, e)])

    plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))(body)(tile, space)


def turned(space: Any, *, row: tuple[int, int], column: tuple[int, int], interpret: bool) -> jax.Array:
    """out[y, x] = put[row(y, x), column(y, x)], `[64, 64]` in registers, of what was `put` in `space`."""
    shape = (SIDE, SIDE)
    if interpret:
        y, x = _places_of(shape)
        return _square(space)[tuple((a * y + b * x) & (SIDE - 1) for a, b in (row, column))]

    def body(_, space):
        thread = _Thread(shape)
        utils.warpgroup_barrier()  # all have written

        def read(g, s, e):
            return memref.load(space, [thread.address(row, column, g, s, e)])

        return _tile_of(read, fragmented_array.WGMMA_LAYOUT.registers_shape(shape))

    return _inline(body, shape, (plgpu.RefType(),))(space)


def only(condition: tuple[tuple[int, int], int], tile: jax.Array, *, interpret: bool) -> jax.Array:
    """The tile where a y + b x < c, condition ((a, b), c), of the entry's place, and zeros."""
    if interpret:
        return jnp.where(_holds(condition, tile.shape), tile, 0.0)

    def body(_, tile):
        thread, (coefficients, bound) = _Thread(tile.shape), condition
        zero, shape = arith.constant(ir.F32Type.get(), 0.0), tile.registers.shape
        by_place = {steps(shape, place): place for place in np.ndindex(shape)}

        def chosen(g, s, e):
            here = arith.cmpi(_LESS, thread.at(coefficients, g, s, e), i32(bound))
            return arith.select(here, vector.extract(tile.registers[by_place[g, s]], [], [e]), zero)

        return _tile_of(chosen, shape)

    return _inline(body, tile.shape, (plgpu.Layout.WGMMA,))(tile)


def _holds(condition: tuple[tuple[int, int], int], shape: tuple[int, int]) -> jax.Array:
    ((a, b), bound), (y, x) = condition, _places_of(shape)
    return a * y + b * x < bound


def _square(space: Any) -> jax.Array:
    return space[...].reshape(SIDE, _PITCH)[:, :SIDE]


def _places_of(shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    return tuple(lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))


def _inline(body: Any, shape: tuple[int, int], types: tuple) -> Any:
    result = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=plgpu.Layout.WGMMA)
    return plgpu.inline_mgpu(arg_types=types, return_type=result)(body)


def _tile_of(entry: Callable[[int, int, int], ir.Value], shape: tuple[int, ...]) -> fragmented_array.FragmentedArray:
    """The tile whose registers hold entry(g, s, e)."""
    registers = np.empty(shape, dtype=object)
    pair = ir.VectorType.get((2,), ir.F32Type.get())
    for place in np.ndindex(shape):
        registers[place] = vector.from_elements(pair, [entry(*steps(shape, place), e) for e in range(2)])
    return fragmented_array.FragmentedArray(
        _registers=registers, _layout=fragmented_array.WGMMA_LAYOUT, _is_signed=None
    )


class _Thread:
    """Where a thread's entries are: two neighbours of every eighth column, in two rows eight apart, (y0 + 8 s, x0 + 8 g + e)."""

    def __init__(self, shape: tuple[int, int]):
        self._y, self._x = map(_anew, next(iter(fragmented_array.WGMMA_LAYOUT.thread_idxs(shape))))

    def at(self, coefficients: tuple[int, int], g: int, s: int, e: int) -> ir.Value:
        """a y + b x of an entry."""
        return arith.addi(self._sum(*coefficients), i32(self._distance(coefficients, g, s, e)))

    def address(self, row: tuple[int, int], column: tuple[int, int], g: int, s: int, e: int) -> ir.Value:
        """Where an entry's row and column are in `SPACE`; y and x as they are, sums and differences modulo 64.

        Of 32 of the latter 16 are distinct. The rest is constant, what an instruction adds to an address.
        """
        total, constant = None, 0
        for coefficients, pitch in ((row, _PITCH), (column, 1)):
            place, distance = self._sum(*coefficients), self._distance(coefficients, g, s, e)
            if coefficients in (Y, X):
                constant += pitch * distance
            else:
                place = arith.andi(arith.addi(place, i32(distance % SIDE)), i32(SIDE - 1))
            place = arith.muli(place, i32(pitch))
            total = place if total is None else arith.addi(total, place)
        return arith.addi(index(total), arith.constant(ir.IndexType.get(), constant))

    def _distance(self, coefficients: tuple[int, int], g: int, s: int, e: int) -> int:
        a, b = coefficients
        return 8 * s * a + (8 * g + e) * b

    def _sum(self, a: int, b: int) -> ir.Value:
        total = i32(0)
        for factor, value in ((a, self._y), (b, self._x)):
            if factor:
                total = (arith.addi if factor == 1 else arith.subi)(total, value)
        return total


def _anew(place: ir.Value) -> ir.Value:
    """The same number, of which the compiler does not know it: what is made of it would else be kept in registers from one tile to the next."""
    kind = ir.IntegerType.get_signless(32)
    narrow = arith.index_cast(kind, place)
    return llvm.inline_asm(kind, [narrow], "mov.b32 $0, $1;", "=r,r", has_side_effects=True)
