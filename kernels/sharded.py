"""Kernels over several devices: each computes its part of the batch and of the heads, and nothing is gathered for it.

XLA knows nothing of what is inside a custom call, so it would gather the operands; and a TPU's compiler knows no rule that JAX could tell
it (`custom_partitioning` is not wired through there). So an operation is mapped over the mesh of its operands, which their types carry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

# The axes of a mesh over which rows of the batch and heads are divided; over all others every device has the whole arrays.
BATCH_AXES, HEAD_AXES = ("data", "fsdp"), ("tensor",)


def by_batch_and_heads(
    function: Callable[..., tuple[jax.Array, ...]], operands: Sequence[str], results: Sequence[str]
) -> Callable[..., tuple[jax.Array, ...]]:
    """`function` of arrays, a tuple of arrays, as an operation that is divided among the devices of its operands' mesh.

    Rows of the batch are divided over the mesh axes "data" and "fsdp", heads over "tensor", each where its number permits.

    Args:
      function: is called with the parts that one device has.
      operands, results: the axes of each array, letters between spaces: b batch, m key/value heads, n query heads; all others are whole
        on each device. Results without b are sums over the batch, and summed over the devices that divide it.
    """

    def operation(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        mesh = _mesh(arrays)
        if mesh is None:
            return function(*arrays)
        sizes = {
            letter: size
            for axes, x in zip(operands, arrays, strict=True)
            for letter, size in zip(axes.split(), x.shape, strict=True)
        }
        heads = math.gcd(sizes.get("m", 0), sizes.get("n", 0))
        rows, columns = _dividing(mesh, BATCH_AXES, sizes["b"]), _dividing(mesh, HEAD_AXES, heads)
        over = {"b": rows, "m": columns, "n": columns}

        def specs(arrays: Sequence[str]) -> tuple[PartitionSpec, ...]:
            return tuple(PartitionSpec(*(over.get(letter) for letter in axes.split())) for axes in arrays)

        def local(*parts: jax.Array) -> tuple[jax.Array, ...]:
            return tuple(
                x if rows is None or "b" in axes.split() else jax.lax.psum(x, rows)
                for axes, x in zip(results, function(*parts), strict=True)
            )

        return jax.shard_map(local, mesh=mesh, in_specs=specs(operands), out_specs=specs(results), check_vma=False)(
            *arrays
        )

    return operation


def _mesh(arrays: Sequence[jax.Array]) -> Any:
    """The mesh of several devices that the arrays lie on, None where there is none or the call is one device's part already."""
    for x in arrays:
        mesh = jax.typeof(x).sharding.mesh
        if not mesh.empty and mesh.size > 1:
            return None if AxisType.Manual in mesh.axis_types else mesh
    return None


def _dividing(mesh: Any, names: tuple[str, ...], count: int) -> tuple[str, ...] | None:
    """Those of the axes that the mesh has, None where they cannot divide so many."""
    names = tuple(name for name in names if name in mesh.shape)
    return names if names and count and count % math.prod(mesh.shape[name] for name in names) == 0 else None
