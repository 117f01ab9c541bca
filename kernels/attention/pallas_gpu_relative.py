"""The kernels of `pallas_gpu` for clipped relative tables, as products of two sides (`separable` has the equations).

Only tiles that touch the band |r| < K pay for another product. Beyond it ρ and what dP gains are one number for each query, which goes
into the numbers that its row has anyway: the running maximum, lse and delta.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention import mosaic
from kernels.attention.fused import FLOOR, HIDDEN, Given
from kernels.attention.pallas_gpu_operands import operands_of, split_operands, within_reach
from kernels.attention.pallas_gpu_phases import Phase, over_phases
from kernels.attention.pallas_gpu_pipeline import fetch, key_tiles, tile_spec, vector_specs
from kernels.attention.pallas_gpu_plan import Blocks, Diagonals, Plan
from kernels.attention.pallas_gpu_tile import (
    NO_BIASES,
    Loaded,
    Tile,
    dropped,
    probabilities,
    score_gradients,
    scores,
    visible,
)
from kernels.attention.separable import Sides, Sums


@dataclass(frozen=True)
class Band:
    """The static part: where the tables clip, how wide g is, and which sides there are. Values are as wide as keys."""

    plan: Plan
    limit: int
    width: int
    scores: bool
    values: bool

    @property
    def forward(self) -> Blocks:
        return Blocks(self.plan.forward.columns if self._narrow else 64)

    @property
    def dq(self) -> Blocks:
        return Blocks(self.plan.dq.columns) if self._narrow else Blocks(64, 1)

    @property
    def dkv(self) -> Blocks:
        return Blocks(self.plan.dkv.columns) if self._narrow else Blocks(64, 1)

    @property
    def _narrow(self) -> bool:
        return max(self.plan.width, self.width) <= 64

    def keys_of(self, b: Any, program: Any, block: Blocks, reach: tuple) -> Stretch:
        """The tiles of keys that a program of queries meets."""
        near = dataclasses.replace(self.plan, left=self.limit - 1, right=self.limit - 1)
        sizes = program * block.program, block.program, block.columns
        return Stretch.of(within_reach(reach, b, program, *self.plan.keys_of(*sizes)), near.keys_of(*sizes))

    def queries_of(self, b: Any, program: Any, block: Blocks, reach: tuple) -> Stretch:
        near = dataclasses.replace(self.plan, left=self.limit - 1, right=self.limit - 1)
        sizes = program * block.program, block.program, block.columns
        return Stretch.of(within_reach(reach, b, program, *self.plan.queries_of(*sizes)), near.queries_of(*sizes))

    def phases(self, stretch: Stretch, tile_at: Callable[[Any], Tile], near: Callable, far: Callable) -> list[Phase]:
        """First the tiles of a program on both sides of the band, then those within it.

        `far(tile, here, ahead, tiles, carry)`: which of the columns in shared memory are the tile's own, and 1 where r ≥ K,
        0 where r ≤ −K. `near(tile, here, outside, tiles, more, carry)`: 64 columns, some with |r| < K, and `outside()` where others are;
        two products more fit the registers with 64 columns alone.
        """

        def beyond(t, tiles, more, carry):
            tile = tile_at(t)
            return far(tile, pl.ds(0, tile.shape[1]), self._ahead(tile), tiles, carry)

        def within(t, tiles, more, carry):
            def part(number, carry):
                tile, here = tile_at(t).part(number * 64, 64), pl.ds(number * 64, 64)
                least, most = self._reach(tile)
                touches = (most > -self.limit) & (least < self.limit)
                inside = (least > -self.limit) & (most < self.limit)
                return lax.switch(
                    touches.astype(jnp.int32) + inside.astype(jnp.int32),
                    [
                        lambda carry: far(tile, here, self._ahead(tile), tiles, carry),
                        lambda carry: near(tile, here, functools.partial(self._outside, tile), tiles, more, carry),
                        lambda carry: near(tile, here, tuple, tiles, more, carry),
                    ],
                    carry,
                )

            return lax.fori_loop(0, tile_at(t).shape[1] // 64, part, carry)

        return [
            Phase(beyond, stretch.beyond, stretch.count - stretch.within),
            Phase(within, lambda i: stretch.near + i, stretch.within, whole=True),
        ]

    def _ahead(self, tile: Tile) -> jax.Array:
        return (self._reach(tile)[0] > 0).astype(jnp.int32)

    def _reach(self, tile: Tile) -> tuple[Any, Any]:
        queries, keys = tile.shape[::-1] if tile.transposed else tile.shape
        first = tile.first_key - tile.first_query - self.plan.offset
        return first - queries + 1, first + keys - 1

    def relative(
        self, tile: Tile, outside: Callable[[], Sequence], products: jax.Array, end: Callable[[Any], jax.Array]
    ) -> jax.Array:
        """ρ of a tile near the band, from the products of f and g and the number of each query on either side."""
        for there, ahead in outside():
            products = jnp.where(there, tile.of_queries(end(ahead)), products)
        return products

    def near_sums(
        self, outside: Callable[[], Sequence], x: jax.Array, g: Any, total: jax.Array, sums: tuple, dtype: Any
    ) -> tuple:
        """Σ_{|r|<K} x g of each query, added to `total`, and (Σ_{r≥K} x, Σ_{r≤−K} x), added to `sums`."""
        nothing = mosaic.zeros(x.shape)
        for there, ahead in outside():
            beyond = jnp.where(there, x, nothing)
            x, sums = x - beyond, _added(sums, jnp.sum(beyond, axis=1), ahead)
        return mosaic.add_product(total, x.astype(dtype), g, interpret=self.plan.interpret), sums

    def _outside(self, tile: Tile) -> list[tuple[jax.Array, Any]]:
        """Where r ≥ K, with 1, and where r ≤ −K, with 0; a tile that is too small for both has one of them."""
        key, query, offset = tile.key_index(), tile.query_index(), self.plan.offset
        if 2 * self.limit > sum(tile.shape) - 2:
            ahead = (self._reach(tile)[1] >= self.limit).astype(jnp.int32)
            sign = 2 * ahead - 1
            return [(key * sign >= query * sign + (offset * sign + self.limit), ahead)]
        return [(key >= query + (offset + self.limit), 1), (key <= query + (offset - self.limit), 0)]


class Stretch(NamedTuple):
    """`count` tiles from `low` on, of which `within` from `near` on may touch the band."""

    low: Any
    count: Any
    near: Any
    within: Any

    @classmethod
    def of(cls, seen: tuple[Any, Any], touching: tuple[Any, Any]) -> Stretch:
        """Each (the first, how many)."""
        low, count, first, many = (jnp.asarray(x, jnp.int32) for x in (*seen, *touching))
        near = lax.clamp(low, first, low + count)
        return cls(low, count, near, lax.clamp(near, first + many, low + count) - near)

    def beyond(self, i: Any) -> Any:
        """The i-th that does not touch it."""
        t = self.low + i
        return lax.select(t < self.near, t, t + self.within)


def _end(rows: Mapping, name: str, ahead: Any) -> jax.Array:
    """The number of each query that is one where r ≥ K, `ahead` 1, and another where r ≤ −K, 0."""
    if isinstance(ahead, int):
        return rows[f"{name} above" if ahead else f"{name} below"]
    share = ahead.astype(jnp.float32)
    return rows[f"{name} above"] * share + rows[f"{name} below"] * (1 - share)


def _added(sums: tuple, more: jax.Array, ahead: Any) -> tuple:
    """Σ_{r≥K} and Σ_{r≤−K} of each query, and `more` of either."""
    above, below = sums
    if isinstance(ahead, int):
        return (above + more, below) if ahead else (above, below + more)
    share = ahead.astype(jnp.float32)
    return above + more * share, below + more * (1 - share)


def forward(band: Band, q, k, v, sides: Sides, given: Given) -> tuple[Sums, jax.Array]:
    """The sums, and lse `[B, N, T]`."""
    plan, block = band.plan, band.forward
    rows = given.rows | ({"c above": sides.above, "c below": sides.below} if band.scores else {})
    extended = given._replace(rows=rows)
    diagonals = Diagonals(plan, block.program, block.columns)

    def body(q_ref, k_ref, v_ref, g_ref, *refs):
        (row_refs, column_refs, *_, reach), refs = split_operands(extended, refs)
        f_ref, refs = (refs[0], refs[1:]) if band.scores else (None, refs)
        out_ref, lse_ref, *refs = refs
        w_refs, refs = (refs[:3], refs[3:]) if band.values else ((), refs)
        q_tile, f_tile, vector_tile, barriers, *row_tiles = refs
        b, h, program = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("tile")
        warpgroup = lax.axis_index("warpgroup")
        first_query = program * block.program + warpgroup * block.rows
        row_tiles = {name: tile.at[warpgroup] for name, tile in zip(row_refs, row_tiles, strict=True)}
        row_vectors = Loaded(row_tiles, mosaic.ROWS)

        def compute(run):
            here = pl.ds(first_query, block.rows)
            fetched = [(q_ref.at[b, here, h], q_tile.at[warpgroup]), *_own(row_refs, row_tiles, b, h, here)]
            if band.scores:
                fetched.append((f_ref.at[b, here, h], f_tile.at[warpgroup]))
            fetch(fetched, barriers.at[warpgroup])
            empty, nothing_seen = (mosaic.zeros((block.rows,), mosaic.ROWS, value) for value in (0.0, FLOOR))
            sums = (nothing_seen, mosaic.zeros((block.rows, band.width)), (empty, empty)) if band.values else ()
            carry = (mosaic.zeros((block.rows, plan.value_width)), nothing_seen, empty, sums)
            total, top, mass, sums = run(carry)
            mass = lax.max(mass, mosaic.zeros((block.rows,), mosaic.ROWS, 1e-30))
            share = plan.growth / mass
            q_tile.at[warpgroup][...] = (total * mosaic.spread(share, total.shape, 0)).astype(q.dtype)
            vector_tile.at[0, warpgroup][...] = top + jnp.log2(mass)
            if band.values:
                seen, w, (above, below) = sums
                f_tile.at[warpgroup][...] = (w * mosaic.spread(jnp.exp2(seen - top) * share, w.shape, 0)).astype(
                    q.dtype
                )
                vector_tile.at[1, warpgroup][...] = above * share
                vector_tile.at[2, warpgroup][...] = below * share
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile.at[warpgroup], out_ref.at[b, here, h])
            plgpu.copy_smem_to_gmem(vector_tile.at[0, warpgroup], lse_ref.at[b, h, here])
            if band.values:
                plgpu.copy_smem_to_gmem(f_tile.at[warpgroup], w_refs[0].at[b, here, h])
                plgpu.copy_smem_to_gmem(vector_tile.at[1, warpgroup], w_refs[1].at[b, h, here])
                plgpu.copy_smem_to_gmem(vector_tile.at[2, warpgroup], w_refs[2].at[b, h, here])
            plgpu.wait_smem_to_gmem(0)

        def seen_by(tile, s, end, v_part, column_vectors, carry):
            """(the next total, top and mass, what earlier sums shrink by, the probabilities after dropout), from products."""
            total, top, mass, _ = carry
            s, factor = scores(plan, tile, s, row_vectors, column_vectors, NO_BIASES)
            s = visible(plan, tile, s, HIDDEN / factor, row_vectors, column_vectors)
            higher = lax.max(top, jnp.max(s, axis=1) * factor + end)
            p = jnp.exp2(s * factor - tile.of_queries(higher - end))
            shrink = jnp.exp2(top - higher)
            mass, of_tile = mass * shrink, jnp.sum(p, axis=1)
            total = total * mosaic.spread(shrink, total.shape, 0)
            p = dropped(plan, tile, p, row_vectors)
            total = mosaic.add_product(total, p.astype(q.dtype), v_part, interpret=plan.interpret)
            return (total, higher, mass + of_tile), shrink, p, of_tile

        def near(tile, here, outside, tiles, g_tile, carry):
            k_tile, v_tile, column_tiles = tiles
            column_vectors = Loaded.part(column_tiles, here, mosaic.COLUMNS)
            s = mosaic.product(q_tile.at[warpgroup], k_tile.at[here], tile.shape)
            if band.scores:
                products = mosaic.product(f_tile.at[warpgroup], g_tile.at[here], tile.shape)
                s = s + band.relative(tile, outside, products, functools.partial(_end, row_vectors, "c"))
            after, shrink, p, _ = seen_by(tile, s, 0.0, v_tile.at[here], column_vectors, carry)
            sums = carry[3]
            if band.values:
                seen, w, (above, below) = sums
                # What is kept of W is rescaled here and at the end alone, not wherever the maximum may rise.
                w = w * mosaic.spread(jnp.exp2(seen - after[1]), w.shape, 0)
                ends = above * shrink, below * shrink
                sums = after[1], *band.near_sums(outside, p, g_tile.at[here], w, ends, q.dtype)
            return *after, sums

        def far(tile, here, ahead, tiles, carry):
            k_tile, v_tile, column_tiles = tiles
            column_vectors = Loaded.part(column_tiles, here, mosaic.COLUMNS)
            s = mosaic.product(q_tile.at[warpgroup], k_tile.at[here], tile.shape)
            end = _end(row_vectors, "c", ahead) * plan.scale if band.scores else 0.0
            after, shrink, p, of_tile = seen_by(tile, s, end, v_tile.at[here], column_vectors, carry)
            sums = carry[3]
            if band.values:
                seen, w, (above, below) = sums
                kept = of_tile if plan.rate == 0 else jnp.sum(p, axis=1)
                sums = seen, w, _added((above * shrink, below * shrink), kept, ahead)
            return *after, sums

        def tile_at(t):
            return Tile((block.rows, block.columns), first_query, t * block.columns)

        over_phases(
            band.phases(band.keys_of(b, program, block, reach), tile_at, near, far),
            1,
            compute,
            key_tiles(plan, block.columns, k_ref, v_ref, column_refs, h, lambda _, t: (b, t)),
            (g_ref, plgpu.BlockSpec((block.columns, band.width), lambda _, t: (t, 0))),
            block.warpgroups,
        )

    of_queries = jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.queries), jnp.float32)
    shape = (plan.batch, plan.queries, plan.heads)
    out, w = (jax.ShapeDtypeStruct((*shape, width), q.dtype) for width in (plan.value_width, band.width))
    per = block.warpgroups
    out, lse, *rest = mosaic.kernel(
        body,
        out=(
            out,
            of_queries,
            *((w, of_queries, of_queries) if band.values else ()),
        ),
        scratch=[
            plgpu.SMEM((per, block.rows, plan.width), q.dtype),
            plgpu.SMEM((per, block.rows, band.width), q.dtype),
            plgpu.SMEM((3, per, block.rows), jnp.float32),
            plgpu.Barrier(num_arrivals=1 + band.scores + len(extended.rows), num_barriers=per),
            *(plgpu.SMEM((per, block.rows), x.dtype) for x in extended.rows.values()),
        ],
        grid={"head": plan.heads, "tile": plan.queries // block.program, "batch": plan.batch},
        warpgroups=per,
        interpret=plan.interpret,
    )(q, k, v, sides.g, *operands_of(extended, diagonals), *([sides.f] if band.scores else []))
    return Sums(out, *(rest or (None, None, None))), lse


def backward_queries(band: Band, q, k, v, sides: Sides, d: Sums, given: Given) -> tuple[jax.Array, Sides]:
    """The gradients of q, and of f, c⁺ and c⁻; `given` holds the rows lse and delta."""
    plan, block = band.plan, band.dq
    extended = given._replace(rows=given.rows | _numbers(band, sides, d))
    diagonals = Diagonals(plan, block.program, block.columns)

    def body(q_ref, k_ref, v_ref, g_ref, d_ref, *refs):
        (row_refs, column_refs, *_, reach), refs = split_operands(extended, refs)
        f_ref, refs = (refs[0], refs[1:]) if band.scores else (None, refs)
        dw_ref, refs = (refs[0], refs[1:]) if band.values else (None, refs)
        dq_ref, *refs = refs
        df_refs, refs = (refs[:3], refs[3:]) if band.scores else ((), refs)
        q_tile, f_tile, d_tile, dw_tile, df_tile, vector_tile, barriers, *row_tiles = refs
        b, h, program = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("tile")
        warpgroup = lax.axis_index("warpgroup")
        first_query = program * block.program + warpgroup * block.rows
        row_tiles = {name: tile.at[warpgroup] for name, tile in zip(row_refs, row_tiles, strict=True)}
        row_vectors = Loaded(row_tiles, mosaic.ROWS)

        def compute(run):
            here = pl.ds(first_query, block.rows)
            fetched = [(q_ref.at[b, here, h], q_tile.at[warpgroup]), (d_ref.at[b, here, h], d_tile.at[warpgroup])]
            fetched += _own(row_refs, row_tiles, b, h, here)
            if band.scores:
                fetched.append((f_ref.at[b, here, h], f_tile.at[warpgroup]))
            if band.values:
                fetched.append((dw_ref.at[b, here, h], dw_tile.at[warpgroup]))
            fetch(fetched, barriers.at[warpgroup])
            empty = mosaic.zeros((block.rows,), mosaic.ROWS)
            if band.scores:
                df_tile.at[warpgroup][...] = mosaic.zeros((block.rows, band.width))
                plgpu.commit_smem()
            carry = (mosaic.zeros((block.rows, plan.width)), (empty, empty) if band.scores else ())
            total, sums = run(carry)
            q_tile.at[warpgroup][...] = (total * plan.slope).astype(q.dtype)
            if band.scores:
                df = mosaic.load(df_tile.at[warpgroup], plgpu.Layout.WGMMA)
                f_tile.at[warpgroup][...] = (df * plan.slope).astype(q.dtype)
                vector_tile.at[0, warpgroup][...] = sums[0] * plan.slope
                vector_tile.at[1, warpgroup][...] = sums[1] * plan.slope
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile.at[warpgroup], dq_ref.at[b, here, h])
            if band.scores:
                plgpu.copy_smem_to_gmem(f_tile.at[warpgroup], df_refs[0].at[b, here, h])
                plgpu.copy_smem_to_gmem(vector_tile.at[0, warpgroup], df_refs[1].at[b, h, here])
                plgpu.copy_smem_to_gmem(vector_tile.at[1, warpgroup], df_refs[2].at[b, h, here])
            plgpu.wait_smem_to_gmem(0)

        def near(tile, here, outside, tiles, g_tile, carry):
            k_tile, v_tile, column_tiles = tiles
            total, sums = carry
            column_vectors = Loaded.part(column_tiles, here, mosaic.COLUMNS)
            s = mosaic.product(q_tile.at[warpgroup], k_tile.at[here], tile.shape)
            if band.scores:
                products = mosaic.product(f_tile.at[warpgroup], g_tile.at[here], tile.shape)
                s = s + band.relative(tile, outside, products, functools.partial(_end, row_vectors, "c"))
            p = probabilities(plan, tile, s, row_vectors, column_vectors, NO_BIASES)
            dp = mosaic.product(d_tile.at[warpgroup], v_tile.at[here], tile.shape)
            if band.values:
                products = mosaic.product(dw_tile.at[warpgroup], g_tile.at[here], tile.shape)
                dp = dp + band.relative(tile, outside, products, functools.partial(_end, row_vectors, "dP"))
            ds = score_gradients(plan, tile, p, dp, row_vectors)
            total = mosaic.add_product(total, ds.astype(q.dtype), k_tile.at[here], interpret=plan.interpret)
            if band.scores:
                df = mosaic.load(df_tile.at[warpgroup], plgpu.Layout.WGMMA)
                df, sums = band.near_sums(outside, ds, g_tile.at[here], df, sums, q.dtype)
                df_tile.at[warpgroup][...] = df
                plgpu.commit_smem()
            return total, sums

        def far(tile, here, ahead, tiles, carry):
            k_tile, v_tile, column_tiles = tiles
            total, sums = carry
            column_vectors = Loaded.part(column_tiles, here, mosaic.COLUMNS)
            s = mosaic.product(q_tile.at[warpgroup], k_tile.at[here], tile.shape)
            lse = row_vectors["lse"]
            if band.scores:
                lse = lse - _end(row_vectors, "c", ahead) * plan.scale
            p = probabilities(plan, tile, s, ChainMap({"lse": lse}, row_vectors), column_vectors, NO_BIASES)
            dp = mosaic.product(d_tile.at[warpgroup], v_tile.at[here], tile.shape)
            delta = row_vectors["delta"]
            if band.values and plan.rate == 0:
                delta = delta - _end(row_vectors, "dP", ahead)
            elif band.values:
                dp = dp + tile.of_queries(_end(row_vectors, "dP", ahead))
            ds = score_gradients(plan, tile, p, dp, ChainMap({"delta": delta}, row_vectors))
            total = mosaic.add_product(total, ds.astype(q.dtype), k_tile.at[here], interpret=plan.interpret)
            return total, _added(sums, jnp.sum(ds, axis=1), ahead) if band.scores else ()

        def tile_at(t):
            return Tile((block.rows, block.columns), first_query, t * block.columns)

        over_phases(
            band.phases(band.keys_of(b, program, block, reach), tile_at, near, far),
            1,
            compute,
            key_tiles(plan, block.columns, k_ref, v_ref, column_refs, h, lambda _, t: (b, t)),
            (g_ref, plgpu.BlockSpec((block.columns, band.width), lambda _, t: (t, 0))),
            block.warpgroups,
        )

    of_queries = jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.queries), jnp.float32)
    per = block.warpgroups
    dq, *rest = mosaic.kernel(
        body,
        out=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            *((jax.ShapeDtypeStruct(sides.f.shape, q.dtype), of_queries, of_queries) if band.scores else ()),
        ),
        scratch=[
            plgpu.SMEM((per, block.rows, plan.width), q.dtype),
            plgpu.SMEM((per, block.rows, band.width), q.dtype),
            plgpu.SMEM((per, block.rows, plan.value_width), q.dtype),
            plgpu.SMEM((per, block.rows, band.width), q.dtype),
            plgpu.SMEM((per, block.rows, band.width), jnp.float32),  # few tiles add to it, none need wait with it
            plgpu.SMEM((2, per, block.rows), jnp.float32),
            plgpu.Barrier(num_arrivals=2 + band.scores + band.values + len(extended.rows), num_barriers=per),
            *(plgpu.SMEM((per, block.rows), x.dtype) for x in extended.rows.values()),
        ],
        grid={"head": plan.heads, "tile": plan.queries // block.program, "batch": plan.batch},
        warpgroups=per,
        interpret=plan.interpret,
    )(q, k, v, sides.g, d.out, *operands_of(extended, diagonals), *_tiles_of_queries(band, sides, d))
    return dq, Sides(*(rest or (None, None, None)), None)


def backward_keys(band: Band, q, k, v, sides: Sides, d: Sums, given: Given) -> tuple[jax.Array, jax.Array]:
    """The gradients of k and v, each summed over the query heads that read it."""
    plan, block = band.plan, band.dkv
    ends = _ends(band, given.rows, sides, d)
    place = {name: 2 * i for i, name in enumerate(ends)}
    diagonals = Diagonals(plan, block.program, block.columns, transposed=True)

    def body(q_ref, k_ref, v_ref, g_ref, d_ref, *refs):
        (row_refs, column_refs, *_, reach), refs = split_operands(given, refs)
        end_ref, *refs = refs
        f_refs, refs = (refs[:1], refs[1:]) if band.scores else ((), refs)
        dw_refs, refs = (refs[:1], refs[1:]) if band.values else ((), refs)
        dk_ref, dv_ref, k_tile, v_tile, g_tile, barriers, *column_tiles = refs
        b, kv_head, program = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("tile")
        warpgroup = lax.axis_index("warpgroup")
        first_key = program * block.program + warpgroup * block.rows
        column_tiles = {name: tile.at[warpgroup] for name, tile in zip(column_refs, column_tiles, strict=True)}
        column_vectors = Loaded(column_tiles, mosaic.ROWS)

        def compute(run):
            here = pl.ds(first_key, block.rows)
            fetched = [
                (k_ref.at[b, here, kv_head], k_tile.at[warpgroup]),
                (v_ref.at[b, here, kv_head], v_tile.at[warpgroup]),
                (g_ref.at[here], g_tile.at[warpgroup]),
                *_own(column_refs, column_tiles, b, kv_head, here),
            ]
            fetch(fetched, barriers.at[warpgroup])
            carry = mosaic.zeros((block.rows, plan.width)), mosaic.zeros((block.rows, plan.value_width))
            dk, dv = run(carry)
            k_tile.at[warpgroup][...] = (dk * plan.slope).astype(k.dtype)
            v_tile.at[warpgroup][...] = (dv * plan.growth).astype(v.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_tile.at[warpgroup], dk_ref.at[b, here, kv_head])
            plgpu.copy_smem_to_gmem(v_tile.at[warpgroup], dv_ref.at[b, here, kv_head])
            plgpu.wait_smem_to_gmem(0)

        def ends_at(tile, here, ahead):
            return Loaded({name: tile.at[first + ahead, here] for name, first in place.items()}, mosaic.COLUMNS)

        def near(tile, here, outside, tiles, more, carry):
            q_tile, d_tile, row_tiles, end_tile = tiles
            f_tiles, dw_tiles = more
            dk, dv = carry
            row_vectors = Loaded.part(row_tiles, here, mosaic.COLUMNS)
            s = mosaic.product(k_tile.at[warpgroup], q_tile.at[here], tile.shape)
            if band.scores:
                products = mosaic.product(g_tile.at[warpgroup], f_tiles[0].at[here], tile.shape)
                s = s + band.relative(tile, outside, products, lambda ahead: ends_at(end_tile, here, ahead)["c"])
            p = probabilities(plan, tile, s, row_vectors, column_vectors, NO_BIASES)
            kept = dropped(plan, tile, p, row_vectors).astype(q.dtype)
            dv = mosaic.add_product(dv, kept, d_tile.at[here], interpret=plan.interpret)
            dp = mosaic.product(v_tile.at[warpgroup], d_tile.at[here], tile.shape)
            if band.values:
                products = mosaic.product(g_tile.at[warpgroup], dw_tiles[0].at[here], tile.shape)
                dp = dp + band.relative(tile, outside, products, lambda ahead: ends_at(end_tile, here, ahead)["dP"])
            ds = score_gradients(plan, tile, p, dp, row_vectors)
            return mosaic.add_product(dk, ds.astype(q.dtype), q_tile.at[here], interpret=plan.interpret), dv

        def far(tile, here, ahead, tiles, carry):
            q_tile, d_tile, row_tiles, end_tile = tiles
            dk, dv = carry
            ends = ends_at(end_tile, here, ahead)
            row_vectors = ChainMap(ends, Loaded.part(row_tiles, here, mosaic.COLUMNS))
            s = mosaic.product(k_tile.at[warpgroup], q_tile.at[here], tile.shape)
            p = probabilities(plan, tile, s, row_vectors, column_vectors, NO_BIASES)
            kept = dropped(plan, tile, p, row_vectors).astype(q.dtype)
            dv = mosaic.add_product(dv, kept, d_tile.at[here], interpret=plan.interpret)
            dp = mosaic.product(v_tile.at[warpgroup], d_tile.at[here], tile.shape)
            if band.values and plan.rate > 0:
                dp = dp + tile.of_queries(ends["dP"])
            ds = score_gradients(plan, tile, p, dp, row_vectors)
            return mosaic.add_product(dk, ds.astype(q.dtype), q_tile.at[here], interpret=plan.interpret), dv

        def tile_at(t):
            return Tile((block.rows, block.columns), t * block.columns, first_key, transposed=True)

        def at(g, t):
            return b, t, kv_head * plan.group + g

        over_phases(
            band.phases(band.queries_of(b, program, block, reach), tile_at, near, far),
            plan.group,
            compute,
            [
                (q_ref, tile_spec(block.columns, plan.width, at)),
                (d_ref, tile_spec(block.columns, plan.value_width, at)),
                vector_specs(row_refs, block.columns, at),
                (end_ref, _end_spec(2 * len(ends), block.columns, at)),
            ],
            [[(ref, tile_spec(block.columns, band.width, at)) for ref in refs] for refs in (f_refs, dw_refs)],
            block.warpgroups,
        )

    per = block.warpgroups
    return mosaic.kernel(
        body,
        out=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch=[
            plgpu.SMEM((per, block.rows, plan.width), q.dtype),
            plgpu.SMEM((per, block.rows, plan.value_width), q.dtype),
            plgpu.SMEM((per, block.rows, band.width), q.dtype),
            plgpu.Barrier(num_arrivals=3 + len(given.columns), num_barriers=per),
            *(plgpu.SMEM((per, block.rows), x.dtype) for x in given.columns.values()),
        ],
        grid={"head": plan.kv_heads, "tile": plan.keys // block.program, "batch": plan.batch},
        warpgroups=per,
        interpret=plan.interpret,
    )(
        q,
        k,
        v,
        sides.g,
        d.out,
        *operands_of(given, diagonals),
        jnp.stack([x for pair in ends.values() for x in pair], axis=2),
        *_tiles_of_queries(band, sides, d),
    )


def _own(refs: dict, tiles: dict, b: Any, h: Any, here: Any) -> list[tuple[Any, Any]]:
    """What brings a program's own vectors to shared memory: in registers they would spill."""
    return [(ref.at[b, here] if len(ref.shape) == 2 else ref.at[b, h, here], tiles[name]) for name, ref in refs.items()]


