"""Moving between diagonals and columns inside a TPU kernel, 128 × 128 entries at a time: one select and one lane gather each.

Of a square of 128 rows and columns whose upper left corner stands at distance d, entry (y, x) has distance d + x − y (transposed:
d + y − x), so its diagonals are the 255 values from d − 127 to d + 127. They come as two blocks of 128, `low` from d − 128 on and `high`
from d on: exact, for all generations of TPUs, and both ways by the same gather.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

SQUARE = 128


def _places(transposed: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(columns to read from, columns to write to, whether a column of `high` is read) of each row of a square."""
    y, x = (lax.broadcasted_iota(jnp.int32, (SQUARE, SQUARE), axis) for axis in (0, 1))
    if transposed:
        return (y - x) & (SQUARE - 1), (y - x) & (SQUARE - 1), x <= y
    return (x - y) & (SQUARE - 1), (x + y) & (SQUARE - 1), x + y < SQUARE


def skewed(low: jax.Array, high: jax.Array, *, transposed: bool = False) -> jax.Array:
    """The square of which entry (y, x) is [low | high][y, 128 + x − y], transposed [low | high][y, 128 + y − x]."""
    source, _, from_high = _places(transposed)
    return jnp.take_along_axis(jnp.where(from_high, high, low), source, axis=1)


def unskewed(square: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The transpose of `skewed`, not transposed: (low, high), zero where nothing is read."""
    low, high = unskewed_row([square])
    return low, high


def skewed_row(blocks: list[jax.Array], *, transposed: bool = False) -> jax.Array:
    """A row of squares side by side, from one block of 128 more than there are squares: by distance, the first of them the lowest."""
    low, high = (blocks[::-1][1:], blocks[::-1]) if transposed else (blocks, blocks[1:])
    squares = [skewed(*pair, transposed=transposed) for pair in zip(low, high, strict=False)]
    return jnp.concatenate(squares, axis=1)


def unskewed_row(squares: list[jax.Array], *, transposed: bool = False) -> list[jax.Array]:
    """The transpose of `skewed_row`: what a block has of both squares that read it."""
    _, target, from_high = _places(transposed)
    moved = [jnp.take_along_axis(square, target, axis=1) for square in squares]
    nothing = jnp.zeros_like(moved[0])
    by_distance = moved[::-1] if transposed else moved
    neighbours = zip([nothing, *by_distance], [*by_distance, nothing], strict=True)
    return [jnp.where(from_high, before, after) for before, after in neighbours]


def along_diagonals(lines: Any, row: int, start: jax.Array, block: int, *, transposed: bool = False) -> jax.Array:
    """float32 `[block, block]`, constant along diagonals: entry (y, x) is lines[row, start + x − y], transposed lines[row, start + y − x].

    lines: a ref `[rows, length]`; `start` is a multiple of 128 and `block` away from both ends.
    """
    count = block // SQUARE

    def values(chunk: int) -> jax.Array:
        here = pl.multiple_of(start + chunk * SQUARE, SQUARE)
        return jnp.broadcast_to(lines[row : row + 1, pl.ds(here, SQUARE)], (SQUARE, SQUARE))

    chunks = {c: values(c) for c in range(-count, count)}
    squares = {c: skewed(chunks[c - 1], chunks[c], transposed=transposed) for c in range(1 - count, count)}
    rows = [[squares[(y - x) if transposed else (x - y)] for x in range(count)] for y in range(count)]
    return jnp.concatenate([jnp.concatenate(row, axis=1) for row in rows], axis=0)


def add_along_diagonals(lines: Any, row: int, start: jax.Array, tile: jax.Array) -> None:
    """The transpose of `along_diagonals`, not transposed: adds each diagonal's sum to its entry of a row of the ref `lines`."""
    count = tile.shape[0] // SQUARE
    sums: dict[int, list[jax.Array]] = {c: [] for c in range(1 - count, count)}
    for y in range(count):
        for x in range(count):
            sums[x - y].append(tile[y * SQUARE : (y + 1) * SQUARE, x * SQUARE : (x + 1) * SQUARE])
    chunks: dict[int, list[jax.Array]] = {c: [] for c in range(-count, count)}
    for c, squares in sums.items():
        low, high = unskewed(sum(squares[1:], squares[0]))
        chunks[c - 1].append(low)
        chunks[c].append(high)
    for c, parts in chunks.items():
        here = pl.ds(pl.multiple_of(start + c * SQUARE, SQUARE), SQUARE)
        lines[row : row + 1, here] += jnp.sum(sum(parts[1:], parts[0]), axis=0, keepdims=True)
