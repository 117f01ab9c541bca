"""The kernels of `pallas_tpu`: one forward and two backward passes over square tiles of scores.

Forward and dq own a tile of queries and run over the tiles of keys; dkv owns a tile of keys and has its scores transposed, keys by queries.
Tiles that the mask's band hides are neither fetched nor computed, those wholly inside it are not masked. Gradients of tables are sums that
stay in on-chip memory while a program runs over the batch of one block of heads. Everything is added in the order of the grid: the same bits
in every run.

Source: Dao 2023 (arXiv:2307.08691).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import mosaic_tpu
from kernels.attention.fused import FLOOR, Given
from kernels.attention.pallas_tpu_curve import REGISTER
from kernels.attention.pallas_tpu_plan import LANES, Plan
from kernels.attention.pallas_tpu_products import product
from kernels.attention.pallas_tpu_tile import Tile


def forward(plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, given: Given) -> tuple[jax.Array, jax.Array]:
    """(out `[B, T, N, H]`, lse `[B, N, T]`) of q `[B, T, N, H]`, k, v `[B, S, K, H]`."""
    over = OfQueries(plan)

    def body(q_ref, k_ref, v_ref, said, out_ref, lse_ref, top, mass, total, added, down, work):
        first_query, first_key, step, is_visited = over.place()
        tile = Tile(plan, first_query, first_key, said._replace(rows=down), pl.program_id(0), work)

        @pl.when(step == 0)
        def begin():
            turn(said.rows, down)
            top[...] = jnp.full(top.shape, FLOOR, jnp.float32)
            mass[...] = jnp.zeros(mass.shape, jnp.float32)
            total[...] = jnp.zeros(total.shape, jnp.float32)

        def compute(masked, beyond):
            q, k, v = tile.with_ends(beyond, q_ref[...], k_ref[...], v_ref[...])
            before, highers, sums = top[...], [], []
            added[...] = jnp.zeros(added.shape, jnp.float32)
            for head in range(plan.per):
                s = tile.scores(head, tile.products(head, beyond, q, k), masked)
                own = before[:, head * plan.width : head * plan.width + 1]
                highers.append(jnp.maximum(own, jnp.max(s, axis=1, keepdims=True)))
                p = jnp.exp2(s - highers[-1])
                sums.append(jnp.sum(p, axis=1, keepdims=True))
                kept = tile.dropped(head, p)
                if "value" in said.bands:
                    work[...] = kept
                    tile.sum_band(head, beyond, "value", added)
                added[...] += product(kept.astype(v.dtype), plan.only(head, v))
            higher = plan.side_by_side(highers)
            shrink = jnp.exp2(before - higher)
            top[...] = higher
            mass[...] = mass[...] * shrink + plan.side_by_side(sums)
            total[...] = total[...] * shrink + added[...]

        tile.run(is_visited, compute)

        @pl.when(step == over.steps - 1)
        def end():
            weight = jnp.maximum(mass[...], 1e-30)  # of a row that saw nothing
            out_ref[...] = (total[...] / weight).astype(out_ref.dtype)
            lse = (top[...] + jnp.log2(weight)).T
            for head in range(plan.per):
                lse_ref[head : head + 1, :] = lse[head * plan.width : head * plan.width + 1]

    said = over.said(given)
    state = pltpu.VMEM((plan.block, plan.lanes), jnp.float32)
    out, lse = mosaic_tpu.kernel(
        body,
        name="attention_forward",
        grid=over.grid,
        sequential=1,
        inputs=[over.query_tile(), over.key_tile(), over.key_tile(), over.specs(said)],
        outputs=[over.query_tile(), over.row_spec(plan.per)],
        shapes=[
            jax.ShapeDtypeStruct((plan.batch, plan.queries, plan.blocks * plan.lanes), q.dtype),
            jax.ShapeDtypeStruct((plan.batch, plan.blocks, plan.per, plan.queries), jnp.float32),
        ],
        scratch=[state, state, state, state, over.down(said.rows), over.work(said)],
        interpret=plan.interpret,
    )(plan.packed(q), plan.packed(k), plan.packed(v), said)
    return plan.unpacked(out), plan.by_head(lse, 1)


def backward_queries(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array, given: Given
) -> tuple[jax.Array, dict, dict, dict, dict]:
    """The gradients of q, and, summed over the batch, of the lines, `[N, T + S − 1]`, the query and value tables, `[R, N, H]`, and the
    curves; and of the rows' reach, `[B, N, T]`. The rows hold lse and delta too.
    """
    over = OfQueries(plan)

    def body(
        q_ref, k_ref, v_ref, gradient_ref, said, dq_ref, d_lines, d_bands, d_curves, d_rows, total, reach, down, work
    ):
        first_query, first_key, step, is_visited = over.place()
        tile = Tile(plan, first_query, first_key, said._replace(rows=down), pl.program_id(0), work)

        @pl.when(step == 0)
        def begin():
            turn(said.rows, down)
            for sums in (total, *reach.values()):
                sums[...] = jnp.zeros(sums.shape, jnp.float32)

        @pl.when((step == 0) & (first_query == 0) & (pl.program_id(1) == 0))
        def begin_tables():
            for table in (*d_lines.values(), *d_bands.values(), *d_curves.values()):
                table[...] = jnp.zeros(table.shape, jnp.float32)

        def compute(masked, beyond):
            q, k, v = tile.with_ends(beyond, q_ref[...], k_ref[...], v_ref[...])
            of_out = gradient_ref[...]
            for head in range(plan.per):
                products = tile.products(head, beyond, q, k)
                of_p = tile.of_probabilities(head, beyond, of_out, v)
                p, ds = tile.gradients(head, products, of_p, masked)
                if "value" in d_bands:
                    work[...] = tile.dropped(head, p)
                    tile.add_to_band(head, beyond, "value", of_out, d_bands["value"])
                if "bias" in said.lines:
                    tile.add_to_line(d_lines["bias"], head, ds)
                if "curve" in said.curves:
                    distance, own = tile.on_line("distance", head), tile.of_queries("reach", head)
                    du = tile.curve(head).gradients(distance * own, ds, d_curves["curve"].at[head])
                    tile.add_to_line(d_lines["distance"], head, du * own)
                    of_reach = jnp.sum(du * distance, axis=1, keepdims=True)
                    reach["reach"][head] += jnp.broadcast_to(of_reach, reach["reach"].shape[1:])
                if "factor" in said.lines:
                    tile.add_to_line(d_lines["factor"], head, ds * products)
                    ds = ds * tile.on_line("factor", head)
                if "query" in d_bands:
                    work[...] = ds
                    tile.add_to_band(head, beyond, "query", q_ref[...], d_bands["query"])
                    tile.sum_band(head, beyond, "query", total)
                total[...] += product(ds.astype(k.dtype), plan.only(head, k))

        tile.run(is_visited, compute)

        @pl.when(step == over.steps - 1)
        def end():
            dq_ref[...] = (total[...] * plan.slope).astype(dq_ref.dtype)
            for name, sums in reach.items():
                for head in range(plan.per):
                    d_rows[name][head : head + 1, :] = sums[head].T[:1]

    said = over.said(given)
    with_gradient = {name: x for name, x in said.bands.items() if name != "key"}
    tile = over.query_tile()
    reaches = [name for name in said.rows if name == "reach"]
    state = pltpu.VMEM((plan.block, plan.lanes), jnp.float32)
    curve = {name: (plan.per, x.shape[1], *REGISTER) for name, x in said.curves.items()}
    dq, d_lines, d_bands, d_curves, d_rows = mosaic_tpu.kernel(
        body,
        name="attention_dq",
        grid=over.grid,
        sequential=3 if said.lines or with_gradient or curve else 1,
        inputs=[tile, over.key_tile(), over.key_tile(), tile, over.specs(said)],
        outputs=[
            tile,
            over.specs_of_tables(said.lines),
            over.specs_of_tables(with_gradient, own=True),
            {name: pl.BlockSpec((None, *shape), lambda c, *_: (c, 0, 0, 0, 0)) for name, shape in curve.items()},
            dict.fromkeys(reaches, over.row_spec(plan.per)),
        ],
        shapes=[
            jax.ShapeDtypeStruct((plan.batch, plan.queries, plan.blocks * plan.lanes), q.dtype),
            over.shapes_of_tables(said.lines, plan.blocks),
            over.shapes_of_tables(with_gradient, plan.blocks),
            {name: jax.ShapeDtypeStruct((plan.blocks, *shape), jnp.float32) for name, shape in curve.items()},
            dict.fromkeys(
                reaches, jax.ShapeDtypeStruct((plan.batch, plan.blocks, plan.per, plan.queries), jnp.float32)
            ),
        ],
        scratch=[
            state,
            dict.fromkeys(reaches, pltpu.VMEM((plan.per, plan.block, LANES), jnp.float32)),
            over.down(said.rows),
            over.work(said),
        ],
        interpret=plan.interpret,
    )(plan.packed(q), plan.packed(k), plan.packed(v), plan.packed(gradient), said)
    slopes = {"bias": 1.0, "distance": 1.0, "factor": plan.slope, "query": plan.slope, "value": 1.0}
    d_lines = {name: plan.by_head(x, 0)[..., 1:] * slopes[name] for name, x in d_lines.items()}
    d_bands = {name: x * slopes[name] for name, x in plan.of_bands(d_bands).items()}
    d_curves = {name: plan.by_head(jnp.sum(x, axis=(3, 4)), 0) for name, x in d_curves.items()}
    d_rows = {name: plan.by_head(x, 1) for name, x in d_rows.items()}
    return plan.unpacked(dq), d_lines, d_bands, d_curves, d_rows


def backward_keys(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array, given: Given
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """The gradients of k and v, of a bias of the columns, `[B, N, S]`, and of a key table, `[R, K, H]`, summed over the batch."""
    over = OfKeys(plan)

    def body(q_ref, k_ref, v_ref, gradient_ref, said, dk_ref, dv_ref, d_columns, d_bands, dk, dv, db, down, work):
        first_query, first_key, (group, step), is_visited = over.place()
        block = group * plan.kv_blocks + pl.program_id(0)
        tile = Tile(plan, first_query, first_key, said._replace(columns=down), block, work, transposed=True)

        @pl.when((group == 0) & (step == 0))
        def begin():
            dk[...] = jnp.zeros(dk.shape, jnp.float32)
            dv[...] = jnp.zeros(dv.shape, jnp.float32)

        @pl.when((group == 0) & (step == 0) & (first_key == 0) & (pl.program_id(1) == 0))
        def begin_tables():
            for table in d_bands.values():
                table[...] = jnp.zeros(table.shape, jnp.float32)

        @pl.when(step == 0)
        def begin_head():
            turn(said.columns, down)
            for sums in db.values():
                sums[...] = jnp.zeros(sums.shape, jnp.float32)

        def compute(masked, beyond):
            q, k, v = tile.with_ends(beyond, q_ref[...], k_ref[...], v_ref[...])
            of_out = gradient_ref[...]
            for head in range(plan.per):
                products = tile.products(head, beyond, q, k)
                of_p = tile.of_probabilities(head, beyond, of_out, v)
                p, ds = tile.gradients(head, products, of_p, masked)
                for sums in db.values():
                    sums[head] += jnp.broadcast_to(jnp.sum(ds, axis=1, keepdims=True), sums.shape[1:])
                if "factor" in said.lines:
                    ds = ds * tile.on_line("factor", head)
                if "key" in d_bands:
                    work[...] = ds
                    tile.add_to_band(head, beyond, "key", k_ref[...], d_bands["key"])
                    tile.sum_band(head, beyond, "key", dk)
                dv[...] += product(tile.dropped(head, p).astype(q.dtype), plan.only(head, of_out))
                dk[...] += product(ds.astype(q.dtype), plan.only(head, q))

        tile.run(is_visited, compute)

        @pl.when(step == over.steps - 1)
        def end_head():
            for name, sums in db.items():
                for head in range(plan.per):
                    d_columns[name][head : head + 1, :] = sums[head].T[:1]

        @pl.when((group == plan.group - 1) & (step == over.steps - 1))
        def end():
            dk_ref[...] = (dk[...] * plan.slope).astype(dk_ref.dtype)
            dv_ref[...] = dv[...].astype(dv_ref.dtype)

    said = over.said(given)
    biased = [name for name in said.columns if name == "bias"]
    with_gradient = {name: x for name, x in said.bands.items() if name == "key"}
    state = pltpu.VMEM((plan.block, plan.lanes), jnp.float32)
    sums = pltpu.VMEM((plan.per, plan.block, LANES), jnp.float32)
    of_keys = jax.ShapeDtypeStruct((plan.batch, plan.keys, plan.kv_blocks * plan.lanes), k.dtype)
    of_columns = jax.ShapeDtypeStruct((plan.batch, plan.blocks, plan.per, plan.keys), jnp.float32)
    tile = over.key_tile()
    dk, dv, d_columns, d_bands = mosaic_tpu.kernel(
        body,
        name="attention_dkv",
        grid=over.grid,
        sequential=4 if with_gradient else 2,
        inputs=[over.query_tile(), tile, tile, over.query_tile(), over.specs(said)],
        outputs=[
            tile,
            tile,
            dict.fromkeys(biased, over.column_spec(plan.per)),
            over.specs_of_tables(with_gradient, own=True),
        ],
        shapes=[
            of_keys,
            of_keys,
            dict.fromkeys(biased, of_columns),
            over.shapes_of_tables(with_gradient, plan.kv_blocks),
        ],
        scratch=[state, state, dict.fromkeys(biased, sums), over.down(said.columns), over.work(said)],
        interpret=plan.interpret,
    )(plan.packed(q), plan.packed(k), plan.packed(v), plan.packed(gradient), said)
    d_columns = {name: plan.by_head(x, 1) for name, x in d_columns.items()}
    d_bands = {name: x * plan.slope for name, x in plan.of_bands(d_bands).items()}
    return plan.unpacked(dk), plan.unpacked(dv), d_columns, d_bands


def turned(row: jax.Array) -> jax.Array:
    """`[1, length]` → `[length, 128]`, the row's values down every column."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def turn(refs: Mapping[str, Any], down: Mapping[str, Any]) -> None:
    """Fills `down` with the columns of the refs `[heads, block]`."""
    for name, ref in refs.items():
        for head in range(ref.shape[0]):
            down[name][head] = turned(ref[head : head + 1, :])


