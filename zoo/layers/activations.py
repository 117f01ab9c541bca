"""Activation functions by name, for feed-forwards, pooler, convolution and heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

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


class _Form(NamedTuple):
    """An activation and its derivative, of float32."""

    value: Callable[[jax.Array], jax.Array]
    slope: Callable[[jax.Array], jax.Array]

    @classmethod
    def of(cls, value: Callable[[jax.Array], jax.Array]) -> _Form:
        return cls(value, lambda x: jax.jvp(value, (x,), (jnp.ones_like(x),))[1])


def _in_float32(form: _Form, of_narrow: _Form | None = None) -> Callable[[jax.Array], jax.Array]:
    """`form` in float32, `of_narrow` in its place where x is narrower; the backward pass keeps x as it is.

    The cube in the tanh form of GELU leaves float16 at |x| = 41, the square in its derivative at 256: then 0 · ∞ is NaN.
    """

    def chosen(x: jax.Array) -> tuple[_Form, Any]:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return (form if of_narrow is None or x.dtype == wide else of_narrow), wide

    def forward(x: jax.Array) -> jax.Array:
        form, wide = chosen(x)
        return form.value(x.astype(wide)).astype(x.dtype)

    def backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
        form, wide = chosen(x)
        # Times a one that the compiler does not know: else it finds what the forward pass has computed in float32, and keeps that.
        one = jax.lax.optimization_barrier(jnp.ones((), wide))
        return ((dy.astype(wide) * form.slope(x.astype(wide) * one)).astype(x.dtype),)

    keeping_x = jax.custom_vjp(forward)
    keeping_x.defvjp(lambda x: (forward(x), x), backward)
    return keeping_x


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _normal(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(Φ(x), √(2π) φ(x)), to 1e-7 (Abramowitz and Stegun 1964, 7.1.26).

    One exponential where erf and the density have one each: the gradient takes an H200 a tenth less time.
    """
    y = 1 + 0.3275911 * math.sqrt(0.5) * jnp.abs(x)
    t = jax.lax.rsqrt(y * y)  # 1 / y in one instruction
    polynomial = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    density = jnp.exp(-0.5 * x * x)
    tail = 0.5 * polynomial * density
    return jnp.where(x > 0, 1 - tail, tail), density


def _slope_of_gelu(x: jax.Array) -> jax.Array:
    below, density = _normal(x)
    return below + x * density * (1 / math.sqrt(2 * math.pi))


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": _in_float32(_Form.of(_gelu), _Form(lambda x: x * _normal(x)[0], _slope_of_gelu)),
    "gelu_tanh": _in_float32(_Form.of(_gelu_tanh)),
    "relu": jax.nn.relu,
    "silu": _in_float32(_Form.of(jax.nn.silu)),
    "tanh": jnp.tanh,
}
