"""A tile of scores inside a GPU kernel: what masks, terms and dropout say of its entries."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention import mosaic, mosaic_pairs
from kernels.attention.curve import Curve
from kernels.attention.dropout import kept, shared_hash
from kernels.attention.pallas_gpu_plan import Plan


@dataclass(frozen=True)
class Tile:
    """Where one tile of scores stands; `transposed` has keys first."""

    shape: tuple[int, int]
    first_query: Any
    first_key: Any
    transposed: bool = False

    def of_queries(self, vector: jax.Array) -> jax.Array:
        return mosaic.spread(vector, self.shape, int(self.transposed))

    def of_keys(self, vector: jax.Array) -> jax.Array:
        return mosaic.spread(vector, self.shape, int(not self.transposed))

    def part(self, start: Any, columns: int) -> Tile:
        """Some of its columns."""
        queries, keys = (
            (self.first_query + start, self.first_key)
            if self.transposed
            else (self.first_query, self.first_key + start)
        )
        return Tile((self.shape[0], columns), queries, keys, self.transposed)

    def query_index(self) -> jax.Array:
        return mosaic.index(self.shape, int(self.transposed)) + self.first_query

    def key_index(self) -> jax.Array:
        return mosaic.index(self.shape, int(not self.transposed)) + self.first_key


@dataclass(frozen=True)
class Loaded(Mapping):
    """Vectors in shared memory by name; each is read into registers, of which there are few, where it is used."""

    tiles: dict[str, Any]
    layout: Any

    @classmethod
    def part(cls, tiles: dict[str, Any], here: Any, layout: Any) -> Loaded:
        """Of each vector what is `here`."""
        return cls({name: ref.at[here] for name, ref in tiles.items()}, layout)

    def __getitem__(self, name: str) -> jax.Array:
        return mosaic.load(self.tiles[name], self.layout)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tiles)

    def __len__(self) -> int:
        return len(self.tiles)


class Biases(NamedTuple):
    """What is added to a tile's scores beside the bias of its keys, in shared memory: by name the windows of tables that the tile looks into,
    the tile of a `Dense` term, the curve of a `PiecewiseLinear` whose φ is the window "distance".
    """

    windows: Mapping[str, Any]
    dense: Any
    curve: Curve | None


NO_BIASES = Biases({}, None, None)


class Bands(NamedTuple):
    """What a tile's part of tables that queries or keys meet is made from, in shared memory: by side the 128 rows of a table, the tile's queries
    and its keys, and space for a turn (`mosaic_turns`).
    """

    windows: Mapping[str, Any]
    queries: Any
    keys: Any
    space: Any


def curve_in(curves: tuple, tile: Tile, b: Any, h: Any) -> Curve | None:
    """The function of a row of the batch and a head in a tile; curves: as in `Operands`."""
    if not curves:
        return None
    numbers, met = curves
    queries, keys = tile.shape[::-1] if tile.transposed else tile.shape
    place = b, lax.div(tile.first_query, queries), lax.div(tile.first_key, keys)
    return Curve(numbers, h, met[*place, 0], met[*place, 1])


def on_diagonals(plan: Plan, tile: Tile, biases: Biases, name: str) -> jax.Array:
    """Of every entry the table's value at its relative position."""
    return mosaic.toeplitz(biases.windows[name], tile.shape, transposed=tile.transposed, interpret=plan.interpret)


def scores(
    plan: Plan, tile: Tile, product: jax.Array, rows: Mapping, columns: Mapping, biases: Biases
) -> tuple[jax.Array, float]:
    """(s, c): the scores log2(e) · (scale · product + biases) are c · s.

    Without biases s is the product and c the scale, which the exponential then multiplies at no cost, as it does log2(e) where there are
    only biases in base e, a `Dense` term and a curve.
    """
    natural, binary = [], []
    if biases.dense is not None:
        natural.append(mosaic.load(biases.dense, plgpu.Layout.WGMMA).astype(jnp.float32))
    if biases.curve is not None:
        natural.append(biases.curve.at(on_diagonals(plan, tile, biases, "distance") * tile.of_queries(rows["reach"])))
    if "bias" in columns:
        binary.append(tile.of_keys(columns["bias"]))
    if "bias" in biases.windows:
        binary.append(on_diagonals(plan, tile, biases, "bias"))
    if natural and not binary:
        return functools.reduce(operator.add, natural, product * plan.slope), math.log2(math.e)
    binary += [bias * math.log2(math.e) for bias in natural]
    if binary or plan.scale <= 0:
        return functools.reduce(operator.add, binary, product * plan.scale), 1.0
    return product, plan.scale


def visible(plan: Plan, tile: Tile, x: jax.Array, hidden: float, rows: Mapping, columns: Mapping) -> jax.Array:
    """x, and `hidden` where the mask hides the key from the query."""
    seen = []
    if plan.left is not None or plan.right is not None or plan.past_or_prefix:
        r = tile.key_index() - tile.query_index() - plan.offset
        if plan.left is not None:
            seen.append(r >= -plan.left)
        if plan.right is not None:
            seen.append(r <= plan.right)
        if plan.past_or_prefix:
            seen.append((r <= 0) | (tile.of_keys(columns["prefix"]) > 0))
    if "segments" in rows:
        seen.append(tile.of_queries(rows["segments"]) == tile.of_keys(columns["segments"]))
    for part in seen:
        x = jnp.where(part, x, mosaic.zeros(tile.shape, value=hidden))
    return x


def probabilities(plan: Plan, tile: Tile, product, rows: Mapping, columns: Mapping, biases: Biases) -> jax.Array:
    """p before dropout, from the products q kᵀ and the rows' lse."""
    s, factor = scores(plan, tile, product, rows, columns, biases)
    # Masked behind the exponential: before it, a select would stand between a product and a sum that are one instruction.
    return visible(plan, tile, jnp.exp2(s * factor - tile.of_queries(rows["lse"])), 0.0, rows, columns)


def stays(plan: Plan, tile: Tile, rows: Mapping) -> jax.Array:
    """Where dropout leaves probabilities, and their cotangents; the bits are those of `kernels.attention.dropout`."""
    words = tile.of_queries(rows["first"]), tile.of_queries(rows["second"]), tile.key_index().astype(jnp.uint32)
    bits = mosaic_pairs.halves_of_pairs(shared_hash, words, transposed=tile.transposed, interpret=plan.interpret)
    return kept(bits, plan.rate)


def dropped(plan: Plan, tile: Tile, p: jax.Array, rows: Mapping) -> jax.Array:
    """Dropout but for the factor `plan.growth`, which sums are given where they end."""
    return p if plan.rate == 0 else jnp.where(stays(plan, tile, rows), p, mosaic.zeros(tile.shape))


def score_gradients(plan: Plan, tile: Tile, p: jax.Array, products: jax.Array, rows: Mapping) -> jax.Array:
    """dS, of the scores in base e, from the products dO vᵀ and the rows' delta."""
    delta = rows["delta"]
    if plan.rate == 0:
        return p * (products - tile.of_queries(delta))
    gone = tile.of_queries(-delta)
    return p * jnp.where(stays(plan, tile, rows), products * plan.growth + gone, gone)