@dataclass(frozen=True)
class Passes:
    """What both kinds of pass share: the operands beside q, k and v, as arrays and as blocks."""

    plan: Plan

    def said(self, given: Given) -> Given:
        """As the kernels read it: vectors `[B, blocks or 1, heads of a block or 1, length]`, 32 bits wide, and tables by blocks of heads."""

        def vectors(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            return {
                name: self._signed(x)[:, None, None] if x.ndim == 2 else self.plan.by_group(self._signed(x), 1)
                for name, x in arrays.items()
            }

        curves = {name: self.plan.by_group(x, 0).reshape(-1, x.shape[1]) for name, x in given.curves.items()}
        lines, bands = self.plan.lines(given), self.plan.bands(given)
        return Given(vectors(given.rows), vectors(given.columns), lines, bands, curves)

    def _signed(self, x: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(x, jnp.int32) if x.dtype == jnp.uint32 else x

    def specs(self, said: Given) -> Given:
        rows = {name: self.row_spec(x.shape[2], shared=x.shape[1] == 1) for name, x in said.rows.items()}
        columns = {name: self.column_spec(x.shape[2], shared=x.shape[1] == 1) for name, x in said.columns.items()}
        lines, bands = self.specs_of_tables(said.lines), self.specs_of_tables(said.bands)
        return Given(rows, columns, lines, bands, dict.fromkeys(said.curves, pl.BlockSpec(memory_space=pltpu.SMEM)))

    def specs_of_tables(self, tables: dict, own: bool = False) -> dict:
        """Of tables `[blocks or 1, rows, columns]` those of a program's block of heads; a key table has blocks of key heads.

        own: of their gradients, which are of each block even where all heads share the table.
        """

        def spec(name: str, x: Any) -> pl.BlockSpec:
            def where(*place):
                c = self.at(*place)[1]
                of_keys = name == "key" and self.plan.group > 1
                block = lax.rem(c, self.plan.kv_blocks) if of_keys else c
                return block if own or x.shape[0] > 1 else 0, 0, 0

            return pl.BlockSpec((None, *x.shape[1:]), where)

        return {name: spec(name, x) for name, x in tables.items()}

    def shapes_of_tables(self, tables: dict, blocks: int) -> dict:
        """Of their gradients."""
        return {name: jax.ShapeDtypeStruct((blocks, *x.shape[1:]), jnp.float32) for name, x in tables.items()}

    def work(self, said: Given) -> Any:
        """Scratch of a tile's shape where there are bands, as small as it may be where there are none."""
        return pltpu.VMEM((self.plan.block,) * 2 if said.bands else (8, LANES), jnp.float32)

    def down(self, vectors: dict) -> dict:
        """Scratch for `turned` vectors."""
        block = (self.plan.block, LANES)
        return {name: pltpu.VMEM((x.shape[2], *block), x.dtype) for name, x in vectors.items()}

    def query_tile(self) -> pl.BlockSpec:
        def where(*place):
            b, c, i, _ = self.at(*place)
            return b, i, c

        return pl.BlockSpec((None, self.plan.block, self.plan.lanes), where)

    def key_tile(self) -> pl.BlockSpec:
        def where(*place):
            b, c, _, j = self.at(*place)
            return b, j, c if self.plan.group == 1 else lax.rem(c, self.plan.kv_blocks)

        return pl.BlockSpec((None, self.plan.block, self.plan.lanes), where)

    def row_spec(self, heads: int, shared: bool = False) -> pl.BlockSpec:
        return self._vector_spec(2, heads, shared)

    def column_spec(self, heads: int, shared: bool = False) -> pl.BlockSpec:
        return self._vector_spec(3, heads, shared)

    def _vector_spec(self, axis: int, heads: int, shared: bool) -> pl.BlockSpec:
        """Of `[B, blocks or 1, heads of a block, length]` the tile that `at(…)[axis]` says."""

        def where(*place):
            b, c, *_ = at = self.at(*place)
            return b, 0 if shared else c, 0, at[axis]

        return pl.BlockSpec((None, None, heads, self.plan.block), where)

    def at(self, *place: Any) -> tuple[Any, Any, Any, Any]:
        """(batch, block of query heads, tile of queries, tile of keys) at a grid index."""
        raise NotImplementedError


@dataclass(frozen=True)
class OfQueries(Passes):
    """Grid (block of heads, batch, tile of queries, step over the tiles of keys that they may see)."""

    @property
    def steps(self) -> int:
        plan = self.plan
        return max(plan.keys_of(first, plan.block, plan.block)[1] for first in range(0, plan.queries, plan.block))

    @property
    def grid(self) -> tuple[int, ...]:
        return self.plan.blocks, self.plan.batch, self.plan.queries // self.plan.block, self.steps

    def at(self, c, b, i, step):
        low, count = self.plan.keys_of(i * self.plan.block, self.plan.block, self.plan.block)
        return b, c, i, low + lax.min(step, count - 1)

    def place(self) -> tuple[Any, Any, Any, Any]:
        """(first query, first key, step, whether there is a tile at this step)."""
        block, step = self.plan.block, pl.program_id(3)
        first = pl.program_id(2) * block
        low, count = self.plan.keys_of(first, block, block)
        return first, (low + step) * block, step, step < count


@dataclass(frozen=True)
class OfKeys(Passes):
    """Grid (block of key heads, batch, tile of keys, place in the group, step over the tiles of queries that may see them)."""

    @property
    def steps(self) -> int:
        plan = self.plan
        return max(plan.queries_of(first, plan.block, plan.block)[1] for first in range(0, plan.keys, plan.block))

    @property
    def grid(self) -> tuple[int, ...]:
        plan = self.plan
        return plan.kv_blocks, plan.batch, plan.keys // plan.block, plan.group, self.steps

    def at(self, c, b, j, g, step):
        low, count = self.plan.queries_of(j * self.plan.block, self.plan.block, self.plan.block)
        return b, g * self.plan.kv_blocks + c, low + lax.min(step, count - 1), j

    def place(self) -> tuple[Any, Any, tuple[Any, Any], Any]:
        """(first query, first key, (place in the group, step), whether there is a tile at this step)."""
        block, step = self.plan.block, pl.program_id(4)
        first = pl.program_id(2) * block
        low, count = self.plan.queries_of(first, block, block)
        return (low + step) * block, first, (pl.program_id(3), step), step < count