def _numbers(band: Band, sides: Sides, d: Sums) -> dict[str, jax.Array]:
    """What a tile of queries needs of each query, beside what masks and dropout say."""
    of_scores = {"c above": sides.above, "c below": sides.below} if band.scores else {}
    return of_scores | ({"dP above": d.above, "dP below": d.below} if band.values else {})


def _ends(band: Band, rows: Mapping, sides: Sides, d: Sums) -> dict[str, tuple[jax.Array, jax.Array]]:
    """c and dP for r ≤ −K and r ≥ K, and what stands there for lse and, without dropout, for delta, `[B, N, T]`."""
    ends = {}
    if band.scores:
        ends["c"] = sides.below, sides.above
        ends["lse"] = tuple(rows["lse"] - c * band.plan.scale for c in ends["c"])
    if band.values:
        ends["dP"] = d.below, d.above
        if band.plan.rate == 0:
            ends["delta"] = tuple(rows["delta"] - dp for dp in ends["dP"])
    return ends


def _tiles_of_queries(band: Band, sides: Sides, d: Sums) -> list[jax.Array]:
    return ([sides.f] if band.scores else []) + ([d.w] if band.values else [])


def _end_spec(count: int, length: int, at) -> plgpu.BlockSpec:
    """Tiles `[count, length]` of `[B, heads, count, length]`."""

    def where(*step):
        b, tile, head = at(*step)
        return b, head, 0, tile

    return plgpu.BlockSpec((None, None, count, length), where)
