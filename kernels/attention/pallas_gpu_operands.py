"""What the GPU kernels are given beside q, k and v, in the order in which they take it; and how far segments reach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels.attention.curve import knots_met, knots_of
from kernels.attention.fused import Given
from kernels.attention.pallas_gpu_plan import WARPGROUP_ROWS, Diagonals


def operands_of(given: Given, diagonals: Diagonals) -> list[jax.Array]:
    """What the kernels are given of masks, terms and dropout, in the order of `Operands`."""
    curves, reach = [], []
    if given.curves:
        numbers, own = given.curves["curve"], (WARPGROUP_ROWS, diagonals.columns)
        tile = own[::-1] if diagonals.transposed else own
        lengths = diagonals.plan.queries, diagonals.plan.keys
        met = knots_met(knots_of(numbers), given.lines["distance"][0], given.rows["reach"], tile, lengths)
        curves = [numbers, met]
    if "segments" in given.rows:
        own, other = given.rows["segments"], given.columns["segments"]
        own, other = (other, own) if diagonals.transposed else (own, other)
        reach = [segment_reach(own, diagonals.rows, other, diagonals.columns)]
    windows = map(diagonals.windows, given.lines.values())
    return [
        *given.rows.values(),
        *given.columns.values(),
        *windows,
        *given.bands.values(),
        *given.dense.values(),
        *curves,
        *reach,
    ]


class Operands(NamedTuple):
    """What stands in a kernel for `Given`: rows, columns, windows and bands by name, one or none of matrix and reach, and of a curve its numbers
    and the knots that tiles meet.
    """

    rows: dict[str, Any]
    columns: dict[str, Any]
    windows: dict[str, Any]
    bands: dict[str, Any]
    matrices: tuple
    curves: tuple
    reach: tuple


def split_operands(given: Given, values: tuple) -> tuple[Operands, tuple]:
    """`operands_of`, or what stands for them in a kernel, and the rest."""
    rest = iter(values)

    def named(like: Mapping) -> dict[str, Any]:
        return {name: next(rest) for name in like}

    rows, columns, windows, bands = map(named, (given.rows, given.columns, given.lines, given.bands))
    matrices = tuple(named(given.dense).values())
    curves = (next(rest), next(rest)) if given.curves else ()
    reach = (next(rest),) if "segments" in given.rows else ()
    return Operands(rows, columns, windows, bands, matrices, curves, reach), tuple(rest)


def segment_reach(own: jax.Array, rows: int, other: jax.Array, columns: int) -> jax.Array:
    """int32 `[B, T / rows, 2]`: the first and the last tile of `columns` ids of `other` `[B, S]` that may share a segment with each
    `rows` ids of `own` `[B, T]`.

    Segments are compared as ranges, least to most, which is exact where they stand in order, as packed documents do, and takes too many
    tiles elsewhere.
    """

    def ranges(ids: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
        tiles = ids.reshape(ids.shape[0], -1, length)
        real = tiles > 0
        highest = jnp.iinfo(jnp.int32).max
        return jnp.min(jnp.where(real, tiles, highest), axis=2), jnp.max(jnp.where(real, tiles, 0), axis=2)

    (least, most), (low, high) = ranges(own, rows), ranges(other, columns)
    meet = (least[:, :, None] <= high[:, None, :]) & (most[:, :, None] >= low[:, None, :])
    last = meet.shape[2] - 1 - jnp.argmax(meet[:, :, ::-1], axis=2)
    return jnp.stack([jnp.argmax(meet, axis=2), last], axis=-1).astype(jnp.int32)


def within_reach(reach: tuple, b: Any, program: Any, low: Any, tiles: Any) -> tuple[Any, Any]:
    """Of `tiles` tiles from `low` on those that `segment_reach` leaves; at least one."""
    if not reach:
        return low, tiles
    first, last = (reach[0][b, program, end] for end in range(2))
    start = lax.clamp(low, first, low + tiles - 1)
    return start, lax.clamp(start, last, low + tiles - 1) - start + 1
