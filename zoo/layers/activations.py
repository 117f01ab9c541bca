"""Activation functions by name, for feed-forwards, pooler, convolution and heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "tanh"]


def activate(name: Activation, x: jax.Array) -> jax.Array:
    """x through the activation of that name, elementwise, in the dtype of x.

    "gelu" is x Φ(x) by the error function, "gelu_tanh" its approximation by tanh (Hendrycks and Gimpel 2016, arXiv:1606.08415),
    "silu" x σ(x), "relu" max(0, x). The first three are computed in float32 where x is narrower, and the backward pass keeps the
    narrow x alone.
    """
    return _ACTIVATIONS[name](x)


def _in_float32(activation: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """The cube in the tanh form of GELU leaves float16 at |x| = 41, the square in its derivative at 256: then 0 · ∞ is NaN."""

    def narrow(x: jax.Array) -> jax.Array:
        return activation(x.astype(jnp.float32)).astype(x.dtype)

    def wide(x: jax.Array) -> jax.Array:
        return activation(x) if x.dtype == jnp.float32 else jax.checkpoint(narrow, prevent_cse=False)(x)

    return wide


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _in_float32(_gelu),
    "gelu_tanh": _in_float32(_gelu_tanh),
    "relu": jax.nn.relu,
    "silu": _in_float32(jax.nn.silu),
    "tanh": jnp.tanh,
}
