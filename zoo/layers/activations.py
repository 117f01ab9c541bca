"""Activation functions by name, for feed-forwards, pooler, convolution and heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

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


def _in_float32(
    activation: Callable[[jax.Array], jax.Array], of_narrow: Callable[[jax.Array], jax.Array] | None = None
) -> Callable[[jax.Array], jax.Array]:
    """`activation` in float32, `of_narrow` in its place where x is narrower; the backward pass keeps x as it is.

    The cube in the tanh form of GELU leaves float16 at |x| = 41, the square in its derivative at 256: then 0 · ∞ is NaN.
    """

    def form(x: jax.Array) -> tuple[Callable[[jax.Array], jax.Array], Any]:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return (activation if of_narrow is None or x.dtype == wide else of_narrow), wide

    def forward(x: jax.Array) -> jax.Array:
        function, wide = form(x)
        return function(x.astype(wide)).astype(x.dtype)

    def backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
        function, wide = form(x)
        # Times a one that the compiler does not know: else it finds what the forward pass has computed in float32, and keeps that.
        one = jax.lax.optimization_barrier(jnp.ones((), wide))
        derivative = jax.jvp(function, (x.astype(wide) * one,), (jnp.ones(x.shape, wide),))[1]
        return ((dy.astype(wide) * derivative).astype(x.dtype),)

    keeping_x = jax.custom_vjp(forward)
    keeping_x.defvjp(lambda x: (forward(x), x), backward)
    return keeping_x


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _gelu_by_erf(x: jax.Array) -> jax.Array:
    # A third of the arithmetic of erfc on a GPU. Below −4 it has no digits, of a result below 2⁻¹² of x.
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _in_float32(_gelu, _gelu_by_erf),
    "gelu_tanh": _in_float32(_gelu_tanh),
    "relu": jax.nn.relu,
    "silu": _in_float32(jax.nn.silu),
    "tanh": jnp.tanh,
}
