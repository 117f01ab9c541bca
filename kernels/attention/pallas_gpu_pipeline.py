"""The pipeline over tiles: one warpgroup loads what the others compute with."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention import mosaic
from kernels.attention.pallas_gpu_plan import WARPGROUP_ROWS, Blocks, Diagonals, Plan

STAGES = 2  # tiles of the other side in shared memory at a time
LOADING_REGISTERS = 40  # of a thread of the warpgroup that loads


def over_tiles(step, compute, grid, operands, warpgroups: int) -> None:
    """Runs `step` over `grid` within `compute`, which gives the first carry and takes the last.

    operands: (ref, spec), or dicts and tuples of them; `step` is given their tiles in the same form.
    """
    pairs, tree = flat(operands)

    def flat_step(indices, *tiles_and_carry):
        *tiles, carry = tiles_and_carry
        return step(indices, *jax.tree.unflatten(tree, tiles), carry)

    plgpu.emit_pipeline_warp_specialized(
        flat_step,
        grid=grid,
        in_specs=[spec for _, spec in pairs],
        max_concurrent_steps=STAGES,
        num_compute_wgs=warpgroups,
        memory_registers=LOADING_REGISTERS,
        wg_axis="warpgroup",
        compute_context=compute,
    )(*(ref for ref, _ in pairs))


def flat(operands: Any) -> tuple[list[tuple[Any, plgpu.BlockSpec]], Any]:
    """The pairs (ref, spec) of dicts and sequences of them, and their structure."""

    def is_pair(x: Any) -> bool:
        return isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], plgpu.BlockSpec)

    return jax.tree.flatten(operands, is_leaf=is_pair)


def key_tiles(plan: Plan, columns: int, k_ref: Any, v_ref: Any, column_refs: dict, head: Any, at) -> list:
    """What a program of queries of a head meets of k, v and the keys' vectors; at(step) = (batch, tile)."""
    kv_head = head // plan.group

    def of_kv_head(*step):
        return *at(*step), kv_head

    return [
        (k_ref, tile_spec(columns, plan.width, of_kv_head)),
        (v_ref, tile_spec(columns, plan.value_width, of_kv_head)),
        vector_specs(column_refs, columns, lambda *step: (*at(*step), head)),
    ]


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


def window_specs(tables: dict, diagonals: Diagonals, at) -> dict:
    """Windows of `[N, diagonals, length]`; at(step) = (head, diagonal)."""
    spec = plgpu.BlockSpec((None, None, diagonals.rows + diagonals.columns), lambda *step: (*at(*step), 0))
    return {name: (ref, spec) for name, ref in tables.items()}


def matrix_specs(matrices: tuple, block: Blocks, at) -> tuple:
    """A program's tiles of `[1 or B, 1 or N, rows, columns]`; at(step) = (batch, head, program, tile)."""

    def spec(ref):
        def where(*step):
            b, h, program, tile = at(*step)
            return b if ref.shape[0] > 1 else 0, h if ref.shape[1] > 1 else 0, program, tile

        return plgpu.BlockSpec((None, None, block.program, block.columns), where)

    return tuple((ref, spec(ref)) for ref in matrices)


def own_rows(tiles: tuple, warpgroup: Any) -> Any:
    """Of a program's tile the rows of one warpgroup; None without one."""
    return tiles[0].at[pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)] if tiles else None


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
