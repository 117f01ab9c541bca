"""The table of a Toeplitz product by look-back, the order in which it is the kernel of a convolution."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def by_look_back(t: Float[Array, "N R"], causal: bool) -> Float[Array, "N _"]:
    """`[N, 2T − 1]` from look-back n = i − j = −(T − 1) on: y_i = Σ_n h[n] x_{i−n}. Zero for n < 0 where causal."""
    return jnp.pad(t, ((0, 0), (t.shape[1] - 1, 0))) if causal else t[:, ::-1]
