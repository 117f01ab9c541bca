"""The table of a Toeplitz product by look-back, the order in which it is the kernel of a convolution."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def by_look_back(t: Float[Array, "N R"], causal: bool) -> Float[Array, "N _"]:
    """`[N, 2T − 1]` from look-back n = i − j = −(T − 1) on: y_i = Σ_n h[n] x_{i−n}. Zero for n < 0 where causal."""
    return jnp.pad(t, ((0, 0), (t.shape[1] - 1, 0))) if causal else t[:, ::-1]


def on_circle(h: Float[Array, "N _"], size: int) -> Float[Array, "N {size}"]:
    """Look-back n at n mod `size`, which is 2T − 1 or more."""
    length = (h.shape[1] + 1) // 2
    gap = jnp.zeros((h.shape[0], size - h.shape[1]), h.dtype)
    return jnp.concatenate([h[:, length - 1 :], gap, h[:, : length - 1]], axis=1)


def from_circle(g: Float[Array, "N size"], length: int) -> Float[Array, "N _"]:
    """The look-backs of `length` tokens out of a circle, again from −(T − 1) on: the transpose of `on_circle`."""
    return jnp.concatenate([g[:, g.shape[1] - length + 1 :], g[:, :length]], axis=1)
