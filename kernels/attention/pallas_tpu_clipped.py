"""Clipped relative tables inside a TPU kernel, as products of two sides (`separable` has the equations).

A tile is decided by squares of 128 × 128, all of them when the program is made: which tiles touch |r| < K, and where, is the same for all tiles at one
distance, and there are few such distances. A square that touches it has one more product for each operand that meets a table, and selects; any
other a number for each query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels.attention.pallas_tpu_diagonals import SQUARE
from kernels.attention.pallas_tpu_products import product, product_of_rows
from kernels.attention.pallas_tpu_tile import Tile


class Wide(NamedTuple):
    """f, dW and g in parts of a head's width: arrays `[B, T, blocks · lanes]` and `[S, lanes]`, their blocks, or refs of a tile."""

    f: list
    dw: list
    g: list


@dataclass(frozen=True)
class Cases:
    """The three cases of a tile. shift: how many tiles its keys are ahead of its queries where it touches |r| < K, None where no tile of this kind does."""

    tile: Tile
    shift: int | None

    def met(self, head: int, of_queries: Sequence[Any], g: Sequence[Any], name: str) -> jax.Array:
        """ρ, from f (or dW) and the rows called `name` above and below."""
        above, below = (self.tile.of_queries(f"{name} {side}", head) for side in ("above", "below"))
        if self.shift is None:
            return jnp.where(self._ahead(), above, below)
        down, across = (g, of_queries) if self.tile.transposed else (of_queries, g)
        rows = [self._met(y, head, down, across, above, below) for y in range(self._count)]
        return jnp.concatenate(rows, axis=0)

    def _met(self, y: int, head: int, down: Sequence[Any], across: Sequence[Any], above: jax.Array, below: jax.Array):
        """A row of squares: a product of all that touch |r| < K, which are neighbours."""
        at, limit = _part(y), self._limit
        near = [x for x in range(self._count) if self._touches(y, x)]
        products: Any = 0.0
        if near:
            columns = slice(near[0] * SQUARE, (near[-1] + 1) * SQUARE)
            for a, b in zip(down, across, strict=True):
                products = products + product_of_rows(self.tile.plan.only(head, a[at, :]), b[columns, :])
        squares = []
        for x in range(self._count):
            high, low = (
                jnp.broadcast_to(c[:, _part(x)], (SQUARE, SQUARE)) if self.tile.transposed else c[at, :SQUARE]
                for c in (above, below)
            )
            if x not in near:
                squares.append(high if self._corner(y, x) > 0 else low)
                continue
            r = self._relative_positions(y, x)
            inside = products[:, _part(x - near[0])]
            squares.append(jnp.where(r >= limit, high, jnp.where(r <= -limit, low, inside)))
        return jnp.concatenate(squares, axis=1)

    def add(self, head: int, entries: jax.Array, g: Sequence[Any], totals: Sequence[Any]) -> list[jax.Array]:
        """Adds Σ_{|r|<K} entries g_j to `totals`, of a tile of queries by keys; the sums `[block, 1]` over r ≥ K and over r ≤ −K."""
        if self.shift is None:
            mass, ahead = jnp.sum(entries, axis=1, keepdims=True), self._ahead()
            return [jnp.where(ahead, mass, 0.0), jnp.where(ahead, 0.0, mass)]
        sums = [self._add(y, head, entries[_part(y)], g, totals) for y in range(self._count)]
        return [jnp.concatenate(parts, axis=0) for parts in zip(*sums, strict=True)]

    def _add(self, y: int, head: int, entries: jax.Array, g: Sequence[Any], totals: Sequence[Any]) -> list[jax.Array]:
        zero, limit = jnp.zeros((SQUARE, SQUARE), jnp.float32), self._limit
        near, high, low = [], [zero], [zero]
        for x in range(self._count):
            own = entries[:, _part(x)]
            if not self._touches(y, x):
                (high if self._corner(y, x) > 0 else low).append(own)
                continue
            r = self._relative_positions(y, x)
            near.append((x, jnp.where(jnp.abs(r) < limit, own, zero)))
            high.append(jnp.where(r >= limit, own, zero))
            low.append(jnp.where(r <= -limit, own, zero))
        if near:
            columns = slice(near[0][0] * SQUARE, (near[-1][0] + 1) * SQUARE)
            inside = jnp.concatenate([x for _, x in near], axis=1)
            for part, total in zip(g, totals, strict=True):
                total[_part(y), :] += product(inside.astype(part.dtype), self.tile.plan.only(head, part[columns, :]))
        return [jnp.sum(sum(squares[1:], squares[0]), axis=1, keepdims=True) for squares in (high, low)]

    @property
    def _limit(self) -> int:
        return self.tile.plan.clipped.limit

    @property
    def _count(self) -> int:
        return self.tile.plan.block // SQUARE

    def _ahead(self) -> Any:
        """Of a tile that does not touch |r| < K, whether r ≥ K."""
        return self.tile.distance - self.tile.plan.offset > 0

    def _corner(self, y: int, x: int) -> int:
        """r of the upper left entry of a square."""
        ahead = y - x if self.tile.transposed else x - y
        return self.shift * self.tile.plan.block + ahead * SQUARE - self.tile.plan.offset

    def _touches(self, y: int, x: int) -> bool:
        return not self.tile.plan.clipped.beyond(self._corner(y, x), SQUARE)

    def _relative_positions(self, y: int, x: int) -> jax.Array:
        rows, columns = (lax.broadcasted_iota(jnp.int32, (SQUARE, SQUARE), axis) for axis in (0, 1))
        return (rows - columns if self.tile.transposed else columns - rows) + self._corner(y, x)


def _part(number: int) -> slice:
    return slice(number * SQUARE, (number + 1) * SQUARE)
