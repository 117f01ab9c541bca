"""Sums of whole tiles in registers, added to numbers in shared memory. Each of a warpgroup's warps has numbers of its own, so that none waits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith, memref, vector

from kernels.attention.mosaic_threads import WARPS, for_each_place, i32, index


def space(count: int) -> int:
    """How many values in shared memory `count` numbers need; they begin as zeros."""
    return count * WARPS


def totals(written: jax.Array) -> jax.Array:
    """`[…, count]`, the numbers of all warps together, of what `write` wrote, `[…, space(count)]`."""
    return jnp.sum(written.reshape(*written.shape[:-1], -1, WARPS), axis=-1)


def add(numbers: Any, place: Any, tile: jax.Array, *, interpret: bool) -> None:
    """Adds the entries of a tile to the number at `place`, each warp's to its own."""
    own = numbers.at[pl.ds(place * WARPS, WARPS)]
    if interpret:
        own[...] = own[...] + jnp.pad(jnp.sum(tile)[None], (0, WARPS - 1))
        return

    def body(_, own, tile):
        values = [vector.extract(x, [], [e]) for x in tile.registers.flat for e in range(2)]
        while len(values) > 1:  # in pairs: a chain of additions would wait for each
            halves = values[::2], values[1::2]
            values = [arith.addf(x, y) for x, y in zip(*halves, strict=False)] + values[len(values) & ~1 :]
        (total,) = values
        for distance in (16, 8, 4, 2, 1):
            total = arith.addf(total, utils.shfl_bfly(total, distance))
        lane, warp = (index(arith.andi(x, i32(n))) for x, n in ((utils.thread_idx(), 31), (utils.warp_idx(), 3)))
        with utils.when(arith.cmpi(arith.CmpIPredicate.eq, lane, index(i32(0)))):
            memref.store(arith.addf(memref.load(own, [warp]), total), own, [warp])

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))(body)(own, tile)


def write(line: Any, numbers: Any, *, interpret: bool) -> None:
    """Writes the numbers of all warps to device memory, by one warpgroup."""
    if interpret:
        line[...] = numbers[...]
        return

    def body(_, line, numbers):
        utils.warpgroup_barrier()
        for_each_place(numbers, lambda place: memref.store(memref.load(numbers, [place]), line, [place]))

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))(body)(line, numbers)
