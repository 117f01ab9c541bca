"""What two rows of a tile share in one thread: elementwise integers that are computed once for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from kernels.attention.mosaic import steps


def halves_of_pairs(
    function: Callable[..., Any], operands: tuple[jax.Array, ...], *, transposed: bool, interpret: bool
) -> jax.Array:
    """A tile of uint32 from tiles of uint32 that are equal in two rows (`transposed`: columns) eight apart, r and r + 8 for r mod 16 < 8.

    function: elementwise, of operators alone. Row r has its result, row r + 8 the lower half of the same, shifted up: a thread holds both,
    so that it is computed once.
    """
    shape = operands[0].shape
    if interpret:
        place = lax.broadcasted_iota(jnp.uint32, shape, int(transposed))
        return function(*operands) << ((place & 8) * 2)

    def body(_, *arrays):
        layout = fragmented_array.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        halves: dict[tuple, _Words] = {}
        for place in np.ndindex(registers.shape):
            g, s = steps(registers.shape, place)
            pair, lower = ((g // 2, s), g % 2) if transposed else ((g, 0), s)
            if not lower:
                halves[pair] = function(*(_Words(array.registers[place]) for array in arrays))
            registers[place] = (halves[pair] << 16 if lower else halves[pair]).value
        return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=False)

    result = plgpu.ShapeDtypeStruct(shape, jnp.uint32, layout=plgpu.Layout.WGMMA)
    types = (plgpu.Layout.WGMMA,) * len(operands)
    return plgpu.inline_mgpu(arg_types=types, return_type=result)(body)(*operands)


@dataclass(frozen=True)
class _Words:
    """Unsigned integers of 32 bits in a register of MLIR, under Python's operators."""

    value: ir.Value

    def __xor__(self, other: _Words | int) -> _Words:
        return _Words(arith.xori(self.value, self._like(other)))

    def __add__(self, other: _Words | int) -> _Words:
        return _Words(arith.addi(self.value, self._like(other)))

    def __mul__(self, other: _Words | int) -> _Words:
        return _Words(arith.muli(self.value, self._like(other)))

    def __rshift__(self, bits: int) -> _Words:
        return _Words(arith.shrui(self.value, self._like(bits)))

    def __lshift__(self, bits: int) -> _Words:
        return _Words(arith.shli(self.value, self._like(bits)))

    def _like(self, other: _Words | int) -> ir.Value:
        if isinstance(other, _Words):
            return other.value
        kind = ir.IntegerType.get_signless(32)
        signed = int(other) - 2**32 if int(other) >= 2**31 else int(other)
        splat = ir.DenseElementsAttr.get_splat(self.value.type, ir.IntegerAttr.get(kind, signed))
        return arith.constant(self.value.type, splat)
