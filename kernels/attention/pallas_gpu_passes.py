"""The kernels of `pallas_gpu`: one forward and two backward passes over tiles, each a program that others need not wait for.

A program owns a tile of queries (forward, dq) or of keys (dkv) and runs over the tiles of the other side, which one warpgroup
loads while the others compute. In dkv the tile is transposed, keys by queries, so that both of its products have the accumulators' side first.

Nothing is shared between programs: no atomics, the same bits in every run.

Source: Dao 2023 (arXiv:2307.08691), Shah et al. 2024 (arXiv:2407.08608).
"""

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
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention import mosaic, mosaic_diagonals, mosaic_pairs
from kernels.attention.dropout import kept, shared_hash
from kernels.attention.fused import FLOOR, HIDDEN, Call, Given

MULTIPROCESSORS = 132  # of an H100; of these programs each runs one at a time
STAGES = 2  # tiles of the other side in shared memory at a time


@dataclass(frozen=True)
class Blocks:
    """Rows and columns of one warpgroup's tile, and how many warpgroups compute."""

    rows: int
    columns: int
    warpgroups: int = 2

    @property
    def program(self) -> int:
        """Rows of one program."""
        return self.rows * self.warpgroups


@dataclass(frozen=True)
class Plan(Call):
    """A call, and how its passes are divided into tiles."""

    column_bias: bool
    dense_bytes: int  # of an entry of a `Dense` term, 0 without

    @property
    def growth(self) -> float:
        """By how much dropout multiplies what it keeps."""
        return 1 / (1 - self.rate)

    @property
    def wide(self) -> bool:
        return max(self.width, self.value_width) > 64

    # As many columns as fit the registers without a spill (tests/aot); wider tiles are faster (docs/kernels.md).

    @property
    def forward(self) -> Blocks:
        return Blocks(64, 64 if self.wide or self.dense_bytes == 4 else 128)

    @property
    def dq(self) -> Blocks:
        return Blocks(64, 64 if self.wide or self.dense_bytes == 4 else 128)

    @property
    def dkv(self) -> Blocks:
        masked = self.left is not None or self.right is not None or self.past_or_prefix
        biased = self.column_bias or self.dense_bytes > 0
        return Blocks(64, 64 if self.wide or masked or biased or self.rate > 0 else 128)

    def parts(self, blocks: int) -> int:
        """Among how many programs dq divides the blocks of queries of a head where a table's gradient is summed.

        The fewest that take the least time; at most two for each multiprocessor, so that memory is linear in length.
        """

        def rounds(parts: int) -> int:
            return -(-self.heads * parts // MULTIPROCESSORS) * -(-blocks // parts)

        return min(range(1, max(min(2 * MULTIPROCESSORS // self.heads, blocks), 1) + 1), key=rounds)


@dataclass(frozen=True)
class Diagonals:
    """The windows of a table of relative positions that tiles look into: one for all tiles on a diagonal.

    Programs own `rows` queries (or keys: `transposed`) and meet tiles of `columns` of the other side; `rows` is a multiple of
    `columns`. Window c holds `rows + columns` values in turn, from relative position c · columns + `plan.least` on.
    """

    plan: Plan
    rows: int
    columns: int
    transposed: bool = False

    @property
    def step(self) -> int:
        """Diagonals between a program and the next."""
        return self.rows // self.columns

    @property
    def before(self) -> int:
        """Diagonals left of the one through the first program and its first tile."""
        if self.transposed:
            return self.plan.queries // self.columns - 1
        return (self.plan.queries // self.rows - 1) * self.step

    @property
    def count(self) -> int:
        if self.transposed:
            return self.before + (self.plan.keys // self.rows - 1) * self.step + 1
        return self.before + self.plan.keys // self.columns

    def of(self, program: Any, tile: Any) -> Any:
        """The diagonal on which a program meets a tile."""
        return self.before + (program * self.step - tile if self.transposed else tile - program * self.step)

    def part(self, windows: tuple, warpgroup: Any) -> Any:
        """What of a program's window the tile of one warpgroup, 64 rows, looks into; None without a table."""
        start = warpgroup * 64 if self.transposed else self.rows - 64 - warpgroup * 64
        return windows[0].at[pl.ds(start, 64 + self.columns)] if windows else None

    def windows(self, table: jax.Array) -> jax.Array:
        """`[N, count, rows + columns]` of a table `[N, T + S − 1]` whose first column is the smallest relative position."""
        length = (self.count + self.step) * self.columns
        blocks = jnp.pad(table, ((0, 0), (0, length - table.shape[1]))).reshape(table.shape[0], -1, self.columns)
        return jnp.concatenate([blocks[:, s : s + self.count] for s in range(self.step + 1)], axis=-1)


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


def scores(
    plan: Plan, tile: Tile, product: jax.Array, columns: Mapping, window: Any, dense: Any = None
) -> tuple[jax.Array, float]:
    """(s, c): the scores log2(e) · (scale · product + biases) are c · s.

    Without biases s is the product and c the scale, which the exponential then multiplies at no cost, as it does log2(e) where a `Dense`
    term is the only bias. window: the part of the table of `Toeplitz` terms that the tile looks into, or None. dense: the tile of the
    `Dense` term in shared memory, in base e, or None.
    """
    biases = [tile.of_keys(columns["bias"])] if "bias" in columns else []
    if window is not None:
        biases.append(mosaic.toeplitz(window, tile.shape, transposed=tile.transposed, interpret=plan.interpret))
    added = None if dense is None else mosaic.load(dense, plgpu.Layout.WGMMA).astype(jnp.float32)
    if added is not None and not biases:
        return product * plan.slope + added, math.log2(math.e)
    if added is not None:
        biases.append(added * math.log2(math.e))
    if biases or plan.scale <= 0:
        return functools.reduce(operator.add, biases, product * plan.scale), 1.0
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


def stays(plan: Plan, tile: Tile, rows: Mapping) -> jax.Array:
    """Where dropout leaves probabilities, and their cotangents; the bits are those of `kernels.attention.dropout`."""
    words = tile.of_queries(rows["first"]), tile.of_queries(rows["second"]), tile.key_index().astype(jnp.uint32)
    bits = mosaic_pairs.halves_of_pairs(shared_hash, words, transposed=tile.transposed, interpret=plan.interpret)
    return kept(bits, plan.rate)


def dropped(plan: Plan, tile: Tile, p: jax.Array, rows: Mapping) -> jax.Array:
    """Dropout but for the factor `plan.growth`, which sums are given where they end."""
    return p if plan.rate == 0 else jnp.where(stays(plan, tile, rows), p, mosaic.zeros(tile.shape))


def operands_of(given: Given, diagonals: Diagonals) -> list[jax.Array]:
    """What the kernels are given of masks, terms and dropout, in the order of `Operands`."""
    reach = []
    if "segments" in given.rows:
        own, other = given.rows["segments"], given.columns["segments"]
        own, other = (other, own) if diagonals.transposed else (own, other)
        reach = [segment_reach(own, diagonals.rows, other, diagonals.columns)]
    windows = map(diagonals.windows, given.lines.values())
    return [*given.rows.values(), *given.columns.values(), *windows, *given.dense.values(), *reach]


class Operands(NamedTuple):
    """What stands in a kernel for `Given`: rows and columns by name, and one or none of windows, matrix and reach."""

    rows: dict[str, Any]
    columns: dict[str, Any]
    windows: tuple
    matrices: tuple
    reach: tuple


def split_operands(given: Given, values: tuple) -> tuple[Operands, tuple]:
    """`operands_of`, or what stands for them in a kernel, and the rest."""
    rest = iter(values)

    def named(like: Mapping) -> dict[str, Any]:
        return {name: next(rest) for name in like}

    rows, columns = named(given.rows), named(given.columns)
    windows, matrices = (tuple(named(like).values()) for like in (given.lines, given.dense))
    reach = (next(rest),) if "segments" in given.rows else ()
    return Operands(rows, columns, windows, matrices, reach), tuple(rest)


def segment_reach(own: jax.Array, rows: int, other: jax.Array, columns: int) -> jax.Array:
    """int32 `[B, T / rows, 2]`: the first and the last tile of `columns` ids of `other` `[B, S]` that may share a segment with each
    `rows` ids of `own` `[B, T]`.

    Segments are compared as ranges, least to most, which is exact where they stand in order, as packed documents do, and takes too many
    tiles elsewhere.
    """

    def ranges(ids: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
        tiles = ids.reshape(ids.shape[0], -1, length)
        real = tiles > 0
        highest = jnp.iinfo(jnp.int32).max
        return jnp.min(jnp.where(real, tiles, highest), axis=2), jnp.max(jnp.where(real, tiles, 0), axis=2)

    (least, most), (low, high) = ranges(own, rows), ranges(other, columns)
    meet = (least[:, :, None] <= high[:, None, :]) & (most[:, :, None] >= low[:, None, :])
    last = meet.shape[2] - 1 - jnp.argmax(meet[:, :, ::-1], axis=2)
    return jnp.stack([jnp.argmax(meet, axis=2), last], axis=-1).astype(jnp.int32)


def within_reach(reach: tuple, b: Any, program: Any, low: Any, tiles: Any) -> tuple[Any, Any]:
    """Of `tiles` tiles from `low` on those that `segment_reach` leaves; at least one."""
    if not reach:
        return low, tiles
    first, last = (reach[0][b, program, end] for end in range(2))
    start = lax.clamp(low, first, low + tiles - 1)
    return start, lax.clamp(start, last, low + tiles - 1) - start + 1


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
        kv_head = h // plan.group

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

        def at(t):
            return b, low + t, kv_head

        over_tiles(
            step,
            compute,
            (tiles,),
            [
                (k_ref, tile_spec(block.columns, plan.width, at)),
                (v_ref, tile_spec(block.columns, plan.value_width, at)),
                vector_specs(column_refs, block.columns, lambda t: (b, low + t, h)),
                window_specs(tables, diagonals, lambda t: (h, diagonals.of(program, low + t))),
                _matrix_specs(matrices, block, lambda t: (b, h, program, low + t)),
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
        kv_head = h // plan.group

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

            def at(t):
                return b, low + t, kv_head

            over_tiles(
                step,
                compute,
                (tiles,),
                [
                    (k_ref, tile_spec(block.columns, plan.width, at)),
                    (v_ref, tile_spec(block.columns, plan.value_width, at)),
                    vector_specs(column_refs, block.columns, lambda t: (b, low + t, h)),
                    window_specs(tables, diagonals, lambda t: (h, diagonals.of(program, low + t))),
                    _matrix_specs(matrices, block, lambda t: (b, h, program, low + t)),
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
                _matrix_specs(matrices, block, lambda g, t: (b, kv_head * plan.group + g, program, low + t)),
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


def probabilities(
    plan: Plan, tile: Tile, product, rows: Mapping, columns: Mapping, window, dense: Any = None
) -> jax.Array:
    """p before dropout, from the products q kᵀ and the rows' lse."""
    s, factor = scores(plan, tile, product, columns, window, dense)
    # Masked behind the exponential: before it, a select would stand between a product and a sum that are one instruction.
    return visible(plan, tile, jnp.exp2(s * factor - tile.of_queries(rows["lse"])), 0.0, rows, columns)


def score_gradients(plan: Plan, tile: Tile, p: jax.Array, products: jax.Array, rows: Mapping) -> jax.Array:
    """dS, of the scores in base e, from the products dO vᵀ and the rows' delta."""
    delta = rows["delta"]
    if plan.rate == 0:
        return p * (products - tile.of_queries(delta))
    gone = tile.of_queries(-delta)
    return p * jnp.where(stays(plan, tile, rows), products * plan.growth + gone, gone)


def over_tiles(step, compute, grid, operands, warpgroups: int) -> None:
    """Runs `step` over `grid` within `compute`, which gives the first carry and takes the last.

    operands: (ref, spec), or dicts and tuples of them; `step` is given their tiles in the same form.
    """

    def is_pair(x):
        return isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], plgpu.BlockSpec)

    pairs, tree = jax.tree.flatten(operands, is_leaf=is_pair)

    def flat_step(indices, *tiles_and_carry):
        *tiles, carry = tiles_and_carry
        return step(indices, *jax.tree.unflatten(tree, tiles), carry)

    plgpu.emit_pipeline_warp_specialized(
        flat_step,
        grid=grid,
        in_specs=[spec for _, spec in pairs],
        max_concurrent_steps=STAGES,
        num_compute_wgs=warpgroups,
        memory_registers=40,
        wg_axis="warpgroup",
        compute_context=compute,
    )(*(ref for ref, _ in pairs))


def tile_spec(length: int, width: int, at) -> plgpu.BlockSpec:
    """Tiles `[length, width]` of `[B, length, heads, width]`; at(step) = (batch, tile, head)."""

    def where(*step):
        b, tile, head = at(*step)
        return b, tile, head, 0

    return plgpu.BlockSpec((None, length, None, width), where)


def vector_specs(refs: dict, length: int, at) -> dict:
    """Tiles `[length]` of `[B, length]` or `[B, heads, length]`."""

    def of_batch(*step):
        b, tile, _ = at(*step)
        return b, tile

    def of_head(*step):
        b, tile, head = at(*step)
        return b, head, tile

    return {
        name: (ref, plgpu.BlockSpec((None, length), of_batch))
        if len(ref.shape) == 2
        else (ref, plgpu.BlockSpec((None, None, length), of_head))
        for name, ref in refs.items()
    }


def window_specs(tables: tuple, diagonals: Diagonals, at) -> tuple:
    """Windows of `[N, diagonals, length]`; at(step) = (head, diagonal)."""
    length = diagonals.rows + diagonals.columns
    return tuple((ref, plgpu.BlockSpec((None, None, length), lambda *step: (*at(*step), 0))) for ref in tables)


def _matrix_specs(matrices: tuple, block: Blocks, at) -> tuple:
    """A program's tiles of `[1 or B, 1 or N, rows, columns]`; at(step) = (batch, head, program, tile)."""

    def spec(ref):
        def where(*step):
            b, h, program, tile = at(*step)
            return b if ref.shape[0] > 1 else 0, h if ref.shape[1] > 1 else 0, program, tile

        return plgpu.BlockSpec((None, None, block.program, block.columns), where)

    return tuple((ref, spec(ref)) for ref in matrices)


def own_rows(tiles: tuple, warpgroup: Any) -> Any:
    """Of a program's tile the 64 rows of one warpgroup; None without one."""
    return tiles[0].at[pl.ds(warpgroup * 64, 64)] if tiles else None


def fetch(copies: list[tuple[Any, Any]], barrier: Any) -> None:
    """Copies to shared memory; all have arrived when this returns."""
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, barrier)
    plgpu.barrier_wait(barrier)


def vectors(refs: dict, b, h, here, layout) -> dict[str, jax.Array]:
    """Of each vector in device memory the part of this tile, in registers."""
    return {
        name: mosaic.load(ref.at[b, here] if len(ref.shape) == 2 else ref.at[b, h, here], layout, optimized=False)
        for name, ref in refs.items()
    }


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
