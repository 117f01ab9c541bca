"""A pipeline over tiles in phases, of which some bring more than others: `pallas_gpu_pipeline.over_tiles` brings the same at every step.

Each phase is a loop of its own on both sides, the one warpgroup that loads and those that compute. What is chosen by phase costs no
branch, and no copies of registers where branches meet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.attention.pallas_gpu_pipeline import LOADING_REGISTERS, STAGES, flat

_COMPUTING_REGISTERS = {1: 256, 2: 232}  # of a thread, by warpgroups: what 512 for each four threads leave, in eights


@dataclass(frozen=True)
class Phase:
    """`count` steps, the i-th at t = tile(i). `step(t, tiles, more, carry)` gives the carry; `more` is None without `whole`."""

    step: Callable[..., Any]
    tile: Callable[[Any], Any]
    count: Any
    whole: bool = False


def over_phases(phases: list[Phase], rounds: int, compute, operands, more, warpgroups: int) -> None:
    """Runs the phases in turn, and that `rounds` times, within `compute`, which is given run(carry) → carry.

    operands, more: (ref, spec), or dicts and lists of them, whose index maps are given (round, t). Steps are given their tiles in the
    same form; those of `more` are loaded in whole phases alone.
    """
    always, of_operands = flat(operands)
    sometimes, of_more = flat(more)

    def pipeline(always_tiles, sometimes_tiles, loaded, more_loaded, consumed):
        def walk(visit, state):
            def once(number, state):
                for phase in phases:
                    state = lax.fori_loop(0, phase.count, functools.partial(visit, phase, number), state)
                return state

            return once(jnp.int32(0), state) if rounds == 1 else lax.fori_loop(0, rounds, once, state)

        def load():
            plgpu.set_max_registers(LOADING_REGISTERS, action="decrease")

            def visit(phase, number, i, step):
                t = phase.tile(i)
                slot = lax.rem(step, STAGES)
                pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(consumed.at[slot]))
                for (ref, spec), tile in zip(always, always_tiles, strict=True):
                    plgpu.copy_gmem_to_smem(_part(ref, spec, number, t), tile.at[slot], loaded.at[slot])
                if phase.whole:
                    for (ref, spec), tile in zip(sometimes, sometimes_tiles, strict=True):
                        plgpu.copy_gmem_to_smem(_part(ref, spec, number, t), tile.at[slot], more_loaded.at[slot])
                return step + 1

            steps = walk(visit, jnp.int32(0))

            @pl.loop(lax.max(steps - STAGES, 0), steps)
            def _(step):  # no barrier is left behind that somebody still arrives at
                plgpu.barrier_wait(consumed.at[lax.rem(step, STAGES)])

        def run(carry):
            def visit(phase, _, i, state):
                step, carry = state
                slot = lax.rem(step, STAGES)
                plgpu.barrier_wait(loaded.at[slot])
                tiles = of_operands.unflatten([tile.at[slot] for tile in always_tiles])
                more = None
                if phase.whole:
                    plgpu.barrier_wait(more_loaded.at[slot])
                    more = of_more.unflatten([tile.at[slot] for tile in sometimes_tiles])
                carry = phase.step(phase.tile(i), tiles, more, carry)
                plgpu.barrier_arrive(consumed.at[slot])
                return step + 1, carry

            return walk(visit, (jnp.int32(0), carry))[1]

        def work():
            plgpu.set_max_registers(_COMPUTING_REGISTERS[warpgroups], action="increase")
            compute(run)

        lax.cond(lax.axis_index("warpgroup") == warpgroups, load, work)

    pl.run_scoped(
        pipeline,
        [_buffer(*pair) for pair in always],
        [_buffer(*pair) for pair in sometimes],
        plgpu.Barrier(num_arrivals=len(always), num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=len(sometimes), num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=warpgroups, num_barriers=STAGES),
        collective_axes="warpgroup",
    )


def _buffer(ref: Any, spec: plgpu.BlockSpec) -> Any:
    return plgpu.SMEM((STAGES, *(size for size in spec.block_shape if size is not None)), ref.dtype)


def _part(ref: Any, spec: plgpu.BlockSpec, *step: Any) -> Any:
    where = zip(spec.index_map(*step), spec.block_shape, strict=True)
    return ref.at[tuple(i if size is None else pl.ds(i * size, size) for i, size in where)]
