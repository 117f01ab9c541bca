"""The Toeplitz product as its definition: a dense matrix, differentiated by JAX. Every other implementation is tested against it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels.attention.reference import accumulator


def toeplitz_matmul(t: Float[Array, "N R"], x: Float[Array, "B T N C"], *, causal: bool) -> Float[Array, "B T N C"]:
    """y_i = Σ_j t[j − i] x_j; sizes as in the public function."""
    wide = accumulator(x.dtype)
    matrix = toeplitz_matrix(t.astype(wide), x.shape[1], causal)
    return jnp.einsum("nij,bjnc->binc", matrix, x.astype(wide), precision="highest").astype(x.dtype)


def toeplitz_matrix(t: Float[Array, "N R"], length: int, causal: bool) -> Float[Array, "N T T"]:
    """Entry (i, j) of head n is t[n, j − i], or, causal, t[n, i − j] on and below the diagonal and zero above it."""
    r = np.arange(length)[None, :] - np.arange(length)[:, None]
    if not causal:
        return t[:, r + length - 1]
    return jnp.where(r[None] <= 0, t[:, np.maximum(-r, 0)], jnp.zeros((), t.dtype))
