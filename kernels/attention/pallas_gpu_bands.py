"""Tables of relative positions of any map of rows inside the GPU kernels, as DeBERTa's: what they add to scores, and the way back.

Outside, a table is laid out with one row for each distance of array indices. A tile of 64 queries and 64 keys at the distance d meets the rows
from d − 64 to d + 63: of these each query (or key) needs 64, one in each pair that is 64 apart. So the products with both halves are one square
of 64 numbers a row, chosen where they stand, and a turn of the square (`mosaic_turns`) brings each to its key:

    x_im = ⟨q_i, A[d + m]⟩ for i + m < 64, else ⟨q_i, A[d + m − 64]⟩;   ⟨q_i, A[d + j − i]⟩ = x_i,(j − i) mod 64
    y_jm = ⟨k_j, C[d + m]⟩ for m ≤ j, else ⟨k_j, C[d + m − 64]⟩;        ⟨k_j, C[d + j − i]⟩ = y_j,(j − i) mod 64

Going back, dS turned the other way is split in the same places, and each part multiplies its half of the table. Nothing is gathered, and no
array is larger than the tables.

Sources: Shaw et al. 2018 (arXiv:1803.02155) and He et al. 2021 (arXiv:2006.03654) for the terms; the square is ours.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention import mosaic
from kernels.attention.fused import Given
from kernels.attention.mosaic_turns import SIDE, SPACE, SUM, X_LESS_Y, Y_LESS_X, X, Y, only, put, turned
from kernels.attention.pallas_gpu_operands import operands_of, split_operands
from kernels.attention.pallas_gpu_pipeline import over_tiles, window_specs
from kernels.attention.pallas_gpu_plan import MULTIPROCESSORS, Diagonals, Plan
from kernels.attention.pallas_gpu_tile import Bands, Biases, Loaded, Tile, probabilities, score_gradients

Side = Literal["query", "key"]

# Where a square `[own side, m]` has what it needs of the second half of a table's rows, and where of the first.
_AFTER = {"query": (SUM, SIDE), "key": (X_LESS_Y, 1)}
_BEFORE = {"query": ((-1, -1), 1 - SIDE), "key": (Y_LESS_X, 0)}


def spaces(given: Given, warpgroups: int) -> list:
    """Shared memory for turns, where there is a table."""
    return [plgpu.SMEM((warpgroups, SPACE), jnp.float32)] if given.bands else []


def band_specs(refs: Mapping[str, Any], diagonals: Diagonals, at) -> dict:
    """Of tables `[R, N or K or 1, H]` the rows that a program meets with a tile; at(step) = (program, tile, query head)."""
    plan, length = diagonals.plan, diagonals.rows + diagonals.columns

    def spec(name, ref):
        def where(*step):
            program, tile, head = at(*step)
            last = program * diagonals.rows - tile * diagonals.columns
            start = last - diagonals.columns if diagonals.transposed else -last - diagonals.rows
            return start + plan.queries, _head_of(plan, name, ref, head), 0

        return plgpu.BlockSpec((pl.Element(length), None, ref.shape[2]), where)

    return {name: (ref, spec(name, ref)) for name, ref in refs.items()}


def _head_of(plan: Plan, side: str, ref: Any, head: Any) -> Any:
    """The head of a table that a query head meets."""
    if ref.shape[1] == 1:
        return 0
    return head if side == "query" else lax.div(head, plan.group)


def own_space(spaces: Sequence, warpgroup: Any) -> Any:
    """Of `spaces` that of one warpgroup; None without a table."""
    return spaces[0].at[warpgroup] if spaces else None


def products(plan: Plan, tile: Tile, bands: Bands) -> jax.Array:
    """⟨q_i, k_j⟩ + ⟨q_i, A[r]⟩ + ⟨k_j, C[r]⟩ of a tile, of the tables that there are."""
    total = None
    for side, window in bands.windows.items():
        own = bands.queries if side == "query" else bands.keys
        # One product at a time, so that no more than one is in registers.
        for half, condition in zip(_halves(window), (None, _AFTER[side]), strict=True):
            put(mosaic.product(own, half, tile.shape), bands.space, condition, interpret=plan.interpret)
        row = Y if (side == "key") == tile.transposed else X
        column = Y_LESS_X if tile.transposed else X_LESS_Y
        found = turned(bands.space, row=row, column=column, interpret=plan.interpret)
        total = found if total is None else total + found
    down, across = (bands.keys, bands.queries) if tile.transposed else (bands.queries, bands.keys)
    if total is None:
        return mosaic.product(down, across, tile.shape)
    return mosaic.added_product(total, down, across, interpret=plan.interpret)


def add_rows(plan: Plan, side: Side, total: jax.Array, ds: jax.Array, bands: Bands, dtype: Any) -> jax.Array:
    """total[y] + Σ_x ds[y, x] · table[r] of a tile whose rows are the side that the table meets."""
    column = SUM if side == "query" else Y_LESS_X
    put(ds, bands.space, interpret=plan.interpret)
    square = turned(bands.space, row=Y, column=column, interpret=plan.interpret)
    first, second = _halves(bands.windows[side])
    for half, condition in ((first, _BEFORE[side]), (second, _AFTER[side])):
        part = only(condition, square, interpret=plan.interpret).astype(dtype)
        total = mosaic.add_product(total, part, half, interpret=plan.interpret)
    return total


def _halves(window: Any) -> tuple[Any, Any]:
    return window.at[pl.ds(0, SIDE)], window.at[pl.ds(SIDE, SIDE)]


@dataclass(frozen=True)
class Line:
    """The tiles of one diagonal, `each` rows of the batch at a time, dealt out among `parts` programs."""

    plan: Plan

    @property
    def each(self) -> int:
        """Rows of the batch at a time, one for each warpgroup."""
        return 2 - self.plan.batch % 2

    @property
    def _queries(self) -> int:
        return self.plan.queries // SIDE

    @property
    def count(self) -> int:
        """Diagonals."""
        return self._queries + self.plan.keys // SIDE - 1

    @property
    def parts(self) -> int:
        """So many that each multiprocessor has one; the shortest diagonal has a tile for each."""
        wanted = -(-2 * MULTIPROCESSORS // (self.plan.heads * self.count))
        return max(1, min(wanted, self.plan.batch // self.each))

    def distance(self, number: Any) -> Any:
        """Of the corners of its tiles."""
        return (number - (self._queries - 1)) * SIDE

    def turns(self, number: Any, part: Any) -> Any:
        """How many tiles a program has; one where all are hidden, whose dS is zero."""
        _, many = self._tiles(number)
        tiles = many * (self.plan.batch // self.each)
        r = self.distance(number) - self.plan.offset
        left, right = self.plan.left, self.plan.right
        hidden = jnp.bool_(False)
        if left is not None:
            hidden = hidden | (r + SIDE - 1 < -left)
        if right is not None:
            hidden = hidden | (r - SIDE + 1 > right)
        return lax.select(hidden, 1, lax.div(tiles - part + self.parts - 1, self.parts))

    def tile(self, number: Any, part: Any, turn: Any) -> tuple[Any, Any, Any]:
        """(first row of the batch, in `each`; block of queries; block of keys)."""
        first, many = self._tiles(number)
        place = turn * self.parts + part
        query = first + lax.rem(place, many)
        return lax.div(place, many), query, query + number - (self._queries - 1)

    def _tiles(self, number: Any) -> tuple[Any, Any]:
        """(first block of queries, how many)."""
        ahead = number - (self._queries - 1)
        first = lax.max(-ahead, 0)
        return first, lax.min(self._queries, self.plan.keys // SIDE - ahead) - first


def backward_table(side: Side, plan: Plan, q, k, v, gradient, given: Given) -> tuple[jax.Array]:
    """The gradient of the table of one side, `[R, N or K, H]`, in float32: a program owns 128 distances of a head and runs along their diagonal."""
    line = Line(plan)
    per = line.each
    diagonals = Diagonals(plan, SIDE, SIDE)

    def body(q_ref, k_ref, v_ref, gradient_ref, *refs):
        (row_refs, column_refs, tables, bands, *_, reach), refs = split_operands(given, refs)
        out_ref, space_ref, barrier, *tiles = refs
        head, number, part = lax.axis_index("head"), lax.axis_index("diagonal"), lax.axis_index("part")
        warpgroup = lax.axis_index("warpgroup")
        own_tiles = dict(zip(bands, tiles, strict=True))

        def compute(run):
            here = pl.ds(line.distance(number) - SIDE + plan.queries, 2 * SIDE)

            @pl.when(warpgroup == 0)
            def copy():
                for name, ref in bands.items():
                    source = ref.at[here, _head_of(plan, name, ref, head)]
                    plgpu.copy_gmem_to_smem(source, own_tiles[name], barrier)

            plgpu.barrier_wait(barrier)
            for half, total in enumerate(run((mosaic.zeros((SIDE, plan.width)),) * 2)):
                out_ref.at[head, number, part, warpgroup, half][...] = total * plan.slope

        def step(indices, *tiles_and_sums):
            *tiles, sums = tiles_and_sums
            rows, query, key = line.tile(number, part, indices[0])
            add = functools.partial(add_tile, query, key, *tiles)
            if not reach:
                return add(sums)
            first, last = (reach[0][rows * per + warpgroup, query, end] for end in range(2))
            return lax.cond((first <= key) & (key <= last), add, lambda sums: sums, sums)

        def add_tile(query, key, q_tile, gradient_tile, k_tile, v_tile, row_tiles, column_tiles, windows, sums):
            tile = Tile((SIDE, SIDE), query * SIDE, key * SIDE)
            q_tile, gradient_tile, k_tile, v_tile = (x.at[warpgroup] for x in (q_tile, gradient_tile, k_tile, v_tile))
            space = space_ref.at[warpgroup]
            row_vectors, column_vectors = (
                Loaded({name: ref.at[warpgroup] for name, ref in vectors.items()}, layout)
                for vectors, layout in ((row_tiles, mosaic.ROWS), (column_tiles, mosaic.COLUMNS))
            )
            product = products(plan, tile, Bands(own_tiles, q_tile, k_tile, space))
            p = probabilities(plan, tile, product, row_vectors, column_vectors, Biases(windows, None, None))
            dp = mosaic.product(gradient_tile, v_tile, tile.shape)
            ds = score_gradients(plan, tile, p, dp, row_vectors)
            # Distances stand down, the side that the table meets across.
            row, column = (X, SUM) if side == "query" else (X_LESS_Y, X)
            put(ds, space, interpret=plan.interpret)
            square = turned(space, row=row, column=column, interpret=plan.interpret)
            own = q_tile if side == "query" else k_tile
            parts = (
                only((coefficients[::-1], bound), square, interpret=plan.interpret).astype(q.dtype)
                for coefficients, bound in (_BEFORE[side], _AFTER[side])
            )
            return tuple(
                mosaic.add_product(total, x, own, interpret=plan.interpret)
                for total, x in zip(sums, parts, strict=True)
            )

        def spec(of_keys, ref):
            """Tiles of `per` rows of the batch, of `[B, L, heads, H]`, `[B, heads, L]` or `[B, L]`."""
            own = lax.div(head, plan.group) if of_keys else head

            def where(turn):
                rows, query, key = line.tile(number, part, turn)
                place = key if of_keys else query
                return {2: (rows, place), 3: (rows, own, place), 4: (rows, place, own, 0)}[len(ref.shape)]

            shapes = {2: (per, SIDE), 3: (per, None, SIDE), 4: (per, SIDE, None, ref.shape[-1])}
            return ref, plgpu.BlockSpec(shapes[len(ref.shape)], where)

        def diagonal(turn):
            _, query, key = line.tile(number, part, turn)
            return head, diagonals.of(query, key)

        over_tiles(
            step,
            compute,
            (line.turns(number, part),),
            [
                *(spec(of_keys, ref) for ref, of_keys in ((q_ref, 0), (gradient_ref, 0), (k_ref, 1), (v_ref, 1))),
                {name: spec(False, ref) for name, ref in row_refs.items()},
                {name: spec(True, ref) for name, ref in column_refs.items()},
                window_specs(tables, diagonals, diagonal),
            ],
            per,
        )

    (halves,) = mosaic.kernel(
        body,
        out=(jax.ShapeDtypeStruct((plan.heads, line.count, line.parts, per, 2, SIDE, plan.width), jnp.float32),),
        scratch=[
            *spaces(given, per),
            plgpu.Barrier(num_arrivals=len(given.bands)),
            *(plgpu.SMEM((2 * SIDE, plan.width), q.dtype) for _ in given.bands),
        ],
        grid={"head": plan.heads, "diagonal": line.count, "part": line.parts},
        warpgroups=per,
        interpret=plan.interpret,
    )(q, k, v, gradient, *operands_of(given, diagonals))
    halves = jnp.sum(halves, axis=(2, 3))
    before, after = (jnp.pad(halves[:, :, half], ((0, 0), (half, 1 - half), (0, 0), (0, 0))) for half in (0, 1))
    table = (before + after).reshape(plan.heads, -1, plan.width).swapaxes(0, 1)
    if side == "key":
        table = jnp.sum(table.reshape(table.shape[0], plan.kv_heads, plan.group, -1), axis=2)
    return (table,)
