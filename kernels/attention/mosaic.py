"""The one place that knows how Pallas' Mosaic GPU backend differs between versions of JAX and from its own interpreter.

Works on jax 0.10.2, 0.11 and 0.12. Kernels are written once; the interpreter lacks a matrix product whose left operand is in
registers, and Pallas a look-up in shared memory, sums over lanes and registers by their place. `add_product`, `toeplitz`,
`mosaic_diagonals` and `mosaic_pairs` have branches for them, the only differences between what tests interpret and what a GPU runs.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector

ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value for each row of a tile
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
_LOAD_INDEX = inspect.signature(plgpu.load).parameters.get("idx")  # gone in 0.12, optional in 0.11


def interpretable() -> bool:
    """Whether this JAX can interpret the kernels on a CPU (0.11 and later)."""
    return hasattr(plgpu, "InterpretGPUParams")


def kernel(
    body: Callable[..., None], *, out: Any, scratch: Any, grid: dict[str, int], warpgroups: int, interpret: bool
):
    """A kernel over the named `grid`, `warpgroups` of which compute (the axis "warpgroup") and one more loads."""
    how = {"interpret": plgpu.InterpretGPUParams()} if interpret else {}
    call = plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **how,
    )
    # XLA takes a custom call for cheap: where a loop over layers saves what a kernel gave, it runs the kernel a second time to
    # write that in place. The barrier stands between the two.
    return lambda *operands: lax.optimization_barrier(call(*operands))


def load(ref: Any, layout: Any, *, optimized: bool = True) -> jax.Array:
    """What `ref` holds, in registers."""
    where = ((),) if _LOAD_INDEX is not None and _LOAD_INDEX.default is inspect.Parameter.empty else ()
    return plgpu.load(ref, *where, layout=layout, optimized=optimized)


def product(a: Any, b: Any, shape: tuple[int, int]) -> jax.Array:
    """a · bᵀ in float32, both in shared memory: `[M, H]` and `[N, H]` to `shape` `[M, N]`."""

    def body(total):
        plgpu.wgmma(total, a, b.T)
        return total[...]

    return pl.run_scoped(body, plgpu.ACC(shape, jnp.float32))


def added_product(total: jax.Array, a: Any, b: Any, *, interpret: bool) -> jax.Array:
    """total + a · bᵀ, with `total` in registers and the others as in `product`."""
    if interpret:
        return total + product(a, b, total.shape)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b.T))(plgpu.ACC.init(total))


def add_product(
    total: jax.Array, a: jax.Array, b: Any, *, interpret: bool, meanwhile: Callable[[], None] = lambda: None
) -> jax.Array:
    """total + a · b, with `total` and `a` in registers and `b` in shared memory; `meanwhile` is done as the product is computed."""
    if interpret:
        meanwhile()
        return total + jnp.dot(a, b[...], preferred_element_type=jnp.float32)

    def body(ref):
        plgpu.wgmma(ref, a, b)
        meanwhile()

    return pl.run_state(body)(plgpu.ACC.init(total))


def toeplitz(window: Any, shape: tuple[int, int], *, transposed: bool, interpret: bool) -> jax.Array:
    """A tile of float32 that is constant along its diagonals, from `[M + N]` values in shared memory.

    Entry (y, x) is window[x − y + M − 1], transposed window[y − x + N − 1]: one value for each diagonal.
    """
    rows, columns = shape
    if interpret:
        y, x = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        return window[...][y - x + columns - 1 if transposed else x - y + rows - 1]

    def body(_, ref):
        layout = fragmented_array.WGMMA_LAYOUT
        index = ir.IndexType.get()
        # A thread holds two neighbours of every eighth column, in two rows eight apart: (y0 + 8 s, x0 + 8 g + e). Of these,
        # all with one g − s are the same pair of values, which is read once.
        y0, x0 = next(iter(layout.thread_idxs(shape)))
        first = arith.subi(y0, x0) if transposed else arith.subi(x0, y0)
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        pairs: dict[int, ir.Value] = {}
        for place in np.ndindex(registers.shape):
            g, s = steps(registers.shape, place)
            if g - s not in pairs:
                diagonal = 8 * (s - g) + columns - 1 if transposed else 8 * (g - s) + rows - 1
                neighbour = -1 if transposed else 1
                values = [
                    memref.load(ref, [arith.addi(first, arith.constant(index, diagonal + e * neighbour))])
                    for e in range(2)
                ]
                pairs[g - s] = vector.from_elements(pair, values)
            registers[place] = pairs[g - s]
        return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    result = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=plgpu.Layout.WGMMA)
    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)(body)(window)


def steps(shape: tuple[int, ...], place: tuple[int, ...]) -> tuple[int, int]:
    """(g, s) of a register: the layout's axes are those of one, but for the columns' and, after it, the two rows'."""
    (rows,) = (axis for axis in range(2, len(shape)) if shape[axis] == 2)
    if shape[0] != 1 or math.prod(shape) != shape[1] * 2:
        raise ValueError(f"the WGMMA layout of this JAX has registers {shape}, expected one tile of 64 rows")
    return place[1], place[rows]


def spread(vector: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    """A vector along `axis` of a tile, repeated over the other."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def index(shape: tuple[int, int], axis: int) -> jax.Array:
    """int32 0, 1, … along `axis` of a tile."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def zeros(shape: tuple[int, ...], layout: Any = plgpu.Layout.WGMMA, value: float = 0.0) -> jax.Array:
    """A float32 array in registers, all `value`."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
