"""The terms of a tile of queries: what each adds to its scores, from tables that are sliced or gathered.

A tile is a run of queries against a run of keys. G query heads share one key/value head, and stand as G·T rows of it: arrays
of queries are `[B, K, G·T, H]`, scores `[B, K, G·T, S]`, split to `[B, K, G, T, …]` only where a term needs it (with G = 1
the extra axis alone costs XLA's CPU backend a copy at every product).
Every function here is linear or smooth in its arrays and is differentiated by JAX, tile by tile.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kernels.attention.reference import accumulator, table_rows
from kernels.attention.skew import collect, entries, expand, pick, skew, unskew
from kernels.attention.terms import (
    Dense,
    Multiply,
    Pairwise,
    PiecewiseLinear,
    Relative,
    RowColumn,
    RowMap,
    Table,
    Term,
    Toeplitz,
)

# Measured on a CPU: up to 64 queries and keys one product per query beats a product with every column and a skew.
_FEW_ENTRIES = 64 * 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(spec: str, x: Array, y: Array, dtype: jnp.dtype) -> Array:
    """An einsum with operands in `dtype` and sums in float32 at least, in both directions; gradients in the arrays' dtypes.

    JAX's own transpose would multiply the float32 cotangent, which no matrix unit does at speed.
    """
    wide = accumulator(dtype)
    return jnp.einsum(spec, x.astype(dtype), y.astype(dtype), preferred_element_type=wide)


def _product_backward(spec, dtype, saved, gradient):
    x, y = saved
    operands, out = spec.split("->")
    left, right = operands.split(",")
    return (
        product(f"{out},{right}->{left}", gradient, y, dtype).astype(x.dtype),
        product(f"{out},{left}->{right}", gradient, x, dtype).astype(y.dtype),
    )


product.defvjp(lambda spec, x, y, dtype: (product(spec, x, y, dtype), (x, y)), _product_backward)


@dataclass(frozen=True)
class Geometry:
    """The static sizes of a call and of its tiles.

    Tile c holds queries c·chunk … and `width` keys: all of them, or, with `band` (left, right), those from c·chunk + offset − left
    on. With an `offset` a table has one column per relative position of the tile, in `columns` columns, and tile c starts at
    column (tiles − 1 − c)·chunk of the expanded table (at 0 with a band, where every tile sees the same relative positions).
    """

    batch: int
    queries: int
    keys: int
    kv_heads: int
    groups: int
    chunk: int
    tiles: int
    offset: int | None
    band: tuple[int, int] | None
    width: int

    @property
    def heads(self) -> int:
        return self.kv_heads * self.groups

    @property
    def key_blocks(self) -> int:
        """Key-side tables are met by blocks of `chunk` keys, so that no array is keys × keys; one tile is one block."""
        return 1 if self.tiles == 1 else -(-self.width // self.chunk)

    @property
    def columns(self) -> int:
        return -(-(self.chunk + self.width - 1) // 16) * 16 if self.tiles == 1 else (self.key_blocks + 1) * self.chunk

    @property
    def few_entries(self) -> bool:
        """Whether a shared table may be laid out as [T, S, H]: half the products, for an array no larger than a batch of keys."""
        return self.tiles == 1 and self.offset is not None and self.chunk * self.width <= _FEW_ENTRIES

    @property
    def key_padding(self) -> tuple[int, int]:
        """How far bands reach beyond the keys, before the first and after the last."""
        if self.band is None:
            return 0, 0
        left, right = self.band
        last = self.tiles * self.chunk - 1 + self.offset + right
        return max(0, left - self.offset), max(0, last - (self.keys - 1))

    def relative_positions(self) -> np.ndarray:
        """r of every column of an expanded table."""
        shift = 0 if self.band is not None else (self.tiles - 1) * self.chunk
        first = -(self.band[0] if self.band is not None else self.offset + shift) - self.chunk + 1
        return first + np.arange(self.columns + shift)

    def split(self, x: Array) -> Array:
        """`[B, K, G·T, C]` → `[B, K, G, T, C]`; as it is where G = 1."""
        return x if self.groups == 1 else x.reshape(*x.shape[:2], self.groups, self.chunk, x.shape[3])

    def merge(self, x: Array) -> Array:
        """`[B, K, G or 1, T, C]` → `[B, K, G·T, C]`; as it is with four axes."""
        if x.ndim == 4:
            return x
        if x.shape[2] != self.groups:
            x = jnp.broadcast_to(x, (*x.shape[:2], self.groups, *x.shape[3:]))
        return x.reshape(*x.shape[:2], self.groups * x.shape[3], x.shape[4])

    def by_group(self, x: Array, axis: int = 0) -> Array:
        """Splits an axis of N heads into K, G; an axis of one into 1, 1."""
        groups = (1, 1) if x.shape[axis] == 1 else (self.kv_heads, self.groups)
        return x.reshape(*x.shape[:axis], *groups, *x.shape[axis + 1 :])


@dataclass(frozen=True)
class Tile:
    """Where one tile stands: its number (static where there is one tile) and its positions."""

    geometry: Geometry
    number: int | Array
    query_positions: Array
    key_positions: Array

    @property
    def first_query(self) -> int | Array:
        return self.number * self.geometry.chunk

    @property
    def first_key(self) -> int | Array:
        """Array index of the tile's first key; negative where a band reaches before the first one."""
        g = self.geometry
        return 0 if g.band is None else self.first_query + g.offset - g.band[0]

    def of_keys(self, x: Array, axis: int) -> Array:
        """The tile's part of an array padded by `key_padding` along `axis`."""
        if self.geometry.band is None:
            return x
        start = self.first_key + self.geometry.key_padding[0]
        return jax.lax.dynamic_slice_in_dim(x, start, self.geometry.width, axis=axis)

    def columns_of(self, table: Array, axis: int) -> Array:
        """The tile's columns of an expanded table; a gathered table whole."""
        g = self.geometry
        if g.offset is None or g.band is not None or g.tiles == 1:
            return table
        start = (g.tiles - 1 - self.number) * g.chunk
        return jax.lax.dynamic_slice_in_dim(table, start, g.columns, axis=axis)

    def index(self, rows: RowsOf) -> Array:
        """Row of a gathered table for every entry: int32 `[B or 1, T, S]`."""
        return rows.of(self.key_positions[:, None, :] - self.query_positions[:, :, None])

    def lookup(self, table: Array, rows: ToeplitzRows) -> Array:
        """A table `[K or 1, G or 1, columns]` at every entry: `[B or 1, K or 1, G or 1, T, S]`."""
        table = self.columns_of(table, axis=-1)
        wide = jnp.broadcast_to(table[None, :, :, None, :], (1, *table.shape[:2], self.geometry.chunk, table.shape[-1]))
        return self.per_query(wide, rows)

    def per_query(self, x: Array, rows: RowsOf) -> Array:
        """`[…, T, columns]` → `[…, T, S]` with two or three leading axes: of each query's columns, that of each key."""
        if self.geometry.offset is not None:
            return skew(x, self.geometry.width)
        index = self.index(rows)
        batch, *_, queries, size = x.shape
        x = jnp.broadcast_to(x, (max(batch, index.shape[0]), *x.shape[1:]))
        return pick(x.reshape(x.shape[0], -1, queries, size), index).reshape(*x.shape[:-1], index.shape[2])

    def per_column(self, x: Array, rows: RowsOf, size: int) -> Array:
        """The transpose of `per_query`: sums the entries of each column, `[…, T, S]` → `[…, T, columns]`."""
        if self.geometry.offset is not None:
            return unskew(x, size)
        out = collect(x.reshape(x.shape[0], -1, *x.shape[-2:]), self.index(rows), size)
        return out.reshape(*x.shape[:-1], size)

    def per_key(self, k: Array, table: Array, heads: str, rows: RowsOf) -> Array:
        """⟨k_j, C[ρ(r)]⟩ for every entry: `[B, K, G or 1, T, S]`; table `[columns, (K, (G,)) H]`."""
        g = self.geometry
        group = "g" if "g" in heads else ""
        if g.offset is None:
            met = product(f"bksh,c{heads}h->bk{group}sc", k, table, k.dtype)
            met = met if group else met[:, :, None]
            index = jnp.swapaxes(self.index(rows), 1, 2)
            batch, kv, groups, keys, size = met.shape
            picked = pick(met.reshape(batch, kv * groups, keys, size), index)
            return jnp.swapaxes(picked.reshape(batch, kv, groups, keys, -1), -1, -2)
        # Entry (y, x) of block s reads column x − y + chunk − 1 of the block's own band; reversed, that is a skew over keys.
        table = self.columns_of(table, axis=0)
        block = g.width if g.tiles == 1 else g.chunk
        if g.key_blocks > 1:
            halves = table.reshape(g.key_blocks + 1, block, *table.shape[1:])
            bands = jnp.concatenate([halves[:-1], halves[1:]], axis=1)
        else:
            bands = table[None]
        bands = jnp.flip(bands[:, : g.chunk + block - 1], axis=1)
        k = jnp.pad(k, [(0, 0), (0, 0), (0, g.key_blocks * block - g.width), (0, 0)])
        # Blocks go first: XLA's CPU backend has no bfloat16 product with a batch axis in the middle.
        k = jnp.moveaxis(k.reshape(*k.shape[:2], g.key_blocks, block, k.shape[3]), 2, 0)
        met = product(f"sbkxh,sc{heads}h->sbk{group}xc", k, bands, k.dtype)
        met = jnp.moveaxis(skew(met if group else met[:, :, :, None], g.chunk), 0, 3)
        met = met.reshape(*met.shape[:3], g.key_blocks * block, g.chunk)[..., : g.width, :]
        return jnp.swapaxes(met, -1, -2)


