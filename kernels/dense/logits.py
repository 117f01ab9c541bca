"""Scores of every entry of a vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.dense.product import over_rows


@jax.custom_vjp
def logits(x: Float[Array, "*B E"], table: Float[Array, "V E"]) -> Float[Array, "*B V"]:
    """x Eᵀ in float32, of operands in one dtype that may be narrower.

    Going back, the logits' gradient is rounded to that dtype before it multiplies, as that of every other product is. JAX's own multiplies
    it in float32, for which a GPU has a small part of its speed.
    """
    return _forward(x, table)[0]


def _forward(x: Array, table: Array) -> tuple[Array, tuple[Array, Array]]:
    y = jax.lax.dot_general(x, table, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return y, (x, table)


def _backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, table = saved
    dy = dy.astype(x.dtype)
    dx = jax.lax.dot_general(dy, table, (((dy.ndim - 1,), (0,)), ((), ())))
    return dx, over_rows(dy, x)


logits.defvjp(_forward, _backward)
