"""A `PiecewiseLinear` term as the fused kernels evaluate it: in each tile by the knots that its entries meet, and no others.

Where the u of a tile lie between two numbers, the function bends at the knots between them and is straight at all others:

    f = constants[last] + slopes[first] · u + Σ_m bends_m max(u, knots_m),   first ≤ m < last, knots in order
    constants[s] = line_0 + Σ_{m ≥ s} bends_m knots_m        slopes[s] = line_1 + Σ_{m < s} bends_m

Nothing is approximated. FIRE's u is a logarithm of distance (Li et al. 2023, arXiv:2310.04418): of the 32 knots of its network a tile far from
the diagonal meets one or none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels.attention.terms import PiecewiseLinear


def numbers_of(term: PiecewiseLinear) -> jax.Array:
    """`[N, 4M + 2]` in float32: M + 1 constants, M + 1 slopes, M bends and M knots, as `Curve` reads them."""
    order = jnp.argsort(term.knots)
    knots = term.knots[None, order].astype(jnp.float32)
    bends, line = term.slopes[:, order].astype(jnp.float32), term.line.astype(jnp.float32)
    none = jnp.zeros((bends.shape[0], 1), jnp.float32)
    after = jnp.concatenate([jnp.cumsum((bends * knots)[:, ::-1], axis=1)[:, ::-1], none], axis=1)
    before = jnp.concatenate([none, jnp.cumsum(bends, axis=1)], axis=1)
    return jnp.concatenate([line[:, :1] + after, line[:, 1:] + before, bends, jnp.broadcast_to(knots, bends.shape)], 1)


def knots_of(numbers: jax.Array) -> jax.Array:
    """`[M]` in order, the same for all heads."""
    return _kinds(numbers)[_KNOT][0]


def knots_met(
    knots: jax.Array, distance: jax.Array, reach: jax.Array, tile: tuple[int, int], lengths: tuple[int, int]
) -> jax.Array:
    """int32 `[B, T / rows, S / columns, 2]`: (first, last) of every tile of rows × columns scores, those before `last` are met.

    distance: φ from the smallest relative position on, `[T + S − 1]`. reach: `[B, T]`. lengths: (T, S), in whole tiles.
    """
    (rows, columns), (queries, keys) = tile, lengths
    step = math.gcd(rows, columns)
    # Tiles on one diagonal of tiles look into the same rows + columns − 1 distances, which begin at a multiple of `step`.
    blocks = jnp.pad(distance, (0, 1), mode="edge").reshape(-1, step)
    starts = np.arange(keys // columns) * columns - np.arange(queries // rows)[:, None] * rows + queries - rows
    window = np.arange((rows + columns) // step)

    def corners(bound: Callable[..., jax.Array]) -> tuple[jax.Array, jax.Array]:
        of_rows = bound(reach.reshape(reach.shape[0], -1, rows), axis=2)
        of_blocks = bound(blocks, axis=1)
        count = of_blocks.shape[0] - len(window) + 1
        of_windows = bound(of_blocks[np.arange(count)[:, None] + window], axis=1)
        return of_rows[:, :, None], of_windows[starts // step][None]

    (least_reach, least), (most_reach, most) = corners(jnp.min), corners(jnp.max)
    # Rounding keeps order: the products of the ends are the ends of the products, to the last bit.
    products = [x * y for x in (least_reach, most_reach) for y in (least, most)]
    low, high = jnp.stack(products).min(0)[..., None], jnp.stack(products).max(0)[..., None]
    knots = knots[None, None, None]
    first, last = jnp.sum(knots < low, axis=-1), jnp.sum(knots <= high, axis=-1)
    return jnp.stack([first, last], axis=-1).astype(jnp.int32)


def _count(numbers: Any) -> int:
    return (numbers.shape[1] - 2) // 4


def _start(kind: int, count: int) -> int:
    """Where constants, slopes, bends or knots begin, of a curve of so many knots."""
    return kind * count + min(kind, 2)


def _kinds(numbers: jax.Array) -> list[jax.Array]:
    """Constants, slopes, bends and knots, `[N, ·]` each."""
    return jnp.split(numbers, [_start(kind, _count(numbers)) for kind in (_SLOPE, _BEND, _KNOT)], axis=1)


@dataclass(frozen=True)
class Curve:
    """The function of one head in one tile. numbers: a ref of `numbers_of`; head: its row; first, last: the knots met."""

    numbers: Any
    head: Any
    first: Any
    last: Any

    def _place(self, kind: int, m: Any) -> Any:
        """Where number m of constants, slopes, bends or knots stands."""
        return m + _start(kind, _count(self.numbers))

    def _number(self, kind: int, m: Any) -> Any:
        return self.numbers[self.head, self._place(kind, m)]

    def at(self, u: jax.Array) -> jax.Array:
        def add(m: Any, total: jax.Array) -> jax.Array:
            return total + self._number(_BEND, m) * jnp.maximum(u, self._number(_KNOT, m))

        straight = self._number(_CONSTANT, self.last) + self._number(_SLOPE, self.first) * u
        return lax.fori_loop(self.first, self.last, add, straight)

    def gradients(self, u: jax.Array, df: jax.Array, give: Callable[[Any, jax.Array], None]) -> jax.Array:
        """du, at a knot that of its left. give(place, x) adds the entries of x to the sum at `place`, as `of_numbers` reads them."""
        give(self._place(_CONSTANT, self.first), df)
        give(self._place(_SLOPE, self.first), df * u)

        def add(m: Any, slope: jax.Array) -> jax.Array:
            above = u > self._number(_KNOT, m)
            right = jnp.where(above, df, 0.0)
            give(self._place(_KNOT, m), right)
            give(self._place(_BEND, m), right * u)
            return slope + jnp.where(above, self._number(_BEND, m), 0.0)

        slope = jnp.zeros_like(u) + self._number(_SLOPE, self.first)
        return df * lax.fori_loop(self.first, self.last, add, slope)


def of_numbers(numbers: jax.Array, sums: jax.Array) -> jax.Array:
    """The gradients of `numbers_of` from what `Curve.gradients` has given, both `[N, 4M + 2]`.

    constants[last] + bends max(u, knots) is constants[first] + bends max(u − knots, 0): of a bend and its knot a tile gives Σ u df and Σ df
    over what lies right of the knot, and the rest is the same for all tiles.
    """
    constants, slopes, weighted, right = _kinds(sums)
    *_, bends, knots = _kinds(numbers)
    return jnp.concatenate([constants, slopes, weighted - knots * right, -bends * right], axis=1)


_CONSTANT, _SLOPE, _BEND, _KNOT = range(4)
