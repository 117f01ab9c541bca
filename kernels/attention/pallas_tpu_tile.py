"""A tile of scores inside a TPU kernel: what masks, terms and dropout say of its entries, and what its entries give to the terms."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.attention.curve import Curve
from kernels.attention.dropout import APART, HALF, kept, lower_half, shared_hash
from kernels.attention.fused import HIDDEN, Given
from kernels.attention.pallas_tpu_bands import Gradient, OfTable, Rows, Squares
from kernels.attention.pallas_tpu_diagonals import add_along_diagonals, along_diagonals
from kernels.attention.pallas_tpu_plan import Plan
from kernels.attention.pallas_tpu_products import product_of_rows

_STRIP = 64  # rows of 512 columns, with their sums half of the registers


def by_strips(function: Callable[..., jax.Array], *tiles: jax.Array) -> jax.Array:
    """function(*tiles), elementwise, a few rows at a time: a loop in it then carries registers."""
    starts = range(0, tiles[0].shape[0], _STRIP)
    return jnp.concatenate([function(*(x[n : n + _STRIP] for x in tiles)) for n in starts])


@dataclass(frozen=True)
class Tile:
    """One tile of scores, queries down and keys across, or `transposed`, keys down and queries across.

    said: refs of what `Given` says, of rows and columns those that stand down as `turned` columns. block: of heads. row: of the batch.
    work: a ref of the tile's shape where there are bands.
    """

    plan: Plan
    first_query: Any
    first_key: Any
    said: Given
    block: Any
    row: Any
    work: Any
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.plan.block, self.plan.block

    def _down(self, ref: Any, head: int) -> jax.Array:
        return self.plan.across(ref[min(head, ref.shape[0] - 1)])

    def _across(self, ref: Any, head: int) -> jax.Array:
        own = min(head, ref.shape[0] - 1)
        return ref[own : own + 1, :]

    def of_queries(self, name: str, head: int) -> jax.Array:
        """What stands down is whole columns, what stands across one row."""
        return (self._across if self.transposed else self._down)(self.said.rows[name], head)

    def of_keys(self, name: str, head: int) -> jax.Array:
        return (self._down if self.transposed else self._across)(self.said.columns[name], head)

    def _index(self, axis: int) -> jax.Array:
        return lax.broadcasted_iota(jnp.int32, self.shape, axis)

    def key_index(self) -> jax.Array:
        return self._index(int(not self.transposed)) + self.first_key

    def relative_positions(self) -> jax.Array:
        keys, queries = self._index(int(not self.transposed)), self._index(int(self.transposed))
        return keys - queries + (self.distance - self.plan.offset)

    def on_line(self, name: str, head: int) -> jax.Array:
        """Of every entry the value at its relative position."""
        lines = self.said.lines[name]
        return along_diagonals(lines, head, self._start(), self.plan.block, transposed=self.transposed)

    def add_to_line(self, lines: Any, head: int, values: jax.Array) -> None:
        add_along_diagonals(lines, head, self._start(), values)

    @property
    def distance(self) -> Any:
        return self.first_key - self.first_query

    def _start(self) -> jax.Array:
        return self.plan.queries + self.distance

    def squares(self, keys_down: bool = False) -> Squares:
        return Squares(self.plan.band, self.distance, self.plan.block, keys_down)

    def with_ends(self, beyond: bool, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        """q, k and v as they meet in this tile: beyond the band with the end rows of the tables."""

        def added(name: str, x: jax.Array) -> jax.Array:
            if not beyond or name not in self.said.bands:
                return x
            return (x.astype(jnp.float32) + self.plan.band.end(self.distance, self.said.bands[name])).astype(x.dtype)

        return added("key", q), added("query", k), added("value", v)

    def products(self, head: int, beyond: bool, q: jax.Array, k: jax.Array) -> jax.Array:
        """⟨q_i, k_j⟩ and what tables add to it, of q and k `with_ends`."""
        down, across = (k, q) if self.transposed else (q, k)
        total = product_of_rows(self.plan.only(head, down), across)
        if beyond and {"query", "key"} <= set(self.said.bands):
            ends = [self.plan.band.end(self.distance, self.said.bands[name]) for name in ("query", "key")]
            total = total - jnp.sum(self.plan.only(head, ends[0] * ends[1]), axis=1, keepdims=True)
        if not beyond and "query" in self.said.bands:
            total = total + self._met(head, q, "query")
        if not beyond and "key" in self.said.bands:
            total = total + self._met(head, k, "key")
        return total

    def of_probabilities(self, head: int, beyond: bool, gradient: jax.Array, v: jax.Array) -> jax.Array:
        """⟨dO_i, v_j⟩ and what a table of values adds to it, of v `with_ends`."""
        down, across = (v, gradient) if self.transposed else (gradient, v)
        total = product_of_rows(self.plan.only(head, down), across)
        return total if beyond or "value" not in self.said.bands else total + self._met(head, gradient, "value")

    def _met(self, head: int, x: jax.Array, name: str) -> jax.Array:
        keys_down = name == "key"
        self.squares(keys_down).meet(self.plan.only(head, x), self.said.bands[name], self.work)
        met = self.work[...]
        return met if keys_down == self.transposed else met.T

    def give(
        self, head: int, beyond: bool, name: str, *, total: Any = None, x: Any = None, gradient: Gradient | None = None
    ) -> None:
        """The entries that stand in `work` to the rows `total` by a table, and with `x`, which stands down, to its `gradient`.

        Beyond the band `with_ends` has given the rows theirs.
        """
        receivers: list[Rows | OfTable] = []
        if total is not None and not beyond:
            receivers.append(Rows(self.said.bands[name], functools.partial(self.plan.only, head), total))
        if gradient is not None:
            across = self.plan.only(head, x.astype(jnp.float32).T, axis=0).astype(x.dtype)
            receivers.append(OfTable(self.plan.only(head, x), across, gradient))
        if not beyond:
            self.squares(name == "key").give(self.work, *receivers)
            return
        sums = jnp.sum(self.work[...], axis=1, keepdims=True)
        for receiver in receivers:
            receiver.far(self.plan.band, self.distance, slice(None), sums)

    def scores(self, head: int, products: jax.Array, masked: bool) -> jax.Array:
        """log2(e) · (scale · products + biases), HIDDEN where the key is not visible. `masked`: the band hides some."""
        s = products * self.plan.scale
        if "factor" in self.said.lines:
            s = s * self.on_line("factor", head)
        if "bias" in self.said.lines:
            s = s + self.on_line("bias", head)
        if "bias" in self.said.columns:
            s = s + self.of_keys("bias", head)
        if self.said.curves:
            u = self.on_line("distance", head) * self.of_queries("reach", head)
            s = s + math.log2(math.e) * by_strips(self.curve(head).at, u)
        visible = []
        if masked or self.plan.past_or_prefix:
            r = self.relative_positions()
        if masked and self.plan.left is not None:
            visible.append(r >= -self.plan.left)
        if masked and self.plan.right is not None:
            visible.append(r <= self.plan.right)
        if self.plan.past_or_prefix:
            visible.append((r <= 0) | (self.of_keys("prefix", head) > 0))
        if "segments" in self.said.rows:
            visible.append(self.of_queries("segments", head) == self.of_keys("segments", head))
        for part in visible:
            s = jnp.where(part, s, HIDDEN)
        return s

    def curve(self, head: int) -> Curve:
        block, met = self.plan.block, self.said.curves["met"]
        i, j = lax.div(self.first_query, block), lax.div(self.first_key, block)
        place = ((self.row * (self.plan.queries // block) + i) * (self.plan.keys // block) + j) * 2
        return Curve(self.said.curves["curve"], self.block * self.plan.per + head, met[place], met[place + 1])

    def dropped(self, head: int, values: jax.Array) -> jax.Array:
        """Dropout of probabilities, and of their cotangents; the bits are those of `kernels.attention.dropout`."""
        rate = self.plan.rate
        if rate == 0:
            return values
        return jnp.where(kept(self._dropout_bits(head), rate), values * (1 / (1 - rate)), 0.0)

    def _dropout_bits(self, head: int) -> jax.Array:
        words = (
            *(self.of_queries(name, head).astype(jnp.uint32) for name in ("first", "second")),
            self.key_index().astype(jnp.uint32),
        )
        if self.transposed:
            return shared_hash(*words) << lower_half(self._index(1))
        # Queries eight apart stand in the same places of two registers: the hash is computed for one of them.
        rows, columns = self.shape
        pairs = (rows // (2 * APART), 2, APART, columns)
        shared = shared_hash(*(word.reshape(pairs)[:, 0] for word in words))
        return jnp.stack([shared, shared << HALF], axis=1).reshape(self.shape)

    def gradients(self, head: int, products: jax.Array, of_p: jax.Array, masked: bool) -> tuple[jax.Array, jax.Array]:
        """(p, dS): probabilities before dropout and the gradient of the scores in base e, from dO · v."""
        p = jnp.exp2(self.scores(head, products, masked) - self.of_queries("lse", head))
        return p, p * (self.dropped(head, of_p) - self.of_queries("delta", head))

    def whole(self) -> jax.Array:
        """Whether the mask's band hides none of its entries."""
        plan, first = self.plan, self.distance - self.plan.offset
        inside = []
        if plan.left is not None:
            inside.append(first - (plan.block - 1) >= -plan.left)
        if plan.right is not None:
            inside.append(first + (plan.block - 1) <= plan.right)
        return inside[0] if len(inside) == 1 else inside[0] & inside[1]

    def run(self, is_visited: Any, compute: Callable[[bool, bool, int | None], None]) -> None:
        """compute(masked, beyond, shift), where the tile is visited at all.

        masked: the mask's band hides some entries. beyond: the tables' band has none. shift: of a tile where clipped tables are not constant.
        """
        if self.said.bands:
            beyond = self.plan.band.beyond(self.distance, self.plan.block)
            pl.when(is_visited & jnp.logical_not(beyond))(lambda: compute(self.plan.banded, False, None))
            self._run(is_visited & beyond, lambda masked: compute(masked, True, None))
            return
        elsewhere = is_visited
        for shift in self.plan.shifts:
            here = self.distance == shift * self.plan.block
            pl.when(is_visited & here)(functools.partial(compute, self.plan.banded, False, shift))
            elsewhere = elsewhere & jnp.logical_not(here)
        self._run(elsewhere, lambda masked: compute(masked, False, None))

    def _run(self, is_visited: Any, compute: Callable[[bool], None]) -> None:
        if not self.plan.banded:
            pl.when(is_visited)(lambda: compute(False))
            return
        whole = self.whole()
        pl.when(is_visited & whole)(lambda: compute(False))
        pl.when(is_visited & jnp.logical_not(whole))(lambda: compute(True))
