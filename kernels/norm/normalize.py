"""Layer and root-mean-square normalisation, with a backward pass that keeps the narrow input."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def normalize(
    x: Float[Array, "*B D"],
    scale: Float[Array, " D"] | None,
    bias: Float[Array, " D"] | None,
    *,
    epsilon: float,
    centered: bool,
    dtype: Any,
) -> Float[Array, "*B D"]:
    """y = (x − μ) / √(σ² + epsilon) · scale + bias over the last axis, in float32 (float64 for such x), given in `dtype`.

    μ is the mean and σ² the biased variance about it (Ba et al. 2016, arXiv:1607.06450), or with `centered=False` μ = 0 and σ² the mean
    of squares (Zhang and Sennrich 2019, arXiv:1910.07467). None leaves scale or bias out.

    The backward pass has x as it was given, and two numbers for each row. JAX's own keeps four arrays of the size of x in float32, which in a
    loop over layers were most of what a training step in bfloat16 wrote.
    """
    return _normalize(epsilon, centered, jnp.dtype(dtype), x, scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _normalize(epsilon: float, centered: bool, dtype: Any, x, scale, bias) -> Array:
    return _forward(epsilon, centered, dtype, x, scale, bias)[0]


def _forward(epsilon: float, centered: bool, dtype: Any, x, scale, bias):
    wide = _wide(x)
    # The fast form E[x²] − E[x]² loses all digits where the mean is large against the deviation.
    mean = jnp.mean(wide, axis=-1, keepdims=True) if centered else None
    away = wide - mean if centered else wide
    inverse = jax.lax.rsqrt(jnp.mean(away * away, axis=-1, keepdims=True) + epsilon)
    y = away * (inverse if scale is None else inverse * _along(scale, x))
    if bias is not None:
        y = y + _along(bias, x)
    return y.astype(dtype), (x, scale, bias, mean, inverse)


def _backward(epsilon: float, centered: bool, dtype: Any, saved, dy: Array):
    x, scale, bias, mean, inverse = saved
    # Else XLA computes them anew from x where it likes, and writes normalised rows in float32 for the sum over rows to read.
    mean, inverse = jax.lax.optimization_barrier((mean, inverse))
    normal = (_wide(x) - mean if centered else _wide(x)) * inverse
    dy = dy.astype(normal.dtype)
    leading = tuple(range(x.ndim - 1))
    d_scale = None if scale is None else jnp.sum(dy * normal, axis=leading).astype(scale.dtype)
    d_bias = None if bias is None else jnp.sum(dy, axis=leading).astype(bias.dtype)
    d_normal = dy if scale is None else dy * _along(scale, x)
    dx = d_normal - normal * jnp.mean(d_normal * normal, axis=-1, keepdims=True)
    if centered:
        dx = dx - jnp.mean(d_normal, axis=-1, keepdims=True)
    return (dx * inverse).astype(x.dtype), d_scale, d_bias


_normalize.defvjp(_forward, _backward)


def _wide(x: Array) -> Array:
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _along(vector: Array, x: Array) -> Array:
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))
