"""Tables of relative positions inside a TPU kernel: what they add to a tile of scores, and what a tile adds to them.

Outside, a table is laid out with one row for each distance of a band, whatever its map of rows; beyond the band it is constant. A tile of scores is
decided by rows of squares of 128 × 128: one that meets the band is a product with all distances that it has, 128 more than it has columns, and a skew,
any other is one number for each row. The way back, from the entries of a tile to rows or to a table's gradient, is the inverse skew, made once for
both; a gradient lies with its rows across, so that no square is transposed for it. A tile wholly beyond the band costs no product: its end row is added to an operand instead,

    ⟨q_i, k_j⟩ + ⟨q_i, A⟩ + ⟨k_j, C⟩ = ⟨q_i + C, k_j + A⟩ − ⟨A, C⟩,   Σ_j p_ij (v_j + E).

Sources: Shaw et al. 2018 (arXiv:1803.02155) and He et al. 2021 (arXiv:2006.03654) for the terms; Huang et al. 2018 (arXiv:1809.04281) for the skew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.attention.pallas_tpu_diagonals import SQUARE, skewed_row, unskewed_row
from kernels.attention.pallas_tpu_products import product, product_of_rows


@dataclass(frozen=True)
class Band:
    """Distances of array indices, key minus query, at which tables are not constant, in whole squares.

    Attributes:
      first, last: the least and the greatest distance between the corners of squares that meet the band, multiples of 128.
      least, most: those of squares in a row with one that does.
    """

    first: int
    last: int
    least: int
    most: int

    @classmethod
    def of(cls, span: int, offset: int, queries: int, keys: int, block: int) -> Band:
        """Of tables that are constant from |r| = span on, r = distance − offset, for lengths padded to multiples of `block`."""
        reach = span + SQUARE - 1  # a square whose corner is further away has no entry within the span
        least, most = SQUARE - queries, keys - SQUARE
        first = max(((offset - reach) // SQUARE + 1) * SQUARE, least)
        last = min((-(-(offset + reach) // SQUARE) - 1) * SQUARE, most)
        # Lengths may lie wholly beyond the span: one diagonal of squares is still looked at.
        first = min(first, most)
        last = max(last, first)
        return cls(first, last, max(least, first + SQUARE - block), min(most, last - SQUARE + block))

    @property
    def rows(self) -> int:
        """Rows of a table that is laid out: row x is of distance least − 128 + x."""
        return self.most - self.least + 2 * SQUARE

    @property
    def start(self) -> int:
        """The distance of row 0."""
        return self.least - SQUARE

    def meets(self, distance: Any, block: int) -> Any:
        """Whether a row of squares, the lowest at this distance, meets the band."""
        return (distance + (block - SQUARE) >= self.first) & (distance <= self.last)

    def beyond(self, distance: Any, block: int) -> Any:
        """Whether all squares of a tile are beyond the band on one side."""
        inside = block - SQUARE
        return (distance + inside < self.first) | (distance - inside > self.last)

    def end(self, distance: Any, table: Any) -> jax.Array:
        """The row `[1, lanes]`, float32, that a table has beyond the band, on the side of `distance`."""
        left, right = (table[x : x + 1, :].astype(jnp.float32) for x in (0, self.rows - 1))
        return jnp.where(self.is_before(distance), left, right)

    def is_before(self, distance: Any) -> Any:
        """Of a distance beyond the band, whether it is the left side."""
        return distance < self.first


class Gradient(NamedTuple):
    """Refs of what a table's gradient is summed in: `[lanes, R]`, and in the first two of eight rows `[8, lanes]` what its ends have beyond the band."""

    table: Any
    ends: Any


