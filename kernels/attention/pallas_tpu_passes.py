"""The kernels of `pallas_tpu`: one forward and two backward passes over square tiles of scores.

Forward and dq own a tile of queries and run over the tiles of keys; dkv owns a tile of keys and has its scores transposed, keys by queries.
Tiles that the mask's band hides are neither fetched nor computed, those wholly inside it are not masked. Gradients of tables are sums that
stay in on-chip memory while a program runs over the batch of one block of heads. Everything is added in the order of the grid: the same bits
in every run.

Source: Dao 2023 (arXiv:2307.08691).
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import mosaic_tpu
from kernels.attention.curve import knots_met, knots_of
from kernels.attention.fused import FLOOR, Given
from kernels.attention.pallas_tpu_bands import Gradient
from kernels.attention.pallas_tpu_clipped import Cases, Wide
from kernels.attention.pallas_tpu_plan import LANES, Plan
from kernels.attention.pallas_tpu_products import product
from kernels.attention.pallas_tpu_tile import Tile, by_strips
from kernels.attention.separable import Sides, Sums

_REGISTER = (8, 128)


def forward(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, sides: Sides | None, given: Given
) -> tuple[Sums, jax.Array]:
    """(sums, lse `[B, N, T]`) of q `[B, T, N, H]`, k, v `[B, S, K, H]`."""
    over = OfQueries(plan)

    def body(
        q_ref, k_ref, v_ref, wide, said, out_ref, lse_ref, w_refs, p_refs, top, mass, total, added, w, p_far, down, work
    ):
        first_query, first_key, step, is_visited = over.place()
        tile = Tile(plan, first_query, first_key, said._replace(rows=down), pl.program_id(0), pl.program_id(1), work)

        @pl.when(step == 0)
        def begin():
            turn(said.rows, down)
            top[...] = jnp.full(top.shape, FLOOR, jnp.float32)
            clear(mass, total, w, p_far)

        def compute(masked, beyond, shift):
            q, k, v = tile.with_ends(beyond, q_ref[...], k_ref[...], v_ref[...])
            cases, shrinks = Cases(tile, shift), []
            clear(added)
            for head in range(plan.per):
                s = tile.scores(head, products_of(cases, beyond, head, q, k, wide), masked)
                higher = jnp.maximum(top[head], jnp.max(s, axis=1, keepdims=True))
                p = jnp.exp2(s - plan.across(higher))
                shrinks.append(jnp.exp2(top[head] - higher))
                mass[head] = mass[head] * shrinks[-1] + jnp.sum(p, axis=1, keepdims=True)
                top[head] = higher
                kept = tile.dropped(head, p)
                if "value" in said.bands:
                    work[...] = kept
                    tile.give(head, beyond, "value", total=added["out"])
                added["out"][...] += product(kept.astype(v.dtype), plan.only(head, v))
                if w:
                    for sums, column in zip(p_far, cases.add(head, kept, wide.g, added["w"]), strict=True):
                        sums[head] = sums[head] * shrinks[-1] + column
            shrink = plan.side_by_side(shrinks)
            total[...] = total[...] * shrink + added["out"][...]
            for sums, here in zip(w, added["w"], strict=True):
                sums[...] = sums[...] * shrink + here[...]

        tile.run(is_visited, compute)

        @pl.when(step == over.steps - 1)
        def end():
            weights = [jnp.maximum(mass[head], 1e-30) for head in range(plan.per)]  # of a row that saw nothing
            weight = plan.side_by_side(weights)
            out_ref[...] = (total[...] / weight).astype(out_ref.dtype)
            write(lse_ref, [top[head] + jnp.log2(own) for head, own in enumerate(weights)])
            for ref, sums in zip(w_refs, w, strict=True):
                ref[...] = (sums[...] / weight).astype(ref.dtype)
            for ref, sums in zip(p_refs, p_far, strict=True):
                write(ref, [sums[head] / own for head, own in enumerate(weights)])

    wide, given = over.wide(sides, None, given)
    said = over.said(given)
    tile = over.query_tile()
    parts = plan.clipped.parts if plan.clipped and plan.clipped.values else 0
    far = 2 if parts else 0
    out, lse, w, p_far = mosaic_tpu.kernel(
        body,
        name="attention_forward",
        grid=over.grid,
        sequential=1,
        inputs=[tile, over.key_tile(), over.key_tile(), over.specs_of_wide(wide), over.specs(said)],
        outputs=[tile, over.row_spec(plan.per), [tile] * parts, [over.row_spec(plan.per)] * far],
        shapes=[over.of_queries(q.dtype), over.of_rows, [over.of_queries(q.dtype)] * parts, [over.of_rows] * far],
        scratch=[
            over.numbers,
            over.numbers,
            over.state,
            {"out": over.state, "w": [over.state] * parts},
            [over.state] * parts,
            [over.numbers] * far,
            over.down(said.rows),
            over.work(said),
        ],
        interpret=plan.interpret,
    )(plan.packed(q), plan.packed(k), plan.packed(v), wide, said)
    above, below = (plan.by_head(x, 1) for x in p_far) if far else (None, None)
    return Sums(plan.unpacked(out), over.joined(w), above, below), plan.by_head(lse, 1)


def backward_queries(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, sides: Sides | None, d: Sums, given: Given
) -> tuple[jax.Array, Sides | None, Given]:
    """The gradients of q, of f, c⁺ and c⁻, and of `given`: summed over the batch those of the lines, `[N, T + S − 1]`, the query and value
    tables, `[R, N, H]`, and the curves; and of the rows' reach, `[B, N, T]`. The rows hold lse and delta too.
    """
    over = OfQueries(plan)

    def body(
        q_ref, k_ref, v_ref, d_ref, wide, said, dq_ref, df_refs, dc_refs, of_said, total, df, dc, reach, down, work
    ):
        first_query, first_key, step, is_visited = over.place()
        tile = Tile(plan, first_query, first_key, said._replace(rows=down), pl.program_id(0), pl.program_id(1), work)

        @pl.when(step == 0)
        def begin():
            turn(said.rows, down)
            clear(total, df, dc, reach)

        @pl.when((step == 0) & (first_query == 0) & (pl.program_id(1) == 0))
        def begin_tables():
            clear(of_said.lines, of_said.bands, of_said.curves)

        def compute(masked, beyond, shift):
            q, k, v = tile.with_ends(beyond, q_ref[...], k_ref[...], v_ref[...])
            of_out = d_ref[...]
            cases = Cases(tile, shift)
            for head in range(plan.per):
                products, of_p = both(cases, beyond, head, (q, k), (of_out, v), wide)
                p, ds = tile.gradients(head, products, of_p, masked)
                if "value" in said.bands:
                    work[...] = tile.dropped(head, p)
                    tile.give(head, beyond, "value", x=of_out, gradient=of_said.bands["value"])
                if "bias" in said.lines:
                    tile.add_to_line(of_said.lines["bias"], head, ds)
                if "curve" in said.curves:
                    distance, own = tile.on_line("distance", head), tile.of_queries("reach", head)
                    give = functools.partial(add_folded, of_said.curves["curve"], head)
                    du = by_strips(functools.partial(tile.curve(head).gradients, give=give), distance * own, ds)
                    tile.add_to_line(of_said.lines["distance"], head, du * own)
                    of_reach = jnp.sum(du * distance, axis=1, keepdims=True)
                    reach["reach"][head] += jnp.broadcast_to(of_reach, reach["reach"].shape[1:])
                if "factor" in said.lines:
                    tile.add_to_line(of_said.lines["factor"], head, ds * products)
                    ds = ds * tile.on_line("factor", head)
                if "query" in said.bands:
                    work[...] = ds
                    tile.give(head, beyond, "query", total=total, x=q_ref[...], gradient=of_said.bands["query"])
                if df:
                    for sums, column in zip(dc, cases.add(head, ds, wide.g, df), strict=True):
                        sums[head] += jnp.broadcast_to(column, sums.shape[1:])
                total[...] += product(ds.astype(k.dtype), plan.only(head, k))

        tile.run(is_visited, compute)

        @pl.when(step == over.steps - 1)
        def end():
            for ref, sums in zip((dq_ref, *df_refs), (total, *df), strict=True):
                ref[...] = (sums[...] * plan.slope).astype(ref.dtype)
            for ref, sums in zip(dc_refs, dc, strict=True):
                write(ref, sums[...] * plan.slope)
            for name, sums in reach.items():
                write(of_said.rows[name], sums[...])

    wide, given = over.wide(sides, d, given)
    said = over.said(given)
    with_gradient = {name: x for name, x in said.bands.items() if name != "key"}
    tile = over.query_tile()
    reaches = [name for name in said.rows if name == "reach"]
    curve = {name: (plan.per, x.shape[1], *_REGISTER) for name, x in given.curves.items()}
    parts, far = len(wide.f), 2 if wide.f else 0
    dq, df, dc, of_said = mosaic_tpu.kernel(
        body,
        name="attention_dq",
        grid=over.grid,
        sequential=3 if said.lines or with_gradient or curve else 1,
        inputs=[tile, over.key_tile(), over.key_tile(), tile, over.specs_of_wide(wide), over.specs(said)],
        outputs=[
            tile,
            [tile] * parts,
            [over.row_spec(plan.per)] * far,
            Given(
                rows=dict.fromkeys(reaches, over.row_spec(plan.per)),
                columns={},
                lines=over.specs_of_tables(said.lines),
                bands=over.specs_of_gradients(with_gradient),
                curves={n: pl.BlockSpec((None, *shape), lambda c, *_: (c, 0, 0, 0, 0)) for n, shape in curve.items()},
                dense={},
            ),
        ],
        shapes=[
            over.of_queries(q.dtype),
            [over.of_queries(q.dtype)] * parts,
            [over.of_rows] * far,
            Given(
                rows=dict.fromkeys(reaches, over.of_rows),
                columns={},
                lines={
                    n: jax.ShapeDtypeStruct((plan.blocks, *x.shape[1:]), jnp.float32) for n, x in said.lines.items()
                },
                bands=over.shapes_of_gradients(with_gradient, plan.blocks),
                curves={n: jax.ShapeDtypeStruct((plan.blocks, *shape), jnp.float32) for n, shape in curve.items()},
                dense={},
            ),
        ],
        scratch=[
            over.state,
            [over.state] * parts,
            [over.numbers] * far,
            dict.fromkeys(reaches, over.numbers),
            over.down(said.rows),
            over.work(said),
        ],
        interpret=plan.interpret,
    )(plan.packed(q), plan.packed(k), plan.packed(v), plan.packed(d.out), wide, said)
    above, below = (plan.by_head(x, 1) for x in dc) if far else (None, None)
    d_sides = None if sides is None else Sides(over.joined(df), above, below, None)
    slopes = {"bias": 1.0, "distance": 1.0, "factor": plan.slope, "query": plan.slope, "value": 1.0}
    of_given = Given(
        rows={name: plan.by_head(x, 1) for name, x in of_said.rows.items()},
        columns={},
        lines={name: plan.by_head(x, 0)[..., 1:] * slopes[name] for name, x in of_said.lines.items()},
        bands={name: x * slopes[name] for name, x in plan.of_bands(of_said.bands).items()},
        curves={name: plan.by_head(jnp.sum(x, axis=(3, 4)), 0) for name, x in of_said.curves.items()},
        dense={},
    )
    return plan.unpacked(dq), d_sides, of_given


def backward_keys(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, sides: Sides | None, d: Sums, given: Given
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """The gradients of k and v, of a bias of the columns, `[B, N, S]`, and of a key table, `[R, K, H]`, summed over the batch."""
    over = OfKeys(plan)

    def body(q_ref, k_ref, v_ref, gradient_ref, wide, said, dk_ref, dv_ref, d_columns, d_bands, dk, dv, db, down, work):
        first_query, first_key, (group, step), is_visited = over.place()
        block = group * plan.kv_blocks + pl.program_id(0)
        tile = Tile(
            plan, first_query, first_key, said._replace(columns=down), block, pl.program_id(1), work, transposed=True
        )

        @pl.when((group == 0) & (step == 0))
        def begin():
            clear(dk, dv)

        @pl.when((group == 0) & (step == 0) & (first_key == 0) & (pl.program_id(1) == 0))
        def begin_tables():
            clear(d_bands)

        @pl.when(step == 0)
        def begin_head():
            turn(said.columns, down)
            clear(db)

        def compute(masked, beyond, shift):
            q, k, v = tile.with_ends(beyond, q_ref[...], k_ref[...], v_ref[...])
            of_out = gradient_ref[...]
            for head in range(plan.per):
                products, of_p = both(Cases(tile, shift), beyond, head, (q, k), (of_out, v), wide)
                p, ds = tile.gradients(head, products, of_p, masked)
                for sums in db.values():
                    sums[head] += jnp.broadcast_to(jnp.sum(ds, axis=1, keepdims=True), sums.shape[1:])
                if "factor" in said.lines:
                    ds = ds * tile.on_line("factor", head)
                if "key" in d_bands:
                    work[...] = ds
                    tile.give(head, beyond, "key", total=dk, x=k_ref[...], gradient=d_bands["key"])
                dv[...] += product(tile.dropped(head, p).astype(q.dtype), plan.only(head, of_out))
                dk[...] += product(ds.astype(q.dtype), plan.only(head, q))

        tile.run(is_visited, compute)

        @pl.when(step == over.steps - 1)
        def end_head():
            for name, sums in db.items():
                write(d_columns[name], sums[...])

        @pl.when((group == plan.group - 1) & (step == over.steps - 1))
        def end():
            dk_ref[...] = (dk[...] * plan.slope).astype(dk_ref.dtype)
            dv_ref[...] = dv[...].astype(dv_ref.dtype)

    wide, given = over.wide(sides, d, given)
    said = over.said(given)
    biased = [name for name in said.columns if name == "bias"]
    with_gradient = {name: x for name, x in said.bands.items() if name == "key"}
    of_keys = jax.ShapeDtypeStruct((plan.batch, plan.keys, plan.kv_blocks * plan.lanes), k.dtype)
    of_columns = jax.ShapeDtypeStruct((plan.batch, plan.blocks, plan.per, plan.keys), jnp.float32)
    tile = over.key_tile()
    dk, dv, d_columns, d_bands = mosaic_tpu.kernel(
        body,
        name="attention_dkv",
        grid=over.grid,
        sequential=4 if with_gradient else 2,
        inputs=[over.query_tile(), tile, tile, over.query_tile(), over.specs_of_wide(wide), over.specs(said)],
        outputs=[
            tile,
            tile,
            dict.fromkeys(biased, over.column_spec(plan.per)),
            over.specs_of_gradients(with_gradient),
        ],
        shapes=[
            of_keys,
            of_keys,
            dict.fromkeys(biased, of_columns),
            over.shapes_of_gradients(with_gradient, plan.kv_blocks),
        ],
        scratch=[over.state, over.state, dict.fromkeys(biased, over.numbers), over.down(said.columns), over.work(said)],
        interpret=plan.interpret,
    )(plan.packed(q), plan.packed(k), plan.packed(v), plan.packed(d.out), wide, said)
    d_columns = {name: plan.by_head(x, 1) for name, x in d_columns.items()}
    d_bands = {name: x * plan.slope for name, x in plan.of_bands(d_bands).items()}
    return plan.unpacked(dk), plan.unpacked(dv), d_columns, d_bands


def products_of(cases: Cases, beyond: bool, head: int, q: jax.Array, k: jax.Array, wide: Wide) -> jax.Array:
    """What the scores of a tile are made of: of q and k `with_ends`, and of the tables."""
    products = cases.tile.products(head, beyond, q, k)
    return products + cases.met(head, wide.f, wide.g, "c") if wide.f else products


def both(
    cases: Cases,
    beyond: bool,
    head: int,
    of_scores: tuple[jax.Array, ...],
    of_values: tuple[jax.Array, ...],
    wide: Wide,
) -> tuple[jax.Array, jax.Array]:
    """`products_of` (q, k), and dP: of (dO, v) `with_ends`, and of the tables."""
    products = products_of(cases, beyond, head, *of_scores, wide)
    of_p = cases.tile.of_probabilities(head, beyond, *of_values)
    if wide.dw:
        of_p = of_p + cases.met(head, wide.dw, wide.g, "dP")
    return products, of_p


def clear(*refs: Any) -> None:
    for ref in jax.tree.leaves(refs):
        ref[...] = jnp.zeros(ref.shape, jnp.float32)


def add_folded(sums: Any, head: int, place: Any, x: jax.Array) -> None:
    """Adds to the register of a head and place what adds up to the entries of x."""
    rows, lanes = _REGISTER
    x = jnp.sum(x.reshape(-1, rows, x.shape[1]), axis=0)
    sums[head, place] += sum(x[:, n : n + lanes] for n in range(0, x.shape[1], lanes))


def write(ref: Any, numbers: jax.Array | list[jax.Array]) -> None:
    """A number of each row and head, `[block, 128]` with it in all lanes, into the ref `[heads, block]`."""
    for head in range(ref.shape[0]):
        ref[head : head + 1, :] = numbers[head].T[:1]


def turned(row: jax.Array) -> jax.Array:
    """`[1, length]` → `[length, 128]`, the row's values down every column."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def turn(refs: Mapping[str, Any], down: Mapping[str, Any]) -> None:
    """Fills `down` with the columns of the refs `[heads, block]`."""
    for name, ref in refs.items():
        for head in range(ref.shape[0]):
            down[name][head] = turned(ref[head : head + 1, :])


