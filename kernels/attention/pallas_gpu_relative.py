"""The kernels of `pallas_gpu` for clipped relative tables, as products of two sides (`separable` has the equations). Only tiles that touch the band
|r| < K pay for another product, a constant number for each row of tiles; the others a number for each query.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention import mosaic
from kernels.attention.fused import FLOOR, Given
from kernels.attention.pallas_gpu_passes import (
    Blocks,
    Diagonals,
    Loaded,
    Plan,
    Tile,
    dropped,
    fetch,
    operands_of,
    over_tiles,
    probabilities,
    score_gradients,
    scores,
    split_operands,
    tile_spec,
    vector_specs,
    vectors,
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
        return Blocks(64, 64)

    @property
    def backward(self) -> Blocks:
        return Blocks(64, 64, 1 if max(self.plan.width, self.width) > 64 else 2)

    def near(self, tile: Tile) -> jax.Array:
        """Whether some |r| < K."""
        least, most = self._reach(tile)
        return (most > -self.limit) & (least < self.limit)

    def ahead(self, tile: Tile) -> jax.Array:
        """Of a tile that is not near: whether r ≥ K."""
        return self._reach(tile)[0] > 0

    def _reach(self, tile: Tile) -> tuple[Any, Any]:
        queries, keys = tile.shape[::-1] if tile.transposed else tile.shape
        first = tile.first_key - tile.first_query - self.plan.offset
        return first - queries + 1, first + keys - 1

    def relative(self, tile: Tile, products, above: jax.Array, below: jax.Array) -> jax.Array:
        """ρ of a tile: `products()` are those of f and g, called within the band alone."""

        def inside():
            r = tile.key_index() - tile.query_index() - self.plan.offset
            rho = jnp.where(r >= self.limit, tile.of_queries(above), products())
            return jnp.where(r <= -self.limit, tile.of_queries(below), rho)

        def outside():
            ahead = self.ahead(tile).astype(jnp.float32)
            return tile.of_queries(above * ahead + below * (1 - ahead))

        return lax.cond(self.near(tile), inside, outside)

    def sums(self, tile: Tile, x: jax.Array, g: Any, before: tuple, dtype: Any) -> tuple:
        """(Σ_{|r|<K} x g, Σ_{r≥K} x, Σ_{r≤−K} x) of each query, added to those `before`."""
        total, above, below = before

        def inside():
            r = tile.key_index() - tile.query_index() - self.plan.offset
            nothing = mosaic.zeros(tile.shape)
            far_above = jnp.where(r >= self.limit, x, nothing)
            far_below = jnp.where(r <= -self.limit, x, nothing)
            near = (x - far_above - far_below).astype(dtype)
            return (
                mosaic.add_product(total, near, g, interpret=self.plan.interpret),
                above + jnp.sum(far_above, axis=1),
                below + jnp.sum(far_below, axis=1),
            )

        def outside():
            mass, ahead = jnp.sum(x, axis=1), self.ahead(tile).astype(jnp.float32)
            return total, above + mass * ahead, below + mass * (1 - ahead)

        return lax.cond(self.near(tile), inside, outside)


def forward(band: Band, q, k, v, sides: Sides, given: Given) -> tuple[Sums, jax.Array]:
    """The sums, and lse `[B, N, T]`."""
    plan, block = band.plan, band.forward
    rows = given.rows | ({"c above": sides.above, "c below": sides.below} if band.scores else {})
    extended = given._replace(rows=rows)
    diagonals = Diagonals(plan, block.program, block.columns)

    def body(q_ref, k_ref, v_ref, g_ref, *refs):
        row_refs, column_refs, _, refs = split_operands(extended, refs)
        f_ref, refs = (refs[0], refs[1:]) if band.scores else (None, refs)
        out_ref, lse_ref, *refs = refs
        w_refs, refs = (refs[:3], refs[3:]) if band.values else ((), refs)
        q_tile, f_tile, vector_tile, barriers = refs
        b, h, program = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("tile")
        warpgroup = lax.axis_index("warpgroup")
        first_query = program * block.program + warpgroup * block.rows
        low, tiles = plan.keys_of(program * block.program, block.program, block.columns)
        kv_head = h // plan.group

        def compute(run):
            here = pl.ds(first_query, block.rows)
            fetched = [(q_ref.at[b, here, h], q_tile.at[warpgroup])]
            if band.scores:
                fetched.append((f_ref.at[b, here, h], f_tile.at[warpgroup]))
            fetch(fetched, barriers.at[warpgroup])
            empty = mosaic.zeros((block.rows,), mosaic.ROWS)
            carry = (
                mosaic.zeros((block.rows, plan.value_width)),
                mosaic.zeros((block.rows,), mosaic.ROWS, FLOOR),
                empty,
                (mosaic.zeros((block.rows, band.width)), empty, empty) if band.values else (),
                vectors(row_refs, b, h, here, mosaic.ROWS),
            )
            total, top, mass, sums, _ = run(carry)
            mass = lax.max(mass, mosaic.zeros((block.rows,), mosaic.ROWS, 1e-30))
            q_tile.at[warpgroup][...] = (total / mosaic.spread(mass, total.shape, 0)).astype(q.dtype)
            vector_tile.at[0, warpgroup][...] = top + jnp.log2(mass)
            if band.values:
                f_tile.at[warpgroup][...] = (sums[0] / mosaic.spread(mass, sums[0].shape, 0)).astype(q.dtype)
                vector_tile.at[1, warpgroup][...] = sums[1] / mass
                vector_tile.at[2, warpgroup][...] = sums[2] / mass
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile.at[warpgroup], out_ref.at[b, here, h])
            plgpu.copy_smem_to_gmem(vector_tile.at[0, warpgroup], lse_ref.at[b, h, here])
            if band.values:
                plgpu.copy_smem_to_gmem(f_tile.at[warpgroup], w_refs[0].at[b, here, h])
                plgpu.copy_smem_to_gmem(vector_tile.at[1, warpgroup], w_refs[1].at[b, h, here])
                plgpu.copy_smem_to_gmem(vector_tile.at[2, warpgroup], w_refs[2].at[b, h, here])
            plgpu.wait_smem_to_gmem(0)

        def step(indices, k_tile, v_tile, g_tile, column_tiles, carry):
            total, top, mass, sums, row_vectors = carry
            tile = Tile((block.rows, block.columns), first_query, (low + indices[0]) * block.columns)
            s = mosaic.product(q_tile.at[warpgroup], k_tile, tile.shape)
            if band.scores:
                products = functools.partial(mosaic.product, f_tile.at[warpgroup], g_tile, tile.shape)
                s = s + band.relative(tile, products, row_vectors["c above"], row_vectors["c below"])
            s, factor = scores(plan, tile, s, row_vectors, Loaded(column_tiles, mosaic.COLUMNS), None)
            higher = lax.max(top, jnp.max(s, axis=1) * factor)
            p = jnp.exp2(s * factor - tile.of_queries(higher))
            shrink = jnp.exp2(top - higher)
            mass = mass * shrink + jnp.sum(p, axis=1)
            total = total * mosaic.spread(shrink, total.shape, 0)
            p = dropped(plan, tile, p, row_vectors)
            total = mosaic.add_product(total, p.astype(q.dtype), v_tile, interpret=plan.interpret)
            if band.values:
                w, above, below = sums
                before = (w * mosaic.spread(shrink, w.shape, 0), above * shrink, below * shrink)
                sums = band.sums(tile, p, g_tile, before, q.dtype)
            return total, higher, mass, sums, row_vectors

        def at(t):
            return b, low + t, kv_head

        over_tiles(
            step,
            compute,
            (tiles,),
            [
                (k_ref, tile_spec(block.columns, plan.width, at)),
                (v_ref, tile_spec(block.columns, plan.value_width, at)),
                (g_ref, _shared_spec(block.columns, band.width, lambda t: low + t)),
                vector_specs(column_refs, block.columns, lambda t: (b, low + t, h)),
            ],
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
            plgpu.Barrier(num_arrivals=1 + band.scores, num_barriers=per),
        ],
        grid={"head": plan.heads, "tile": plan.queries // block.program, "batch": plan.batch},
        warpgroups=per,
        interpret=plan.interpret,
    )(q, k, v, sides.g, *operands_of(extended, diagonals), *([sides.f] if band.scores else []))
    return Sums(out, *(rest or (None, None, None))), lse


def backward_queries(band: Band, q, k, v, sides: Sides, d: Sums, given: Given) -> tuple[jax.Array, Sides]:
    """The gradients of q, and of f, c⁺ and c⁻; `given` holds the rows lse and delta."""
    plan, block = band.plan, band.backward
    extended = given._replace(rows=given.rows | _numbers(band, sides, d))
    diagonals = Diagonals(plan, block.program, block.columns)

    def body(q_ref, k_ref, v_ref, g_ref, d_ref, *refs):
        row_refs, column_refs, _, refs = split_operands(extended, refs)
        f_ref, refs = (refs[0], refs[1:]) if band.scores else (None, refs)
        dw_ref, refs = (refs[0], refs[1:]) if band.values else (None, refs)
        dq_ref, *refs = refs
        df_refs, refs = (refs[:3], refs[3:]) if band.scores else ((), refs)
        q_tile, f_tile, d_tile, dw_tile, vector_tile, barriers = refs
        b, h, program = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("tile")
        warpgroup = lax.axis_index("warpgroup")
        first_query = program * block.program + warpgroup * block.rows
        low, tiles = plan.keys_of(program * block.program, block.program, block.columns)
        kv_head = h // plan.group

        def compute(run):
            here = pl.ds(first_query, block.rows)
            fetched = [(q_ref.at[b, here, h], q_tile.at[warpgroup]), (d_ref.at[b, here, h], d_tile.at[warpgroup])]
            if band.scores:
                fetched.append((f_ref.at[b, here, h], f_tile.at[warpgroup]))
            if band.values:
                fetched.append((dw_ref.at[b, here, h], dw_tile.at[warpgroup]))
            fetch(fetched, barriers.at[warpgroup])
            empty = mosaic.zeros((block.rows,), mosaic.ROWS)
            carry = (
                mosaic.zeros((block.rows, plan.width)),
                (mosaic.zeros((block.rows, band.width)), empty, empty) if band.scores else (),
                vectors(row_refs, b, h, here, mosaic.ROWS),
            )
            total, sums, _ = run(carry)
            q_tile.at[warpgroup][...] = (total * plan.slope).astype(q.dtype)
            if band.scores:
                f_tile.at[warpgroup][...] = (sums[0] * plan.slope).astype(q.dtype)
                vector_tile.at[0, warpgroup][...] = sums[1] * plan.slope
                vector_tile.at[1, warpgroup][...] = sums[2] * plan.slope
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile.at[warpgroup], dq_ref.at[b, here, h])
            if band.scores:
                plgpu.copy_smem_to_gmem(f_tile.at[warpgroup], df_refs[0].at[b, here, h])
                plgpu.copy_smem_to_gmem(vector_tile.at[0, warpgroup], df_refs[1].at[b, h, here])
                plgpu.copy_smem_to_gmem(vector_tile.at[1, warpgroup], df_refs[2].at[b, h, here])
            plgpu.wait_smem_to_gmem(0)

        def step(indices, k_tile, v_tile, g_tile, column_tiles, carry):
            total, sums, row_vectors = carry
            tile = Tile((block.rows, block.columns), first_query, (low + indices[0]) * block.columns)
            s = mosaic.product(q_tile.at[warpgroup], k_tile, tile.shape)
            if band.scores:
                products = functools.partial(mosaic.product, f_tile.at[warpgroup], g_tile, tile.shape)
                s = s + band.relative(tile, products, row_vectors["c above"], row_vectors["c below"])
            p = probabilities(plan, tile, s, row_vectors, Loaded(column_tiles, mosaic.COLUMNS), None)
            dp = mosaic.product(d_tile.at[warpgroup], v_tile, tile.shape)
            if band.values:
                products = functools.partial(mosaic.product, dw_tile.at[warpgroup], g_tile, tile.shape)
                dp = dp + band.relative(tile, products, row_vectors["dP above"], row_vectors["dP below"])
            ds = score_gradients(plan, tile, p, dp, row_vectors)
            total = mosaic.add_product(total, ds.astype(q.dtype), k_tile, interpret=plan.interpret)
            if band.scores:
                sums = band.sums(tile, ds, g_tile, sums, q.dtype)
            return total, sums, row_vectors

        def at(t):
            return b, low + t, kv_head

        over_tiles(
            step,
            compute,
            (tiles,),
            [
                (k_ref, tile_spec(block.columns, plan.width, at)),
                (v_ref, tile_spec(block.columns, plan.value_width, at)),
                (g_ref, _shared_spec(block.columns, band.width, lambda t: low + t)),
                vector_specs(column_refs, block.columns, lambda t: (b, low + t, h)),
            ],
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
            plgpu.SMEM((2, per, block.rows), jnp.float32),
            plgpu.Barrier(num_arrivals=2 + band.scores + band.values, num_barriers=per),
        ],
        grid={"head": plan.heads, "tile": plan.queries // block.program, "batch": plan.batch},
        warpgroups=per,
        interpret=plan.interpret,
    )(q, k, v, sides.g, d.out, *operands_of(extended, diagonals), *_tiles_of_queries(band, sides, d))
    return dq, Sides(*(rest or (None, None, None)), None)


def backward_keys(band: Band, q, k, v, sides: Sides, d: Sums, given: Given) -> tuple[jax.Array, jax.Array]:
    """The gradients of k and v, each summed over the query heads that read it."""
    plan, block = band.plan, band.backward
    extended = given._replace(rows=given.rows | _numbers(band, sides, d))
    diagonals = Diagonals(plan, block.program, block.columns, transposed=True)

    def body(q_ref, k_ref, v_ref, g_ref, d_ref, *refs):
        row_refs, column_refs, _, refs = split_operands(extended, refs)
        f_refs, refs = (refs[:1], refs[1:]) if band.scores else ((), refs)
        dw_refs, refs = (refs[:1], refs[1:]) if band.values else ((), refs)
        dk_ref, dv_ref, k_tile, v_tile, g_tile, barriers = refs
        b, kv_head, program = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("tile")
        warpgroup = lax.axis_index("warpgroup")
        first_key = program * block.program + warpgroup * block.rows
        low, tiles = plan.queries_of(program * block.program, block.program, block.columns)

        def compute(run):
            here = pl.ds(first_key, block.rows)
            fetched = [
                (k_ref.at[b, here, kv_head], k_tile.at[warpgroup]),
                (v_ref.at[b, here, kv_head], v_tile.at[warpgroup]),
                (g_ref.at[here], g_tile.at[warpgroup]),
            ]
            fetch(fetched, barriers.at[warpgroup])
            carry = (
                mosaic.zeros((block.rows, plan.width)),
                mosaic.zeros((block.rows, plan.value_width)),
                vectors(column_refs, b, kv_head, here, mosaic.ROWS),
            )
            dk, dv, _ = run(carry)
            k_tile.at[warpgroup][...] = (dk * plan.slope).astype(k.dtype)
            v_tile.at[warpgroup][...] = dv.astype(v.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_tile.at[warpgroup], dk_ref.at[b, here, kv_head])
            plgpu.copy_smem_to_gmem(v_tile.at[warpgroup], dv_ref.at[b, here, kv_head])
            plgpu.wait_smem_to_gmem(0)

        def step(indices, q_tile, d_tile, f_tiles, dw_tiles, row_tiles, carry):
            dk, dv, column_vectors = carry
            first_query = (low + indices[1]) * block.columns
            tile = Tile((block.rows, block.columns), first_query, first_key, transposed=True)
            row_vectors = Loaded(row_tiles, mosaic.COLUMNS)
            s = mosaic.product(k_tile.at[warpgroup], q_tile, tile.shape)
            if band.scores:
                products = functools.partial(mosaic.product, g_tile.at[warpgroup], f_tiles[0], tile.shape)
                s = s + band.relative(tile, products, row_vectors["c above"], row_vectors["c below"])
            p = probabilities(plan, tile, s, row_vectors, column_vectors, None)
            kept = dropped(plan, tile, p, row_vectors).astype(q.dtype)
            dv = mosaic.add_product(dv, kept, d_tile, interpret=plan.interpret)
            dp = mosaic.product(v_tile.at[warpgroup], d_tile, tile.shape)
            if band.values:
                products = functools.partial(mosaic.product, g_tile.at[warpgroup], dw_tiles[0], tile.shape)
                dp = dp + band.relative(tile, products, row_vectors["dP above"], row_vectors["dP below"])
            ds = score_gradients(plan, tile, p, dp, row_vectors)
            dk = mosaic.add_product(dk, ds.astype(q.dtype), q_tile, interpret=plan.interpret)
            return dk, dv, column_vectors

        def at(g, t):
            return b, low + t, kv_head * plan.group + g

        over_tiles(
            step,
            compute,
            (plan.group, tiles),
            [
                (q_ref, tile_spec(block.columns, plan.width, at)),
                (d_ref, tile_spec(block.columns, plan.value_width, at)),
                [(ref, tile_spec(block.columns, band.width, at)) for ref in f_refs],
                [(ref, tile_spec(block.columns, band.width, at)) for ref in dw_refs],
                vector_specs(row_refs, block.columns, at),
            ],
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
            plgpu.Barrier(num_arrivals=3, num_barriers=per),
        ],
        grid={"head": plan.kv_heads, "tile": plan.keys // block.program, "batch": plan.batch},
        warpgroups=per,
        interpret=plan.interpret,
    )(q, k, v, sides.g, d.out, *operands_of(extended, diagonals), *_tiles_of_queries(band, sides, d))


def _numbers(band: Band, sides: Sides, d: Sums) -> dict[str, jax.Array]:
    """What a tile of queries needs of each query, beside what masks and dropout say."""
    of_scores = {"c above": sides.above, "c below": sides.below} if band.scores else {}
    return of_scores | ({"dP above": d.above, "dP below": d.below} if band.values else {})


def _tiles_of_queries(band: Band, sides: Sides, d: Sums) -> list[jax.Array]:
    return ([sides.f] if band.scores else []) + ([d.w] if band.values else [])


def _shared_spec(length: int, width: int, at) -> plgpu.BlockSpec:
    """Tiles `[length, width]` of `[S, width]`; at(step) = tile."""
    return plgpu.BlockSpec((length, width), lambda *step: (at(*step), 0))
