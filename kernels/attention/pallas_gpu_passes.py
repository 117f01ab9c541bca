"""The kernels of `pallas_gpu`: one forward and two backward passes over tiles, each a program that others need not wait for.

A program owns a tile of queries (forward, dq) or of keys (dkv) and runs over the tiles of the other side, which one warpgroup
loads while the others compute. In dkv the tile is transposed, keys by queries, so that both of its products have the accumulators' side first.

Nothing is shared between programs: no atomics, the same bits in every run.

Source: Dao 2023 (arXiv:2307.08691), Shah et al. 2024 (arXiv:2407.08608).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention import mosaic, mosaic_diagonals, mosaic_sums
from kernels.attention.fused import FLOOR, HIDDEN, Given
from kernels.attention.pallas_gpu_bands import add_rows, band_specs, own_space, products, spaces
from kernels.attention.pallas_gpu_operands import operands_of, split_operands, within_reach
from kernels.attention.pallas_gpu_pipeline import (
    fetch,
    key_tiles,
    matrix_specs,
    over_tiles,
    own_rows,
    tile_spec,
    vector_specs,
    vectors,
    window_specs,
)
from kernels.attention.pallas_gpu_plan import Diagonals, Plan
from kernels.attention.pallas_gpu_tile import (
    Bands,
    Biases,
    Loaded,
    Tile,
    curve_in,
    dropped,
    on_diagonals,
    probabilities,
    score_gradients,
    scores,
    visible,
)


def forward(plan: Plan, q, k, v, given: Given) -> tuple[jax.Array, jax.Array]:
    """(out `[B, T, N, Hv]`, lse `[B, N, T]`) of q `[B, T, N, H]`, k, v `[B, S, K, ·]`."""
    block = plan.forward
    diagonals = Diagonals(plan, block.program, block.columns)

    def body(q_ref, k_ref, v_ref, *refs):
        (row_refs, column_refs, tables, bands, matrices, curves, reach), refs = split_operands(given, refs)
        out_ref, lse_ref, q_tile, out_tile, lse_tile, barriers, *space_ref = refs
        b, h, program = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("tile")
        warpgroup = lax.axis_index("warpgroup")
        first_query = program * block.program + warpgroup * block.rows
        seen = plan.keys_of(program * block.program, block.program, block.columns)
        low, tiles = within_reach(reach, b, program, *seen)

        def compute(run):
            here = pl.ds(first_query, block.rows)
            fetch([(q_ref.at[b, here, h], q_tile.at[warpgroup])], barriers.at[warpgroup])
            carry = (
                mosaic.zeros((block.rows, plan.value_width)),
                mosaic.zeros((block.rows,), mosaic.ROWS, FLOOR),
                mosaic.zeros((block.rows,), mosaic.ROWS),
                vectors(row_refs, b, h, here, mosaic.ROWS),
            )
            total, top, mass, _ = run(carry)
            mass = lax.max(mass, mosaic.zeros((block.rows,), mosaic.ROWS, 1e-30))  # a row that saw nothing
            out_tile.at[warpgroup][...] = (total * mosaic.spread(plan.growth / mass, total.shape, 0)).astype(q.dtype)
            lse_tile.at[warpgroup][...] = top + jnp.log2(mass)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_tile.at[warpgroup], out_ref.at[b, here, h])
            plgpu.copy_smem_to_gmem(lse_tile.at[warpgroup], lse_ref.at[b, h, here])
            plgpu.wait_smem_to_gmem(0)

        def step(indices, k_tile, v_tile, column_tiles, windows, met_windows, dense, carry):
            total, top, mass, row_vectors = carry
            number = low + indices[0]
            tile = Tile((block.rows, block.columns), first_query, number * block.columns)
            met = diagonals.parts(met_windows, warpgroup), q_tile.at[warpgroup], k_tile
            s = products(plan, tile, Bands(*met, own_space(space_ref, warpgroup)))
            column_vectors = Loaded(column_tiles, mosaic.COLUMNS)
            biases = Biases(
                diagonals.parts(windows, warpgroup), own_rows(dense, warpgroup), curve_in(curves, tile, b, h)
            )
            s, factor = scores(plan, tile, s, row_vectors, column_vectors, biases)
            s = visible(plan, tile, s, HIDDEN / factor, row_vectors, column_vectors)
            higher = lax.max(top, jnp.max(s, axis=1) * factor)
            p = jnp.exp2(s * factor - tile.of_queries(higher))
            shrink = jnp.exp2(top - higher)
            mass = mass * shrink + jnp.sum(p, axis=1)
            total = total * mosaic.spread(shrink, total.shape, 0)
            p = dropped(plan, tile, p, row_vectors).astype(q.dtype)
            total = mosaic.add_product(total, p, v_tile, interpret=plan.interpret)
            return total, higher, mass, row_vectors

        over_tiles(
            step,
            compute,
            (tiles,),
            [
                *key_tiles(plan, block.columns, k_ref, v_ref, column_refs, h, lambda t: (b, low + t)),
                window_specs(tables, diagonals, lambda t: (h, diagonals.of(program, low + t))),
                band_specs(bands, diagonals, lambda t: (program, low + t, h)),
                matrix_specs(matrices, block, lambda t: (b, h, program, low + t)),
            ],
            block.warpgroups,
        )

    return mosaic.kernel(
        body,
        out=(
            jax.ShapeDtypeStruct((plan.batch, plan.queries, plan.heads, plan.value_width), q.dtype),
            jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.queries), jnp.float32),
        ),
        scratch=[
            plgpu.SMEM((block.warpgroups, block.rows, plan.width), q.dtype),
            plgpu.SMEM((block.warpgroups, block.rows, plan.value_width), q.dtype),
            plgpu.SMEM((block.warpgroups, block.rows), jnp.float32),
            plgpu.Barrier(num_barriers=block.warpgroups),
            *spaces(given, block.warpgroups),
        ],
        grid={"head": plan.heads, "tile": plan.queries // block.program, "batch": plan.batch},
        warpgroups=block.warpgroups,
        interpret=plan.interpret,
    )(q, k, v, *operands_of(given, diagonals))


class OfQueries(NamedTuple):
    """What a program of queries gives: dq, the gradients of tables and of a curve as sums of its warpgroups, and those of the rows' reach."""

    dq: Any
    lines: dict[str, Any]
    curves: dict[str, Any]
    rows: dict[str, Any]


