"""The kernels of `pallas_gpu`: one forward and two backward passes over tiles, each a program that others need not wait for.

A program owns a tile of queries (forward, dq) or of keys (dkv) and runs over the tiles of the other side, which one warpgroup
loads while the others compute. In dkv the tile is transposed, keys by queries, so that both of its products have the accumulators' side first.

Nothing is shared between programs: no atomics, the same bits in every run.

Source: Dao 2023 (arXiv:2307.08691), Shah et al. 2024 (arXiv:2407.08608).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention import mosaic, mosaic_diagonals
from kernels.attention.fused import FLOOR, HIDDEN, Given
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
from kernels.attention.pallas_gpu_tile import Loaded, Tile, dropped, probabilities, score_gradients, scores, visible


def forward(plan: Plan, q, k, v, given: Given) -> tuple[jax.Array, jax.Array]:
    """(out `[B, T, N, Hv]`, lse `[B, N, T]`) of q `[B, T, N, H]`, k, v `[B, S, K, ·]`."""
    block = plan.forward
    diagonals = Diagonals(plan, block.program, block.columns)

    def body(q_ref, k_ref, v_ref, *refs):
        (row_refs, column_refs, tables, matrices, reach), refs = split_operands(given, refs)
        out_ref, lse_ref, q_tile, out_tile, lse_tile, barriers = refs
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

        def step(indices, k_tile, v_tile, column_tiles, windows, dense, carry):
            total, top, mass, row_vectors = carry
            number = low + indices[0]
            tile = Tile((block.rows, block.columns), first_query, number * block.columns)
            s = mosaic.product(q_tile.at[warpgroup], k_tile, tile.shape)
            window = diagonals.part(windows, warpgroup)
            column_vectors = Loaded(column_tiles, mosaic.COLUMNS)
            s, factor = scores(plan, tile, s, column_vectors, window, own_rows(dense, warpgroup))
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
        ],
        grid={"head": plan.heads, "tile": plan.queries // block.program, "batch": plan.batch},
        warpgroups=block.warpgroups,
        interpret=plan.interpret,
    )(q, k, v, *operands_of(given, diagonals))


def backward_queries(plan: Plan, q, k, v, gradient, given: Given) -> tuple[jax.Array, ...]:
    """The gradients of q and, if there is one, of the table; the rows hold lse and delta, too, the latter Σ gradient · out of each query.

    Each warpgroup sums the table's gradient in a line of its own. So that lines are few, a program then runs over many blocks of
    queries, which are programs of their own without a table.
    """
    block = plan.dq
    diagonals = Diagonals(plan, block.program, block.columns)
    programs = plan.queries // block.program
    parts = plan.parts(plan.batch * programs)

    def body(q_ref, k_ref, v_ref, gradient_ref, *refs):
        (row_refs, column_refs, tables, matrices, reach), (dq_ref, *refs) = split_operands(given, refs)
        line_ref, space_ref, q_tile, gradient_tile, barriers = refs if tables else (None, None, *refs)
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
                total, _ = run((mosaic.zeros((block.rows, plan.width)), vectors(row_refs, b, h, here, mosaic.ROWS)))
                q_tile.at[warpgroup][...] = (total * plan.slope).astype(q.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_tile.at[warpgroup], dq_ref.at[b, here, h])
                plgpu.wait_smem_to_gmem(0)

            def step(indices, k_tile, v_tile, column_tiles, windows, dense, carry):
                total, row_vectors = carry
                number = low + indices[0]
                tile = Tile((block.rows, block.columns), first_query, number * block.columns)
                product = mosaic.product(q_tile.at[warpgroup], k_tile, tile.shape)
                dp = mosaic.product(gradient_tile.at[warpgroup], v_tile, tile.shape)
                column_vectors = Loaded(column_tiles, mosaic.COLUMNS)
                window = diagonals.part(windows, warpgroup)
                own = own_rows(dense, warpgroup)
                p = probabilities(plan, tile, product, row_vectors, column_vectors, window, own)
                ds = score_gradients(plan, tile, p, dp, row_vectors)

                def add_to_line():
                    if tables:
                        first = tile.first_key - first_query + plan.queries - block.rows
                        line = line_ref.at[h, part, warpgroup, pl.ds(first, block.rows + block.columns)]
                        mosaic_diagonals.add(line, ds, space_ref.at[warpgroup], interpret=plan.interpret)

                total = mosaic.add_product(
                    total, ds.astype(q.dtype), k_tile, interpret=plan.interpret, meanwhile=add_to_line
                )
                return total, row_vectors

            over_tiles(
                step,
                compute,
                (tiles,),
                [
                    *key_tiles(plan, block.columns, k_ref, v_ref, column_refs, h, lambda t: (b, low + t)),
                    window_specs(tables, diagonals, lambda t: (h, diagonals.of(program, low + t))),
                    matrix_specs(matrices, block, lambda t: (b, h, program, low + t)),
                ],
                block.warpgroups,
            )

        if not tables:
            run_program(lax.axis_index("batch"), lax.axis_index("tile"))
            return
        part = lax.axis_index("part")

        @pl.when(warpgroup < block.warpgroups)
        def clear():
            mosaic_diagonals.clear(space_ref.at[warpgroup], interpret=plan.interpret)
            mosaic_diagonals.clear(line_ref.at[h, part, warpgroup], interpret=plan.interpret)

        @pl.loop(0, -(-plan.batch * programs // parts))
        def turn(i):
            # There and back: where a mask by index gives later queries more keys, programs have as much to do as others.
            index = i * parts + lax.select(lax.rem(i, 2) == 0, part, parts - 1 - part)

            @pl.when(index < plan.batch * programs)
            def run():
                run_program(lax.div(index, programs), lax.rem(index, programs))

    grid = {"head": plan.heads, "tile": programs, "batch": plan.batch}
    of_lines: tuple[list, list] = [], []
    if given.lines:
        grid = {"head": plan.heads, "part": parts}
        shape = (plan.heads, parts, block.warpgroups, plan.queries + plan.keys)
        space = (block.warpgroups, mosaic_diagonals.space(block.columns))
        of_lines = [jax.ShapeDtypeStruct(shape, jnp.float32)], [plgpu.SMEM(space, jnp.float32)]
    dq, *lines = mosaic.kernel(
        body,
        out=(jax.ShapeDtypeStruct(q.shape, q.dtype), *of_lines[0]),
        scratch=[
            *of_lines[1],
            plgpu.SMEM((block.warpgroups, block.rows, plan.width), q.dtype),
            plgpu.SMEM((block.warpgroups, block.rows, plan.value_width), q.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=block.warpgroups),
        ],
        grid=grid,
        warpgroups=block.warpgroups,
        interpret=plan.interpret,
    )(q, k, v, gradient, *operands_of(given, diagonals))
    return dq, *(jnp.sum(line, axis=(1, 2))[:, 1:] for line in lines)


def backward_keys(plan: Plan, q, k, v, gradient, given: Given) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of k and v, and of the keys' bias `[B, K, S]`, each summed over the query heads that read it.

    A `Dense` term is transposed beforehand, as the tiles are: what is in memory already is copied once, and read as everywhere else.
    """
    block = plan.dkv
    diagonals = Diagonals(plan, block.program, block.columns, transposed=True)
    given = given._replace(dense={name: jnp.swapaxes(x, 2, 3) for name, x in given.dense.items()})

    def body(q_ref, k_ref, v_ref, gradient_ref, *refs):
        (row_refs, column_refs, tables, matrices, reach), refs = split_operands(given, refs)
        dk_ref, dv_ref, db_ref, k_tile, v_tile, db_tile, barriers = refs
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

        def step(indices, q_tile, gradient_tile, row_tiles, windows, dense, carry):
            dk, dv, db, column_vectors = carry
            number = low + indices[1]
            tile = Tile((block.rows, block.columns), number * block.columns, first_key, transposed=True)
            product = mosaic.product(k_tile.at[warpgroup], q_tile, tile.shape)
            dp = mosaic.product(v_tile.at[warpgroup], gradient_tile, tile.shape)
            row_vectors = Loaded(row_tiles, mosaic.COLUMNS)
            window = diagonals.part(windows, warpgroup)
            own = own_rows(dense, warpgroup)
            p = probabilities(plan, tile, product, row_vectors, column_vectors, window, own)
            ds = score_gradients(plan, tile, p, dp, row_vectors)
            kept = dropped(plan, tile, p, row_vectors).astype(q.dtype)
            dv = mosaic.add_product(dv, kept, gradient_tile, interpret=plan.interpret)
            dk = mosaic.add_product(dk, ds.astype(q.dtype), q_tile, interpret=plan.interpret)
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
        ],
        grid={"head": plan.kv_heads, "tile": plan.keys // block.program, "batch": plan.batch},
        warpgroups=block.warpgroups,
        interpret=plan.interpret,
    )(q, k, v, gradient, *operands_of(given, diagonals))
