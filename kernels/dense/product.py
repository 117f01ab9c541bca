"""x W, with a backward pass in the forms that XLA's CPU backend multiplies at full speed."""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Float


def product(
    x: Float[Array, "*B D"], w: Float[Array, "D F"], precision: jax.lax.PrecisionLike = None
) -> Float[Array, "*B F"]:
    """y = x W over the last axis of x, in one dtype; the gradients are dx = dy Wᵀ and dW = Σ xᵀ dy over all leading axes.

    JAX's own dW is Σ dyᵀ x, transposed; with two leading axes XLA's CPU backend transposes both operands in memory for it and
    multiplies at a quarter of the speed (4096 × 256 by 4096 × 1024: 54 ms of one core, this one 14, a forward product 14).
    """
    return _product(precision, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(precision, x: Array, w: Array) -> Array:
    return _forward(precision, x, w)[0]


def _forward(precision, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    # The product itself, not `_product`: a policy of rematerialisation that keeps products must see one here.
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), precision=precision), (x, w)


def _backward(precision, saved, dy: Array) -> tuple[Array, Array]:
    x, w = saved
    dx = jax.lax.dot_general(dy, w, (((dy.ndim - 1,), (1,)), ((), ())), precision=precision)
    return dx, over_rows(x, dy, precision)


def over_rows(
    x: Float[Array, "*B D"], y: Float[Array, "*B F"], precision: jax.lax.PrecisionLike = None
) -> Float[Array, "D F"]:
    """Σ xᵀ y over all leading axes."""
    return jax.lax.platform_dependent(
        x, y, cpu=functools.partial(_rows_merged, precision), default=functools.partial(_rows_apart, precision)
    )


def _rows_apart(precision, x: Array, dy: Array) -> Array:
    leading = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, dy, ((leading, leading), ((), ())), precision=precision)


def _rows_merged(precision, x: Array, dy: Array) -> Array:
    """The same with one axis of rows. Where two axes are sharded, merging them would gather one of them first."""
    return _rows_apart(precision, x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]))


_product.defvjp(_forward, _backward)
