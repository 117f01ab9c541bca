"""The gradient of a `Dense` term, in a pass of its own: a program owns a tile of the bias and sums the dS of all that read it, in order.

dq, which has dS too, would have to store it for every row of the batch and every head, for XLA to sum. To compute it once more is two products
and an exponential an entry, takes no memory but that of the result, and where nobody asks for the gradient XLA drops the whole pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention import mosaic
from kernels.attention.fused import Given
from kernels.attention.pallas_gpu_operands import operands_of, split_operands
from kernels.attention.pallas_gpu_pipeline import fetch, over_tiles, tile_spec, vector_specs, window_specs
from kernels.attention.pallas_gpu_plan import MULTIPROCESSORS, Blocks, Diagonals, Plan
from kernels.attention.pallas_gpu_tile import Biases, Loaded, Tile, curve_in, probabilities, score_gradients


@dataclass(frozen=True)
class Readers:
    """What reads a bias `[batches, heads, ·, ·]`: the rows of the batch and the heads that share one of its matrices, in `parts` of `each`."""

    plan: Plan
    batches: int
    heads: int
    tiles: int  # of one matrix

    @property
    def matrices(self) -> int:
        return self.batches * self.heads

    @property
    def count(self) -> int:
        return self.plan.batch * self.plan.heads // self.matrices

    @property
    def each(self) -> int:
        """As many as leave a few programs for each multiprocessor, whose sums XLA adds: in memory no more than that many tiles."""
        parts = min(self.count, max(4 * MULTIPROCESSORS // (self.matrices * self.tiles), 1))
        return -(-self.count // parts)

    @property
    def parts(self) -> int:
        return -(-self.count // self.each)

    def of(self, matrix: Any, number: Any) -> tuple[Any, Any]:
        """(row of the batch, head) of the number-th reader of a matrix; an axis is told by one of the two, the other adds zero."""
        sharing = self.plan.heads // self.heads
        b = lax.div(matrix, self.heads) + lax.div(number, sharing)
        h = lax.rem(matrix, self.heads) + lax.rem(number, sharing)
        return b, h


def backward_bias(plan: Plan, q, k, v, gradient, given: Given) -> tuple[jax.Array]:
    """The gradient of the bias `[1 or B, 1 or N, T, S]`, in its dtype where it has one reader and in float32 otherwise."""
    (bias,) = given.dense.values()
    # At width 128 tiles of two warpgroups, in both stages, would leave no shared memory for those of a float32 bias.
    block = Blocks(64, 1 if plan.wide else 2)
    diagonals = Diagonals(plan, block.program, block.columns)
    rows, columns = plan.queries // block.program, plan.keys // block.columns
    readers = Readers(plan, *bias.shape[:2], rows * columns)
    dtype = bias.dtype if readers.count == 1 else jnp.float32

    def body(q_ref, k_ref, v_ref, gradient_ref, *refs):
        (row_refs, column_refs, tables, _, (bias_ref,), curves, _), refs = split_operands(given, refs)
        out_ref, bias_tile, out_tile, barriers = refs
        place, row, column = lax.axis_index("matrix"), lax.axis_index("row"), lax.axis_index("column")
        warpgroup = lax.axis_index("warpgroup")
        part, matrix = lax.div(place, readers.matrices), lax.rem(place, readers.matrices)
        first_query, first_key = row * block.program + warpgroup * block.rows, column * block.columns
        here = pl.ds(first_query, block.rows), pl.ds(first_key, block.columns)
        low, tiles = plan.keys_of(row * block.program, block.program, block.columns)
        # Where nothing is visible one reader says so: all its scores are hidden, and its dS is zero.
        seen = (column >= low) & (column < low + tiles)
        turns = lax.select(seen, lax.min(readers.each, readers.count - part * readers.each), 1)

        def compute(run):
            at = lax.div(matrix, readers.heads), lax.rem(matrix, readers.heads)
            fetch([(bias_ref.at[*at, *here], bias_tile.at[warpgroup])], barriers.at[warpgroup])
            out_tile.at[warpgroup][...] = run(mosaic.zeros((block.rows, block.columns))).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_tile.at[warpgroup], out_ref.at[place, *here])
            plgpu.wait_smem_to_gmem(0)

        def reader(i):
            return readers.of(matrix, part * readers.each + i)

        def step(indices, q_tile, gradient_tile, k_tile, v_tile, row_tiles, column_tiles, windows, total):
            own = pl.ds(warpgroup * block.rows, block.rows)
            tile = Tile((block.rows, block.columns), first_query, first_key)
            product = mosaic.product(q_tile.at[own], k_tile, tile.shape)
            dp = mosaic.product(gradient_tile.at[own], v_tile, tile.shape)
            row_vectors = Loaded.part(row_tiles, own, mosaic.ROWS)
            column_vectors = Loaded(column_tiles, mosaic.COLUMNS)
            curve = curve_in(curves, tile, *reader(indices[0]))
            biases = Biases(diagonals.parts(windows, warpgroup), bias_tile.at[warpgroup], curve)
            p = probabilities(plan, tile, product, row_vectors, column_vectors, biases)
            return total + score_gradients(plan, tile, p, dp, row_vectors)

        def of_queries(i):
            b, h = reader(i)
            return b, row, h

        def of_keys(i):
            b, h = reader(i)
            return b, column, h

        def of_kv_heads(i):
            b, h = reader(i)
            return b, column, lax.div(h, plan.group)

        over_tiles(
            step,
            compute,
            (turns,),
            [
                (q_ref, tile_spec(block.program, plan.width, of_queries)),
                (gradient_ref, tile_spec(block.program, plan.value_width, of_queries)),
                (k_ref, tile_spec(block.columns, plan.width, of_kv_heads)),
                (v_ref, tile_spec(block.columns, plan.value_width, of_kv_heads)),
                vector_specs(row_refs, block.program, of_queries),
                vector_specs(column_refs, block.columns, of_keys),
                window_specs(tables, diagonals, lambda i: (reader(i)[1], diagonals.of(row, column))),
            ],
            block.warpgroups,
        )

    tile = block.warpgroups, block.rows, block.columns
    sums = mosaic.kernel(
        body,
        out=(jax.ShapeDtypeStruct((readers.parts * readers.matrices, plan.queries, plan.keys), dtype),),
        scratch=[
            plgpu.SMEM(tile, bias.dtype),
            plgpu.SMEM(tile, dtype),
            plgpu.Barrier(num_barriers=block.warpgroups),
        ],
        grid={"matrix": readers.parts * readers.matrices, "row": rows, "column": columns},
        warpgroups=block.warpgroups,
        interpret=plan.interpret,
    )(q, k, v, gradient, *operands_of(given, diagonals))
    return (jnp.sum(sums[0].reshape(readers.parts, *bias.shape), axis=0, dtype=dtype),)