def backward_queries(plan: Plan, q, k, v, gradient, given: Given) -> OfQueries:
    """The gradients of q, of tables `[N, T + S − 1]`, of a curve's numbers and of the rows' reach `[B, N, T]`.

    The rows hold lse and delta, too, the latter Σ gradient · out of each query. Each warpgroup sums the gradient of a table in a line of its
    own. So that lines are few, a program then runs over many blocks of queries, which are programs of their own without a table.
    """
    block = plan.dq
    diagonals = Diagonals(plan, block.program, block.columns)
    programs = plan.queries // block.program
    parts = plan.parts(plan.batch * programs)
    curved = bool(given.curves)

    def body(q_ref, k_ref, v_ref, gradient_ref, *refs):
        (row_refs, column_refs, tables, bands, matrices, curves, reach), refs = split_operands(given, refs)
        results, scratch = tree_of_refs.unflatten(refs)
        space_ref, numbers_ref, reach_tile, q_tile, gradient_tile, barriers, turn_ref = scratch
        h, warpgroup = lax.axis_index("head"), lax.axis_index("warpgroup")

        def run_program(b, program):
            first_query = program * block.program + warpgroup * block.rows
            seen = plan.keys_of(program * block.program, block.program, block.columns)
            low, tiles = within_reach(reach, b, program, *seen)

            def compute(run):
                here = pl.ds(first_query, block.rows)
                fetched = [
                    (q_ref.at[b, here, h], q_tile.at[warpgroup]),
                    (gradient_ref.at[b, here, h], gradient_tile.at[warpgroup]),
                ]
                fetch(fetched, barriers.at[warpgroup])
                own = vectors(row_refs, b, h, here, mosaic.ROWS)
                total, of_reach, _ = run(
                    (mosaic.zeros((block.rows, plan.width)), [mosaic.zeros((block.rows,), mosaic.ROWS)] * curved, own)
                )
                q_tile.at[warpgroup][...] = (total * plan.slope).astype(q.dtype)
                if curves:
                    reach_tile.at[warpgroup][...] = of_reach[0]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_tile.at[warpgroup], results.dq.at[b, here, h])
                if curves:
                    plgpu.copy_smem_to_gmem(reach_tile.at[warpgroup], results.rows["reach"].at[b, h, here])
                plgpu.wait_smem_to_gmem(0)

            def step(indices, k_tile, v_tile, column_tiles, windows, met_windows, dense, carry):
                total, of_reach, row_vectors = carry
                number = low + indices[0]
                tile = Tile((block.rows, block.columns), first_query, number * block.columns)
                met = diagonals.parts(met_windows, warpgroup), q_tile.at[warpgroup], k_tile
                of_bands = Bands(*met, own_space(turn_ref, warpgroup))
                product = products(plan, tile, of_bands)
                dp = mosaic.product(gradient_tile.at[warpgroup], v_tile, tile.shape)
                column_vectors = Loaded(column_tiles, mosaic.COLUMNS)
                curve = curve_in(curves, tile, b, h)
                biases = Biases(diagonals.parts(windows, warpgroup), own_rows(dense, warpgroup), curve)
                p = probabilities(plan, tile, product, row_vectors, column_vectors, biases)
                ds = score_gradients(plan, tile, p, dp, row_vectors)
                of_tables = {"bias": ds}
                if curve is not None:
                    distance = on_diagonals(plan, tile, biases, "distance")
                    own = tile.of_queries(row_vectors["reach"])
                    give = functools.partial(mosaic_sums.add, numbers_ref.at[warpgroup], interpret=plan.interpret)
                    du = curve.gradients(distance * own, ds, give)
                    of_reach = [of_reach[0] + jnp.sum(du * distance, axis=1)]
                    of_tables["distance"] = du * own

                def add_to_lines():
                    first = tile.first_key - first_query + plan.queries - block.rows
                    for name, ref in results.lines.items():
                        line = ref.at[h, part, warpgroup, pl.ds(first, block.rows + block.columns)]
                        space = space_ref.at[warpgroup]
                        mosaic_diagonals.add(line, of_tables[name], space, interpret=plan.interpret)

                total = mosaic.add_product(
                    total, ds.astype(q.dtype), k_tile, interpret=plan.interpret, meanwhile=add_to_lines
                )
                if "query" in bands:
                    total = add_rows(plan, "query", total, ds, of_bands, q.dtype)
                return total, of_reach, row_vectors

            over_tiles(
                step,
                compute,
                (tiles,),
                [
                    *key_tiles(plan, block.columns, k_ref, v_ref, column_refs, h, lambda t: (b, low + t)),
                    window_specs(tables, diagonals, lambda t: (h, diagonals.of(program, low + t))),
                    band_specs(bands, diagonals, lambda t: (program, low + t, h)),
                    matrix_specs(matrices, block, lambda t: (b, h, program, low + t)),
                ],
                block.warpgroups,
            )

        if not tables:
            run_program(lax.axis_index("batch"), lax.axis_index("tile"))
            return
        part = lax.axis_index("part")
        computes = warpgroup < block.warpgroups

        @pl.when(computes)
        def clear():
            sums = [ref.at[h, part, warpgroup] for ref in results.lines.values()]
            for ref in [space_ref.at[warpgroup], *([numbers_ref.at[warpgroup]] if curves else []), *sums]:
                mosaic_diagonals.clear(ref, interpret=plan.interpret)

        @pl.loop(0, -(-plan.batch * programs // parts))
        def turn(i):
            # There and back: where a mask by index gives later queries more keys, programs have as much to do as others.
            index = i * parts + lax.select(lax.rem(i, 2) == 0, part, parts - 1 - part)

            @pl.when(index < plan.batch * programs)
            def run():
                run_program(lax.div(index, programs), lax.rem(index, programs))

        if curves:

            @pl.when(computes)
            def write():
                line = results.curves["curve"].at[h, part, warpgroup]
                mosaic_sums.write(line, numbers_ref.at[warpgroup], interpret=plan.interpret)

    grid = (
        {"head": plan.heads, "part": parts}
        if given.lines
        else {"head": plan.heads, "tile": programs, "batch": plan.batch}
    )
    each = (plan.heads, parts, block.warpgroups)
    rows_of_warpgroups = (block.warpgroups, block.rows)
    sums = {name: mosaic_sums.space(x.shape[1]) for name, x in given.curves.items()}
    out = OfQueries(
        dq=jax.ShapeDtypeStruct(q.shape, q.dtype),
        lines=dict.fromkeys(given.lines, jax.ShapeDtypeStruct((*each, plan.queries + plan.keys), jnp.float32)),
        curves={name: jax.ShapeDtypeStruct((*each, size), jnp.float32) for name, size in sums.items()},
        rows={"reach": jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.queries), jnp.float32)} if curved else {},
    )
    scratch = [
        plgpu.SMEM((block.warpgroups, mosaic_diagonals.space(block.columns)), jnp.float32) if given.lines else None,
        plgpu.SMEM((block.warpgroups, sums["curve"]), jnp.float32) if curved else None,
        plgpu.SMEM(rows_of_warpgroups, jnp.float32) if curved else None,
        plgpu.SMEM((*rows_of_warpgroups, plan.width), q.dtype),
        plgpu.SMEM((*rows_of_warpgroups, plan.value_width), q.dtype),
        plgpu.Barrier(num_arrivals=2, num_barriers=block.warpgroups),
        spaces(given, block.warpgroups),
    ]
    outputs, tree = jax.tree.flatten(out)
    buffers, tree_of_refs = jax.tree.flatten((out, scratch))
    results = mosaic.kernel(
        body,
        out=tuple(outputs),
        scratch=buffers[len(outputs) :],
        grid=grid,
        warpgroups=block.warpgroups,
        interpret=plan.interpret,
    )(q, k, v, gradient, *operands_of(given, diagonals))
    found = tree.unflatten(results)
    return found._replace(
        lines={name: jnp.sum(x, axis=(1, 2))[:, 1:] for name, x in found.lines.items()},
        curves={name: jnp.sum(mosaic_sums.totals(x), axis=(1, 2)) for name, x in found.curves.items()},
    )


