"""Products of tiles on the matrix unit of a TPU, summed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a · b in float32."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def product_of_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """a · bᵀ in float32."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