@dataclass(frozen=True)
class Rows:
    """Adds Σ_c entries[y, c] · table[distance of (y, c)] to `total[y]`; `only` leaves the lanes of one head."""

    table: Any
    only: Callable[[jax.Array], jax.Array]
    total: Any

    def near(self, at: Any, rows: slice, by_distance: jax.Array) -> None:
        found = self.only(self.table[at, :])
        self.total[rows, :] += product(by_distance.astype(found.dtype), found)

    def far(self, band: Band, distance: Any, rows: slice, sums: jax.Array) -> None:
        self.total[rows, :] += sums * self.only(band.end(distance, self.table))


@dataclass(frozen=True)
class OfTable:
    """Adds Σ entries[y, c] · x_y of all (y, c) at a distance to the gradient of its row, in float32; `x` stands down, `across` is its transpose."""

    x: jax.Array
    across: jax.Array
    gradient: Gradient

    def near(self, at: Any, rows: slice, by_distance: jax.Array) -> None:
        self.gradient.table[:, at] += product(self.across[:, rows], by_distance.astype(self.x.dtype))

    def far(self, band: Band, distance: Any, rows: slice, sums: jax.Array) -> None:
        row = jnp.sum(sums * self.x[rows].astype(jnp.float32), axis=0, keepdims=True)
        self.gradient.ends[pl.ds(jnp.where(band.is_before(distance), 0, 1), 1), :] += row


@dataclass(frozen=True)
class Squares:
    """The squares of one tile of scores, by rows of squares.

    band: of the call. distance: that of the tile's corner. block: its side. transposed: keys stand down.
    """

    band: Band
    distance: Any
    block: int
    transposed: bool

    def _rows(self) -> Iterator[tuple[slice, Any]]:
        """(rows, the lowest distance of a square) of every row of squares."""
        for y in range(0, self.block, SQUARE):
            lowest = self.distance + (y + SQUARE - self.block if self.transposed else -y)
            yield slice(y, y + SQUARE), lowest

    def meet(self, x: jax.Array, table: Any, out: Any) -> None:
        """out[y, c] = ⟨x_y, table[distance of (y, c)]⟩, for x `[block, lanes]` of what stands down."""
        for rows, lowest in self._rows():
            self._meet(lowest, x[rows], rows, table, out)

    def _meet(self, lowest: Any, x: jax.Array, rows: slice, table: Any, out: Any) -> None:
        meets = self.band.meets(lowest, self.block)

        @pl.when(meets)
        def near():
            products = product_of_rows(x, table[self._rows_at(lowest), :])
            out[rows, :] = skewed_row(_parts(products), transposed=self.transposed)

        @pl.when(jnp.logical_not(meets))
        def far():
            products = jnp.sum(x.astype(jnp.float32) * self.band.end(lowest, table), axis=1, keepdims=True)
            out[rows, :] = jnp.broadcast_to(products, (SQUARE, self.block))

    def give(self, entries: Any, *receivers: Rows | OfTable) -> None:
        """The entries of a tile, in the ref `entries`, to each of the receivers."""
        for rows, lowest in self._rows():
            self._give(lowest, rows, entries, receivers)

    def _give(self, lowest: Any, rows: slice, entries: Any, receivers: tuple[Rows | OfTable, ...]) -> None:
        meets = self.band.meets(lowest, self.block)

        @pl.when(meets)
        def near():
            blocks = unskewed_row(_parts(entries[rows, :]), transposed=self.transposed)
            by_distance = jnp.concatenate(blocks, axis=1)
            for receiver in receivers:
                receiver.near(self._rows_at(lowest), rows, by_distance)

        @pl.when(jnp.logical_not(meets))
        def far():
            sums = jnp.sum(entries[rows, :], axis=1, keepdims=True)
            for receiver in receivers:
                receiver.far(self.band, lowest, rows, sums)

    def _rows_at(self, lowest: Any) -> Any:
        """Of a table, the distances of a row of squares."""
        return pl.ds(pl.multiple_of(lowest - self.band.least, SQUARE), self.block + SQUARE)


def _parts(x: jax.Array) -> list[jax.Array]:
    return [x[:, first : first + SQUARE] for first in range(0, x.shape[1], SQUARE)]
