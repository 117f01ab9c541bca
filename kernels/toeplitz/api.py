"""The public function: check, choose an implementation, run it."""

from __future__ import annotations

import logging
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.attention.api import platform_of
from kernels.toeplitz import reference, xla
from kernels.toeplitz.validate import check_arrays

Implementation = Literal["reference", "xla", "pallas_tpu"]

_IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu")
_log = logging.getLogger(__name__)


def toeplitz_matmul(
    t: Float[Array, "N R"],
    x: Float[Array, "B T N C"],
    *,
    causal: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N C"]:
    """The product of a Toeplitz matrix per head with a sequence, which is a convolution as long as the sequence.

    For token i of head n, with the relative position j − i, or, causal, the look-back i − j:

        y_i = Σ_j t[n, j − i] x_j                     causal:  y_i = Σ_{j ≤ i} t[n, i − j] x_j

    All channels of a head and all rows of the batch share its table; a table for every channel is N = D heads of C = 1. Computed
    in float32 (float64 for a float64 x), in O(T log T) and linear memory but for "reference"; differentiable in t and x, in
    reverse mode, once.

    Args:
      t: `[N, 2T − 1]` with j − i = 0 in column T − 1, so the past comes first; causal: `[N, T]`, column n for the token n back.
        Any floating dtype.
      x: `[B, T, N, C]`.
      implementation: a named one runs or raises; None takes "pallas_tpu" on TPUs where it computes this call, else "xla".

    Returns:
      `[B, T, N, C]` in the dtype of x.

    Raises:
      ValueError: a shape or dtype does not fit, or the named implementation does not exist or does not compute it.

    Sources: in attention Luo et al. 2021 (arXiv:2106.12566), in place of it Qin et al. 2023 (arXiv:2305.04749); both take the
    product by FFT. The errors of an FFT are those of the largest values: see `kernels/toeplitz/xla.py`.
    """
    check_arrays(t, x, causal)
    if implementation is None:
        implementation = best(platform_of(x), x.shape[1], x.dtype)
        _log.debug("toeplitz_matmul: %s for x %s", implementation, x.shape)
    return _named(implementation)(t, x, causal=causal)


def best(platform: str, length: int, dtype: jnp.dtype) -> Implementation:
    """What `implementation=None` takes."""
    if platform != "tpu":
        return "xla"
    from kernels.toeplitz import pallas_tpu

    return "xla" if pallas_tpu.refusals(length, dtype) else "pallas_tpu"


def _named(name: str):
    match name:
        case "reference":
            return reference.toeplitz_matmul
        case "xla":
            return xla.toeplitz_matmul
        case "pallas_tpu":
            from kernels.toeplitz import pallas_tpu  # Pallas takes a while to import

            return pallas_tpu.toeplitz_matmul
    reason = "this version has no such kernel" if name == "pallas_gpu" else "there is no such implementation"
    raise ValueError(
        f"toeplitz_matmul implementation {name!r}: {reason}; those that exist: {', '.join(_IMPLEMENTATIONS)}"
    )
