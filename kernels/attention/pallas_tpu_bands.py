"""Tables of relative positions inside a TPU kernel: what they add to a tile of scores, and what a tile adds to them.

Outside, a table is laid out with one row for each distance of a band, whatever its map of rows; beyond the band it is constant. A tile of scores is
decided by squares of 128 × 128, one diagonal of squares at a time: a square that meets the band is one product with 256 rows of the table and a
skew, any other is one number for each row. The way back, from the entries of a tile to rows or to a table's gradient, is the inverse skew, made once for
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

from kernels.attention.pallas_tpu_diagonals import SQUARE, skewed, unskewed
from kernels.attention.pallas_tpu_products import product, product_of_rows


@dataclass(frozen=True)
class Band:
    """Distances of array indices, key minus query, at which tables are not constant, in whole squares.

    Attributes:
      first, last: the least and the greatest distance between the corners of squares that meet the band, multiples of 128.
    """

    first: int
    last: int

    @classmethod
    def of(cls, span: int, offset: int, queries: int, keys: int) -> Band:
        """Of tables that are constant from |r| = span on, r = distance − offset, for padded lengths."""
        reach = span + SQUARE - 1  # a square whose corner is further away has no entry within the span
        first = max((offset - reach) // SQUARE + 1, 1 - queries // SQUARE)
        last = min(-(-(offset + reach) // SQUARE) - 1, keys // SQUARE - 1)
        # Lengths may lie wholly beyond the span: one diagonal of squares is still looked at.
        first = min(first, keys // SQUARE - 1)
        return cls(first * SQUARE, max(last, first) * SQUARE)

    @property
    def rows(self) -> int:
        """Rows of a table that is laid out: row x is of distance first − 128 + x."""
        return self.last - self.first + 2 * SQUARE

    @property
    def least(self) -> int:
        """The distance of row 0."""
        return self.first - SQUARE

    def meets(self, distance: Any) -> Any:
        """Whether a square at this distance meets the band."""
        return (distance >= self.first) & (distance <= self.last)

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
    """The squares of one tile of scores, by diagonals of squares.

    band: of the call. distance: that of the tile's corner. block: its side. transposed: keys stand down.
    """

    band: Band
    distance: Any
    block: int
    transposed: bool

    def _diagonals(self) -> Iterator[tuple[Any, slice, list[tuple[slice, slice]]]]:
        """(distance, all rows, (rows, columns) of each square) of every diagonal of squares."""
        count = self.block // SQUARE
        for ahead in range(1 - count, count):
            first, last = max(0, -ahead), min(count, count - ahead)
            squares = [(_part(y), _part(y + ahead)) for y in range(first, last)]
            step = -ahead if self.transposed else ahead
            yield self.distance + step * SQUARE, slice(first * SQUARE, last * SQUARE), squares

    def meet(self, x: jax.Array, table: Any, out: Any) -> None:
        """out[y, c] = ⟨x_y, table[distance of (y, c)]⟩, for x `[block, lanes]` of what stands down."""
        for distance, rows, squares in self._diagonals():
            self._meet(distance, x[rows], squares, table, out)

    def _meet(self, distance: Any, x: jax.Array, squares: list[tuple[slice, slice]], table: Any, out: Any) -> None:
        meets = self.band.meets(distance)

        @pl.when(meets)
        def near():
            products = product_of_rows(x, table[self._rows_at(distance), :])
            for number, (rows, columns) in enumerate(squares):
                own = products[_part(number)]
                out[rows, columns] = skewed(own[:, :SQUARE], own[:, SQUARE:], transposed=self.transposed)

        @pl.when(jnp.logical_not(meets))
        def far():
            products = jnp.sum(x.astype(jnp.float32) * self.band.end(distance, table), axis=1, keepdims=True)
            for number, (rows, columns) in enumerate(squares):
                out[rows, columns] = jnp.broadcast_to(products[_part(number)], (SQUARE, SQUARE))

    def give(self, entries: Any, *receivers: Rows | OfTable) -> None:
        """The entries of a tile, in the ref `entries`, to each of the receivers."""
        for distance, rows, squares in self._diagonals():
            self._give(distance, rows, squares, entries, receivers)

    def _give(self, distance, rows, squares, entries, receivers) -> None:
        meets = self.band.meets(distance)

        @pl.when(meets)
        def near():
            by_distance = self._by_distance(entries, squares)
            for receiver in receivers:
                receiver.near(self._rows_at(distance), rows, by_distance)

        @pl.when(jnp.logical_not(meets))
        def far():
            sums = self._sums(entries, squares)
            for receiver in receivers:
                receiver.far(self.band, distance, rows, sums)

    def _rows_at(self, distance: Any) -> Any:
        return pl.ds(pl.multiple_of(distance - self.band.first, SQUARE), 2 * SQUARE)

    def _by_distance(self, entries: Any, squares: list[tuple[slice, slice]]) -> jax.Array:
        """`[rows, 256]`: of each row its entries in the order of the table's rows."""
        parts = (unskewed(entries[rows, columns], transposed=self.transposed) for rows, columns in squares)
        return jnp.concatenate([jnp.concatenate(part, axis=1) for part in parts], axis=0)

    def _sums(self, entries: Any, squares: list[tuple[slice, slice]]) -> jax.Array:
        return jnp.concatenate([jnp.sum(entries[r, c], axis=1, keepdims=True) for r, c in squares], axis=0)


def _part(number: int) -> slice:
    return slice(number * SQUARE, (number + 1) * SQUARE)