def backward_keys(plan: Plan, q, k, v, gradient, given: Given) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of k and v, and of the keys' bias `[B, K, S]`, each summed over the query heads that read it.

    A `Dense` term is transposed beforehand, as the tiles are: what is in memory already is copied once, and read as everywhere else.
    """
    block = plan.dkv
    diagonals = Diagonals(plan, block.program, block.columns, transposed=True)
    given = given._replace(dense={name: jnp.swapaxes(x, 2, 3) for name, x in given.dense.items()})

    def body(q_ref, k_ref, v_ref, gradient_ref, *refs):
        (row_refs, column_refs, tables, bands, matrices, curves, reach), refs = split_operands(given, refs)
        dk_ref, dv_ref, db_ref, k_tile, v_tile, db_tile, barriers, *space_ref = refs
        b, kv_head, program = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("tile")
        warpgroup = lax.axis_index("warpgroup")
        first_key = program * block.program + warpgroup * block.rows
        seen = plan.queries_of(program * block.program, block.program, block.columns)
        low, tiles = within_reach(reach, b, program, *seen)

        def compute(run):
            here = pl.ds(first_key, block.rows)
            fetched = [
                (k_ref.at[b, here, kv_head], k_tile.at[warpgroup]),
                (v_ref.at[b, here, kv_head], v_tile.at[warpgroup]),
            ]
            fetch(fetched, barriers.at[warpgroup])
            carry = (
                mosaic.zeros((block.rows, plan.width)),
                mosaic.zeros((block.rows, plan.value_width)),
                mosaic.zeros((block.rows,), mosaic.ROWS),
                vectors(column_refs, b, kv_head, here, mosaic.ROWS),
            )
            dk, dv, db, _ = run(carry)
            k_tile.at[warpgroup][...] = (dk * plan.slope).astype(k.dtype)
            v_tile.at[warpgroup][...] = (dv * plan.growth).astype(v.dtype)
            db_tile.at[warpgroup][...] = db
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_tile.at[warpgroup], dk_ref.at[b, here, kv_head])
            plgpu.copy_smem_to_gmem(v_tile.at[warpgroup], dv_ref.at[b, here, kv_head])
            plgpu.copy_smem_to_gmem(db_tile.at[warpgroup], db_ref.at[b, kv_head, here])
            plgpu.wait_smem_to_gmem(0)

        def step(indices, q_tile, gradient_tile, row_tiles, windows, met_windows, dense, carry):
            dk, dv, db, column_vectors = carry
            number = low + indices[1]
            tile = Tile((block.rows, block.columns), number * block.columns, first_key, transposed=True)
            met = diagonals.parts(met_windows, warpgroup), q_tile, k_tile.at[warpgroup]
            of_bands = Bands(*met, own_space(space_ref, warpgroup))
            product = products(plan, tile, of_bands)
            dp = mosaic.product(v_tile.at[warpgroup], gradient_tile, tile.shape)
            row_vectors = Loaded(row_tiles, mosaic.COLUMNS)
            curve = curve_in(curves, tile, b, kv_head * plan.group + indices[0])
            biases = Biases(diagonals.parts(windows, warpgroup), own_rows(dense, warpgroup), curve)
            p = probabilities(plan, tile, product, row_vectors, column_vectors, biases)
            ds = score_gradients(plan, tile, p, dp, row_vectors)
            kept = dropped(plan, tile, p, row_vectors).astype(q.dtype)
            dv = mosaic.add_product(dv, kept, gradient_tile, interpret=plan.interpret)
            dk = mosaic.add_product(dk, ds.astype(q.dtype), q_tile, interpret=plan.interpret)
            if "key" in bands:
                dk = add_rows(plan, "key", dk, ds, of_bands, q.dtype)
            if "bias" in given.columns:
                db = db + jnp.sum(ds, axis=1)
            return dk, dv, db, column_vectors

        def at(g, t):
            return b, low + t, kv_head * plan.group + g

        over_tiles(
            step,
            compute,
            (plan.group, tiles),
            [
                (q_ref, tile_spec(block.columns, plan.width, at)),
                (gradient_ref, tile_spec(block.columns, plan.value_width, at)),
                vector_specs(row_refs, block.columns, at),
                window_specs(
                    tables, diagonals, lambda g, t: (kv_head * plan.group + g, diagonals.of(program, low + t))
                ),
                band_specs(bands, diagonals, lambda g, t: (program, low + t, kv_head * plan.group + g)),
                matrix_specs(matrices, block, lambda g, t: (b, kv_head * plan.group + g, program, low + t)),
            ],
            block.warpgroups,
        )

    return mosaic.kernel(
        body,
        out=(
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
            jax.ShapeDtypeStruct((plan.batch, plan.kv_heads, plan.keys), jnp.float32),
        ),
        scratch=[
            plgpu.SMEM((block.warpgroups, block.rows, plan.width), q.dtype),
            plgpu.SMEM((block.warpgroups, block.rows, plan.value_width), q.dtype),
            plgpu.SMEM((block.warpgroups, block.rows), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=block.warpgroups),
            *spaces(given, block.warpgroups),
        ],
        grid={"head": plan.kv_heads, "tile": plan.keys // block.program, "batch": plan.batch},
        warpgroups=block.warpgroups,
        interpret=plan.interpret,
    )(q, k, v, gradient, *operands_of(given, diagonals))
