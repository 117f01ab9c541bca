"""The Toeplitz product by real FFT, for any backend: O(T log T), memory linear in length.

It is a circular convolution of at least 2T − 1 points, which leaves room for all look-backs of either sign. With the spectra
H, X and dY of kernel, input and cotangent,

    y = irfft(H X),   dx = irfft(H̄ dY),   dh = irfft(Σ_{b,c} X̄ dY),

so the gradients cost three transforms of the size of x and two of the size of t. The backward pass keeps x and t as they came and
transforms x again: the spectra that JAX would keep are twice as large in float32 and four times in bfloat16.

An FFT mixes everything, so the error of every entry is that of the largest: measured in float32 (on a CPU, normal t and x), at most
3.5e-7 of the largest entry of y, and 2e-7 (256 tokens) to 3.3e-7 (2^20) in root mean square. A small entry beside large ones, as under
a table that decays, may have no right digit of its own; those of `reference` have all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import scipy.fft
from jaxtyping import Array, Float

from kernels.attention.reference import accumulator
from kernels.sharded import by_batch_and_heads
from kernels.toeplitz.lags import by_look_back, from_circle, on_circle

# Axes, as `sharded` names them.
X, H = "b t n c", "n r"


def toeplitz_matmul(t: Float[Array, "N R"], x: Float[Array, "B T N C"], *, causal: bool) -> Float[Array, "B T N C"]:
    """As `reference.toeplitz_matmul`, for the same arguments; computed in float32, in float64 for a float64 x."""
    return _core(x, by_look_back(t, causal))


@jax.custom_vjp
def _core(x: Array, h: Array) -> Array:
    return _divided_product(x, h)[0]


def _forward(x: Array, h: Array) -> tuple[Array, tuple[Array, Array]]:
    return _core(x, h), (x, h)


def _backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    return _divided_gradients(*saved, dy)


_core.defvjp(_forward, _backward)


def smooth_size(least: int) -> int:
    """The smallest even size of factors 2, 3 and 5 that is `least` or more."""
    return 2 * scipy.fft.next_fast_len(-(-least // 2), real=True)


def power_of_two(least: int) -> int:
    """XLA on a TPU transforms 16,200 points by 70 times the arithmetic of 16,384 (its own count, jax 0.10.2)."""
    return max(2, 1 << (least - 1).bit_length())


def _product(size_of: Callable[[int], int], x: Array, h: Array) -> tuple[Array]:
    transform = _Transform(x.shape[1], size_of, accumulator(x.dtype))
    return (transform.back(transform.of_table(h) * transform.of_tokens(x)).astype(x.dtype),)


def _gradients(size_of: Callable[[int], int], x: Array, h: Array, dy: Array) -> tuple[Array, Array]:
    transform = _Transform(x.shape[1], size_of, accumulator(x.dtype))
    of_dy = transform.of_tokens(dy)
    dx = transform.back(jnp.conj(transform.of_table(h)) * of_dy)
    dh = transform.table_back(jnp.sum(jnp.conj(transform.of_tokens(x)) * of_dy, axis=(0, 2)))
    return dx.astype(x.dtype), dh.astype(h.dtype)


def _at_a_fast_size(function: Callable[..., tuple[Array, ...]]) -> Callable[..., tuple[Array, ...]]:
    return lambda *arrays: jax.lax.platform_dependent(
        *arrays, tpu=functools.partial(function, power_of_two), default=functools.partial(function, smooth_size)
    )


# XLA by itself would gather batch and heads for a transform.
_divided_product = by_batch_and_heads(_at_a_fast_size(_product), (X, H), (X,))
_divided_gradients = by_batch_and_heads(_at_a_fast_size(_gradients), (X, H, X), (X, H))


class _Transform:
    """Real transforms of sequences of `length` tokens, padded to a size that is fast; look-back n stands at n mod size."""

    def __init__(self, length: int, size_of: Callable[[int], int], dtype: jnp.dtype):
        self.length, self.dtype = length, dtype
        self.size = size_of(2 * length - 1)
        self.transform = functools.partial(jnp.fft.rfft, n=self.size, axis=-1)
        self.inverse = functools.partial(jnp.fft.irfft, n=self.size, axis=-1)

    def of_tokens(self, x: Array) -> Array:
        """`[B, T, N, C]` → its spectrum `[B, N, C, F]`."""
        return self.transform(jnp.moveaxis(x, 1, 3).astype(self.dtype))

    def of_table(self, h: Array) -> Array:
        """`[N, 2T − 1]` → its spectrum `[1, N, 1, F]`."""
        return self.transform(on_circle(h.astype(self.dtype), self.size))[None, :, None]

    def back(self, spectrum: Array) -> Array:
        return jnp.moveaxis(self.inverse(spectrum)[..., : self.length], 3, 1)

    def table_back(self, spectrum: Array) -> Array:
        return from_circle(self.inverse(spectrum), self.length)
