"""How much arithmetic a step is, and how much the device could do: what MFU is made of.

Model FLOPs utilisation (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) = model FLOPs of a step / (seconds · peak),
where recomputation (remat) does not count: three times the matrix products of the forward pass, one for the forward and two
for the backward. The paper counts them by formula, 6 per parameter and token and 12·L·N·H·T for attention; here they
are counted in the traced program, so that every mixer, gathered heads and grouped keys count as what they are. Convolutions
and Fourier transforms are not counted, nor are elementwise operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.extend.core.primitives import cond_p, dot_general_p, scan_p

FORWARD_AND_BACKWARD = 3

# Dense bf16 (fp16) peak of one chip as `device.device_kind` names it, in FLOP/s, from the makers' data sheets. A name that
# contains several of these is the longest.
PEAKS = {
    "TPU v2": 45e12,
    "TPU v3": 123e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def forward_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """FLOPs of the matrix products in one call of `function`, 2·M·N·K each; `arguments` may be arrays or shapes.

    A loop counts as often as it runs where that is known (`scan`), else once; of branches the dearest counts.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def peak_flops(device_kind: str) -> float | None:
    """The peak of one device in bf16, FLOP/s; None where it is not known."""
    known = [name for name in PEAKS if name.lower() in device_kind.lower()]
    return PEAKS[max(known, key=len)] if known else None


def _count(jaxpr: Jaxpr) -> float:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> float:
    if equation.primitive is dot_general_p:
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    inner = [_count(body) for body in _bodies(equation.params)]
    if equation.primitive is cond_p:
        return max(inner)
    return sum(inner) * (equation.params["length"] if equation.primitive is scan_p else 1)


def _bodies(params: dict[str, Any]) -> list[Jaxpr]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, Jaxpr):
                found.append(item)
    return found
