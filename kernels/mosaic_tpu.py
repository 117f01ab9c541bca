"""The one place that knows how Pallas' TPU backend differs between versions of JAX (0.10.2 to 0.12).

Kernels are named, so that the compiler's dumps and a profile say which one they show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Interpret = (
    bool | pltpu.InterpretParams
)  # with parameters also what plain interpretation hides is found: an output revisited too late


def kernel(
    body: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    sequential: int,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    shapes: Sequence[Any],
    scratch: Sequence[Any] = (),
    interpret: Interpret = False,
    vmem: int | None = None,
) -> Callable[..., Any]:
    """`body` over `grid`, whose last `sequential` axes run in order on one core; the others may be divided among cores.

    inputs, outputs: the `pl.BlockSpec` of each operand and result at a grid index, in the tree of its arrays. shapes: the results.
    scratch: memory that lasts over the sequential axes. vmem: bytes of on-chip memory the kernel may take, None for what the compiler allows.
    """
    semantics = ("parallel",) * (len(grid) - sequential) + ("arbitrary",) * sequential
    return pl.pallas_call(
        body,
        name=name,
        grid=grid,
        in_specs=list(inputs),
        out_specs=list(outputs),
        out_shape=list(shapes),
        scratch_shapes=list(scratch),
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem),
        interpret=interpret,
    )
