"""Tables of relative positions inside a TPU kernel: what they add to a tile of scores, and what a tile adds to them.

Outside, a table is laid out with one row for each distance of a band, whatever its map of rows; beyond the band it is constant. A tile of scores is
decided by squares of 128 × 128, one diagonal of squares at a time: a square that meets the band is one product with 256 rows of the table and a
skew, any other is one number for each row. A tile wholly beyond the band costs no product: its end row is added to an operand instead,

    ⟨q_i, k_j⟩ + ⟨q_i, A⟩ + ⟨k_j, C⟩ = ⟨q_i + C, k_j + A⟩ − ⟨A, C⟩,   Σ_j p_ij (v_j + E).

Sources: Shaw et al. 2018 (arXiv:1803.02155) and He et al. 2021 (arXiv:2006.03654) for the terms; Huang et al. 2018 (arXiv:1809.04281) for the skew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
        return jnp.where(distance < self.first, left, right)

    def add_to_end(self, distance: Any, table: Any, row: jax.Array) -> None:
        where = jnp.where(distance < self.first, 0, self.rows - 1)
        table[pl.ds(where, 1), :] += row


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

    def sum_rows(self, entries: Any, table: Any, only: Any, total: Any) -> None:
        """total[y] += Σ_c entries[y, c] · only(table[distance of (y, c)])."""
        for distance, rows, squares in self._diagonals():
            self._sum_rows(distance, rows, squares, entries, table, only, total)

    def _sum_rows(self, distance, rows, squares, entries, table, only, total) -> None:
        meets = self.band.meets(distance)

        @pl.when(meets)
        def near():
            found = only(table[self._rows_at(distance), :])
            by_distance = self._by_distance(entries, squares).astype(found.dtype)
            total[rows, :] += product(by_distance, found)

        @pl.when(jnp.logical_not(meets))
        def far():
            total[rows, :] += self._sums(entries, squares) * only(self.band.end(distance, table))

    def add_to_table(self, entries: Any, x: jax.Array, table: Any) -> None:
        """table[distance of (y, c)] += entries[y, c] · x_y, in float32."""
        for distance, rows, squares in self._diagonals():
            self._add_to_table(distance, x[rows], squares, entries, table)

    def _add_to_table(self, distance, x, squares, entries, table) -> None:
        meets = self.band.meets(distance)

        @pl.when(meets)
        def near():
            by_distance = self._by_distance(entries, squares).T.astype(x.dtype)
            table[self._rows_at(distance), :] += product(by_distance, x)

        @pl.when(jnp.logical_not(meets))
        def far():
            row = jnp.sum(self._sums(entries, squares) * x.astype(jnp.float32), axis=0, keepdims=True)
            self.band.add_to_end(distance, table, row)

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