@dataclass(frozen=True)
class Passes(abc.ABC):
    """What both kinds of pass share: the operands beside q, k and v, as arrays and as blocks."""

    plan: Plan

    def said(self, given: Given) -> Given:
        """As the kernels read it: vectors `[B, blocks or 1, heads of a block or 1, length]`, 32 bits wide, tables by blocks of heads, and
        beside a curve the knots that each tile has "met", in one line of numbers.
        """

        def vectors(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
            return {
                name: self._signed(x)[:, None, None] if x.ndim == 2 else self.plan.by_group(self._signed(x), 1)
                for name, x in arrays.items()
            }

        curves = {name: self.plan.by_group(x, 0).reshape(-1, x.shape[1]) for name, x in given.curves.items()}
        if curves:
            tile, lengths = (self.plan.block,) * 2, (self.plan.queries, self.plan.keys)
            knots, distance = knots_of(given.curves["curve"]), given.lines["distance"][0]
            curves["met"] = knots_met(knots, distance, given.rows["reach"], tile, lengths).reshape(-1)
        lines, bands = self.plan.lines(given), self.plan.bands(given)
        return Given(vectors(given.rows), vectors(given.columns), lines, bands, curves, {})

    def wide(self, sides: Sides | None, d: Sums | None, given: Given) -> tuple[Wide, Given]:
        """Of tables as products what is wide, and what is a number for each query with the rest of `given`."""
        if sides is None:
            return Wide([], [], []), given

        def packed(x: jax.Array | None) -> list[jax.Array]:
            return [] if x is None else [self.plan.packed(part) for part in self.plan.parts(x)]

        rows: dict[str, jax.Array] = {}
        if sides.f is not None:
            rows |= {"c above": sides.above, "c below": sides.below}
        if d is not None and d.w is not None:
            rows |= {"dP above": d.above, "dP below": d.below}
        g = [jnp.tile(part, (1, self.plan.per)) for part in self.plan.parts(sides.g)]
        return Wide(packed(sides.f), packed(d and d.w), g), given.with_rows(**rows)

    def specs_of_wide(self, wide: Wide) -> Wide:
        tile = self.query_tile()
        g = pl.BlockSpec((self.plan.block, self.plan.lanes), lambda *place: (self.at(*place)[3], 0))
        return Wide([tile] * len(wide.f), [tile] * len(wide.dw), [g] * len(wide.g))

    def joined(self, parts: list[jax.Array]) -> jax.Array | None:
        """The inverse of `Plan.parts` for what was packed; None where there is none."""
        return jnp.concatenate([self.plan.unpacked(x) for x in parts], axis=-1) if parts else None

    def of_queries(self, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.plan.batch, self.plan.queries, self.plan.blocks * self.plan.lanes), dtype)

    @property
    def of_rows(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.plan.batch, self.plan.blocks, self.plan.per, self.plan.queries), jnp.float32)

    @property
    def state(self) -> Any:
        """Scratch for sums of a tile's rows, the heads side by side."""
        return pltpu.VMEM((self.plan.block, self.plan.lanes), jnp.float32)

    @property
    def numbers(self) -> Any:
        """Scratch for a number of each row and head, in all lanes."""
        return pltpu.VMEM((self.plan.per, self.plan.block, LANES), jnp.float32)

    def _signed(self, x: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(x, jnp.int32) if x.dtype == jnp.uint32 else x

    def specs(self, said: Given) -> Given:
        rows = {name: self.row_spec(x.shape[2], shared=x.shape[1] == 1) for name, x in said.rows.items()}
        columns = {name: self.column_spec(x.shape[2], shared=x.shape[1] == 1) for name, x in said.columns.items()}
        lines, bands = self.specs_of_tables(said.lines), self.specs_of_tables(said.bands)
        return Given(rows, columns, lines, bands, dict.fromkeys(said.curves, pl.BlockSpec(memory_space=pltpu.SMEM)), {})

    def specs_of_tables(self, tables: dict) -> dict:
        """Of tables `[blocks or 1, rows, columns]` those of a program's block of heads; a key table has blocks of key heads."""
        return {name: self._of_block(name, x.shape[1:], x.shape[0] == 1) for name, x in tables.items()}

    def specs_of_gradients(self, bands: dict) -> dict:
        """Of the gradients of bands, which are of each block even where all heads share the table."""
        return {
            name: Gradient(self._of_block(name, x.shape[:0:-1]), self._of_block(name, (8, x.shape[2])))
            for name, x in bands.items()
        }

    def shapes_of_gradients(self, bands: dict, blocks: int) -> dict:
        def one(x: jax.Array) -> Gradient:
            shapes = (blocks, *x.shape[:0:-1]), (blocks, 8, x.shape[2])
            return Gradient(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))

        return {name: one(x) for name, x in bands.items()}

    def _of_block(self, name: str, shape: tuple[int, ...], shared: bool = False) -> pl.BlockSpec:
        def where(*place):
            c = self.at(*place)[1]
            block = lax.rem(c, self.plan.kv_blocks) if name == "key" and self.plan.group > 1 else c
            return 0 if shared else block, 0, 0

        return pl.BlockSpec((None, *shape), where)

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

    @abc.abstractmethod
    def at(self, *place: Any) -> tuple[Any, Any, Any, Any]:
        """(batch, block of query heads, tile of queries, tile of keys) at a grid index."""


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
