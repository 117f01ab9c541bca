"""Clipped relative tables inside a TPU kernel, as products of two sides (`separable` has the equations).

A tile that touches |r| < K has one more product for each operand that meets a table, and two selects; any other a number for each query.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.attention.pallas_tpu_plan import Clipped
from kernels.attention.pallas_tpu_products import product, product_of_rows
from kernels.attention.pallas_tpu_tile import Tile


class Wide(NamedTuple):
    """f, dW and g in parts of a head's width: arrays `[B, T, blocks · lanes]` and `[S, lanes]`, their blocks, or refs of a tile."""

    f: list
    dw: list
    g: list


@dataclass(frozen=True)
class Cases:
    """The three cases of a tile; `beyond`: no |r| < K in it."""

    tile: Tile
    beyond: bool

    @property
    def _clipped(self) -> Clipped:
        return self.tile.plan.clipped

    def _ahead(self) -> Any:
        """Of a tile beyond, whether r ≥ K."""
        return self.tile.distance - self.tile.plan.offset > 0

    def met(self, head: int, of_queries: Sequence[Any], g: Sequence[Any], name: str) -> jax.Array:
        """ρ, from f (or dW) and the rows called `name` above and below."""
        above, below = (self.tile.of_queries(f"{name} {side}", head) for side in ("above", "below"))
        if self.beyond:
            return jnp.where(self._ahead(), above, below)
        total: Any = 0.0
        for x, y in zip(of_queries, g, strict=True):
            down, across = (y[...], x[...]) if self.tile.transposed else (x[...], y[...])
            total = total + product_of_rows(self.tile.plan.only(head, down), across)
        r = self.tile.relative_positions()
        total = jnp.where(r >= self._clipped.limit, above, total)
        return jnp.where(r <= -self._clipped.limit, below, total)

    def add(self, head: int, entries: jax.Array, g: Sequence[Any], totals: Iterable[Any]) -> list[jax.Array]:
        """Adds Σ_{|r|<K} entries g_j to `totals`, of a tile of queries by keys; the sums `[block, 1]` over r ≥ K and over r ≤ −K."""
        if self.beyond:
            mass, ahead = jnp.sum(entries, axis=1, keepdims=True), self._ahead()
            return [jnp.where(ahead, mass, 0.0), jnp.where(ahead, 0.0, mass)]
        r, limit = self.tile.relative_positions(), self._clipped.limit
        far = [jnp.where(r >= limit, entries, 0.0), jnp.where(r <= -limit, entries, 0.0)]
        near = jnp.where(jnp.abs(r) < limit, entries, 0.0)
        for y, total in zip(g, totals, strict=True):
            total[...] += product(near.astype(y.dtype), self.tile.plan.only(head, y[...]))
        return [jnp.sum(x, axis=1, keepdims=True) for x in far]