@dataclass(frozen=True)
class ToeplitzRows:
    """clip(r + zero, 0, size − 1)."""

    size: int
    zero: int | None

    def of(self, r):
        xp = np if isinstance(r, np.ndarray) else jnp
        return xp.clip(r + ((self.size - 1) // 2 if self.zero is None else self.zero), 0, self.size - 1)


@dataclass(frozen=True)
class MappedRows:
    """ρ(r) of a row map."""

    rows: RowMap

    def of(self, r):
        if isinstance(r, np.ndarray):
            return self.rows.lookup()[np.clip(r, -self.rows.span, self.rows.span) + self.rows.span]
        return table_rows(self.rows, r)


RowsOf = ToeplitzRows | MappedRows


def _columns(values: Array, rows: RowsOf, geometry: Geometry, axis: int) -> Array:
    """One column per relative position where tables are sliced; the table itself where they are gathered."""
    if geometry.offset is None:
        return values
    return expand(values, rows.of(geometry.relative_positions()), axis)


@dataclass(frozen=True)
class TableTile:
    """One table of a `Relative` term; `heads` are the letters of its head axes: "", "k" or "kg"."""

    rows: MappedRows
    heads: str

    @classmethod
    def prepare(cls, table: Table, geometry: Geometry) -> tuple[TableTile, Array]:
        values, shared = table.values, table.values.shape[1]
        if shared == 1:
            heads, values = "", values[:, 0]
        elif shared == geometry.kv_heads:
            heads = "k"
        else:
            heads, values = "kg", geometry.by_group(values, axis=1)
        rows = MappedRows(table.rows)
        return cls(rows, heads), _columns(values, rows, geometry, axis=0)

    def meets_query(self, tile: Tile, q: Array, table: Array) -> Array:
        if self._laid_out(tile):
            return product("bkqh,qsh->bkqs", q, self._entries(tile, table), q.dtype)
        table, split = tile.columns_of(table, axis=0), tile.geometry.split
        if "g" in self.heads:
            met = product("bkgqh,ckgh->bkgqc", split(q), table, q.dtype)
        else:
            met = split(product(f"bkqh,c{self.heads}h->bkqc", q, table, q.dtype))
        return tile.geometry.merge(tile.per_query(met, self.rows))

    def meets_key(self, tile: Tile, k: Array, table: Array) -> Array:
        if self._laid_out(tile):
            return product("bksh,qsh->bkqs", k, self._entries(tile, table), k.dtype)
        return tile.geometry.merge(tile.per_key(k, table, self.heads, self.rows))

    def meets_probabilities(self, tile: Tile, p: Array, table: Array, dtype: jnp.dtype) -> Array:
        if self._laid_out(tile):
            return product("bkqs,qsh->bkqh", p, self._entries(tile, table), dtype)
        table, g = tile.columns_of(table, axis=0), tile.geometry
        summed = tile.per_column(g.split(p), self.rows, table.shape[0])
        if "g" in self.heads:
            return g.merge(product("bkgqc,ckgh->bkgqh", summed, table, dtype))
        return product(f"bkqc,c{self.heads}h->bkqh", g.merge(summed), table, dtype)

    def _laid_out(self, tile: Tile) -> bool:
        return not self.heads and tile.geometry.groups == 1 and tile.geometry.few_entries

    def _entries(self, tile: Tile, table: Array) -> Array:
        return entries(table, tile.geometry.chunk, tile.geometry.width, table.shape[0])


@dataclass(frozen=True)
class ToeplitzTile:
    """A `Toeplitz` bias or a scalar `Multiply`."""

    rows: ToeplitzRows

    @classmethod
    def prepare(cls, term: Toeplitz | Multiply, geometry: Geometry, dtype: jnp.dtype):
        rows = ToeplitzRows(term.values.shape[1], term.zero)
        values = _columns(term.values.astype(dtype), rows, geometry, axis=1)
        return cls(rows), (), geometry.by_group(values)

    def at(self, tile: Tile, rows: tuple, table: Array) -> Array:
        return tile.lookup(table, self.rows)


@dataclass(frozen=True)
class ChannelTile:
    """A per-channel `Multiply`, channels leading."""

    rows: ToeplitzRows

    @classmethod
    def prepare(cls, term: Multiply, geometry: Geometry, dtype: jnp.dtype):
        rows = ToeplitzRows(term.values.shape[1], term.zero)
        values = _columns(term.values.astype(dtype), rows, geometry, axis=1)
        return cls(rows), geometry.by_group(jnp.moveaxis(values, 2, 0), axis=1)


def channel_product(
    tile: Tile, q: Array, k: Array, channels: tuple[ChannelTile, ...], tables: tuple[Array, ...]
) -> Array:
    """Σ_c q_ic k_jc Π m[n, r, c], one channel at a time: no array has both keys and channels."""
    wide, g = accumulator(q.dtype), tile.geometry

    @jax.checkpoint
    def add(total, channel):
        q, k, tables = channel
        outer = q.astype(wide)[..., :, None] * k.astype(wide)[:, :, None, :]
        for part, table in zip(channels, tables, strict=True):
            outer = outer * g.merge(tile.lookup(table, part.rows))
        return total + outer, None

    zero = jnp.zeros((*q.shape[:3], k.shape[2]), wide)
    return jax.lax.scan(add, zero, (jnp.moveaxis(q, -1, 0), jnp.moveaxis(k, -1, 0), tables))[0]


@dataclass(frozen=True)
class RowColumnTile:
    @classmethod
    def prepare(cls, term: RowColumn, geometry: Geometry, dtype: jnp.dtype):
        padding = [(0, 0), (0, 0), geometry.key_padding]
        columns = geometry.by_group(jnp.pad(term.b.astype(dtype), padding), axis=1)
        return cls(), by_tile(geometry.by_group(term.a.astype(dtype), axis=1), 3, geometry), columns

    def at(self, tile: Tile, row: Array, columns: Array) -> Array:
        return row[..., :, None] + tile.of_keys(columns, 3)[..., None, :]


# So that what has keys and knots is no larger than the scores of 8 heads.
_KNOTS_AT_A_TIME = 8


@dataclass(frozen=True)
class PiecewiseLinearTile:
    rows: ToeplitzRows

    @classmethod
    def prepare(cls, term: PiecewiseLinear, geometry: Geometry, dtype: jnp.dtype):
        rows = ToeplitzRows(term.distance.shape[0], term.zero)
        distance = _columns(term.distance.astype(dtype), rows, geometry, axis=0)
        slopes, line = (geometry.by_group(x.astype(dtype)) for x in (term.slopes, term.line))
        whole = (distance[None, None], jnp.moveaxis(slopes, 2, 0), line, term.knots.astype(dtype))
        return cls(rows), by_tile(term.row_scale.astype(dtype), 1, geometry), whole

    def at(self, tile: Tile, row_scale: Array, whole) -> Array:
        distance, slopes, line, knots = whole
        u = tile.lookup(distance, self.rows) * row_scale[:, None, None, :, None]

        # A few knots at a time, and recomputed backwards: no array has both keys and all knots.
        @jax.checkpoint
        def add(total, some):
            slope, at = some
            above = jnp.maximum(u[None, :, 0, 0], at[:, None, None, None])
            return total + jnp.einsum("mkg,mbts->bkgts", slope, above, precision="highest"), None

        straight = line[None, :, :, 0, None, None] + line[None, :, :, 1, None, None] * u
        return jax.lax.scan(add, straight, (_in_groups(slopes), _in_groups(knots)))[0]


def _in_groups(by_knot: Array) -> Array:
    """`[M, …]` → `[M / 8, 8, …]`, filled up with zeros: a knot of slope zero adds nothing."""
    missing = -by_knot.shape[0] % _KNOTS_AT_A_TIME
    filled = jnp.pad(by_knot, ((0, missing), *((0, 0),) * (by_knot.ndim - 1)))
    return filled.reshape(-1, _KNOTS_AT_A_TIME, *by_knot.shape[1:])


@dataclass(frozen=True)
class PairwiseTile:
    fn: object

    @classmethod
    def prepare(cls, term: Pairwise, geometry: Geometry, dtype: jnp.dtype):
        return cls(term.fn), (), term.params

    def at(self, tile: Tile, rows: tuple, params) -> Array:
        i, j = tile.query_positions, tile.key_positions
        size = max(i.shape[0], j.shape[0])
        i, j = (jnp.broadcast_to(x, (size, x.shape[1])) for x in (i, j))
        values = jax.vmap(lambda i, j: self.fn(params, i[:, None], j[None, :]))(i, j)
        return tile.geometry.by_group(values, axis=1)


@dataclass(frozen=True)
class DenseTile:
    @classmethod
    def prepare(cls, term: Dense, geometry: Geometry, dtype: jnp.dtype):
        bias = jnp.pad(term.bias, [(0, 0), (0, 0), (0, 0), geometry.key_padding])
        return cls(), by_tile(geometry.by_group(bias, axis=1), 3, geometry), ()

    def at(self, tile: Tile, bias: Array, whole: tuple) -> Array:
        return tile.of_keys(bias, 4)


_BIASES = {
    Toeplitz: ToeplitzTile,
    RowColumn: RowColumnTile,
    PiecewiseLinear: PiecewiseLinearTile,
    Pairwise: PairwiseTile,
    Dense: DenseTile,
}


@dataclass(frozen=True)
class TileTerms:
    """The terms of a call as functions of a tile; their arrays travel beside it, by tile (`rows`) and whole."""

    query_tables: tuple[TableTile, ...]
    key_tables: tuple[TableTile, ...]
    value_tables: tuple[TableTile, ...]
    factors: tuple[ToeplitzTile, ...]
    channels: tuple[ChannelTile, ...]
    biases: tuple[object, ...]

    @classmethod
    def prepare(cls, terms: tuple[Term, ...], geometry: Geometry, dtype: jnp.dtype):
        """(terms, rows, whole): what the tiles need of each term, derived from its data by linear functions of arrays."""
        parts = {"query": [], "key": [], "value": [], "factors": [], "channels": [], "biases": []}
        for term in terms:
            if isinstance(term, Relative):
                for side in ("query", "key", "value"):
                    if getattr(term, side) is not None:
                        part, table = TableTile.prepare(getattr(term, side), geometry)
                        parts[side].append((part, (), table))
            elif isinstance(term, Multiply) and term.values.ndim == 3:
                part, table = ChannelTile.prepare(term, geometry, dtype)
                parts["channels"].append((part, (), table))
            elif isinstance(term, Multiply):
                parts["factors"].append(ToeplitzTile.prepare(term, geometry, dtype))
            else:
                parts["biases"].append(_BIASES[type(term)].prepare(term, geometry, dtype))
        rows = {"biases": tuple(rows for _, rows, _ in parts["biases"])}
        whole = {kind: tuple(whole for *_, whole in found) for kind, found in parts.items()}
        return cls(*(tuple(part for part, *_ in found) for found in parts.values())), rows, whole

    def scores(self, tile: Tile, q: Array, k: Array, scale: float | int | Array, rows, whole) -> Array:
        """The tile's scores before the mask, float32 at least: `[B, K, G·T, S]`."""
        merge = tile.geometry.merge
        if self.channels:
            total = channel_product(tile, q, k, self.channels, whole["channels"])
        else:
            total = product("bkqh,bksh->bkqs", q, k, q.dtype)
        for part, table in zip(self.query_tables, whole["query"], strict=True):
            total = total + part.meets_query(tile, q, table)
        for part, table in zip(self.key_tables, whole["key"], strict=True):
            total = total + part.meets_key(tile, k, table)
        total = total * jnp.asarray(scale, total.dtype)
        for part, table in zip(self.factors, whole["factors"], strict=True):
            total = total * merge(part.at(tile, (), table))
        return self.biased(tile, total, rows, whole)

    def biased(self, tile: Tile, scores: Array, rows, whole) -> Array:
        """`[B, K, G·T, S]` with what stands outside the scale added."""
        for part, row, table in zip(self.biases, rows["biases"], whole["biases"], strict=True):
            scores = scores + tile.geometry.merge(part.at(tile, row, table)).astype(scores.dtype)
        return scores

    def outputs(self, tile: Tile, p: Array, v: Array, whole) -> Array:
        """Σ_j p_ij (v_j + Σ E[ρ(r)]) for the tile: `[B, K, G·T, Hv]`, float32 at least."""
        out = product("bkqs,bksh->bkqh", p, v, v.dtype)
        for part, table in zip(self.value_tables, whole["value"], strict=True):
            out = out + part.meets_probabilities(tile, p, table, v.dtype)
        return out


def by_tile(x: Array, axis: int, geometry: Geometry) -> Array:
    """Pads the query axis to whole tiles with zeros and moves the tile number to the front."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, geometry.tiles * geometry.chunk - x.shape[axis])
    x = jnp.pad(x, padding)
    x = x.reshape(*x.shape[:axis], geometry.tiles, geometry.chunk, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)
