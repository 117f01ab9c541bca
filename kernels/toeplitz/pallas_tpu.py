"""The Toeplitz product for TPUs, by Pallas: forward and backward on the matrix unit, in memory linear in length.

By blocks of the matrix (`pallas_tpu_direct`) or by Fourier transforms (`pallas_tpu_dft`), whichever takes fewer bundles.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import mosaic_tpu
from kernels.sharded import by_batch_and_heads
from kernels.toeplitz import pallas_tpu_dft as dft
from kernels.toeplitz import pallas_tpu_direct as direct
from kernels.toeplitz.lags import by_look_back

# Axes, as `sharded` names them.
X, H = "b t n c", "n r"

Form = Literal["direct", "dft"]

# Bundles of a forward and a backward pass together, as compiled for v5e (docs/kernels.md), in bfloat16 and in float32: of a step
# of the direct form, fixed and for each row; of a pair of sequences by transforms, fixed and for each 128 points of the circle.
_STEP = {True: (216, 1.9), False: (1000, 12.0)}
_PAIR = {True: (100, 18.5), False: (500, 43.5)}
_FILL = 170  # to make and to sum up one block of the skewed table


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about a call; a form that is None is chosen for what one device has of it."""

    causal: bool
    form: Form | None
    interpret: mosaic_tpu.Interpret


def toeplitz_matmul(
    t: Float[Array, "N R"],
    x: Float[Array, "B T N C"],
    *,
    causal: bool,
    form: Form | None = None,
    interpret: mosaic_tpu.Interpret = False,
) -> Float[Array, "B T N C"]:
    """As `reference.toeplitz_matmul`, for the same arguments.

    float32 is multiplied in float32, other dtypes as float32. bfloat16 is multiplied by a table rounded to bfloat16 in the direct
    form, and transformed in pieces of 16 bits; sums are float32. `form` is chosen by count where it is None; `interpret` runs the
    kernels on a CPU. Tests set both.

    Raises:
      ValueError: a dtype or length that the kernels do not compute; says which, and what does.
    """
    reasons = refusals(x.shape[1], x.dtype)
    if reasons:
        raise ValueError(
            f"toeplitz_matmul implementation 'pallas_tpu': {'; '.join(reasons)}. implementation='xla' does it"
        )
    if x.size == 0:
        return x
    operand = x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)
    h = by_look_back(t.astype(jnp.float32), causal)
    return _core(Call(causal, form, interpret), operand, h).astype(x.dtype)


def refusals(length: int, dtype: jnp.dtype) -> list[str]:
    """Why the kernels do not compute this call; empty where they do."""
    reasons = []
    if dtype == jnp.float64:
        reasons.append("it computes in float32, not float64")
    if length > dft.LONGEST:
        reasons.append(f"sequences have at most {dft.LONGEST} tokens, not {length}")
    return reasons


def cheapest(length: int, rows: int, dtype: jnp.dtype, causal: bool) -> Form:
    """The form that takes fewer bundles for one head of B · C = `rows`: O(T²) with small constants against O(T √T)."""
    if length > direct.LONGEST:
        return "dft"
    by_blocks = direct.Plan(length, rows, "past" if causal else "all", dtype)
    by_transforms = dft.Plan(length, rows, dtype)
    fixed, each = _STEP[dtype == jnp.bfloat16]
    steps = by_blocks.row_blocks * by_blocks.steps * (fixed + each * by_blocks.row_block)
    fixed, each = _PAIR[dtype == jnp.bfloat16]
    pairs = by_transforms.pair_blocks * by_transforms.pairs + 1  # and the table
    return "direct" if steps + _FILL * len(by_blocks.lags) <= pairs * (fixed + each * by_transforms.inner) else "dft"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(call: Call, x: Array, h: Array) -> Array:
    return by_batch_and_heads(functools.partial(_product, call), (X, H), (X,))(x, h)[0]


def _forward(call: Call, x: Array, h: Array) -> tuple[Array, tuple[Array, Array]]:
    return _core(call, x, h), (x, h)


def _backward(call: Call, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    return by_batch_and_heads(functools.partial(_gradients, call), (X, H, X), (X, H))(*saved, dy)


_core.defvjp(_forward, _backward)


def _product(call: Call, x: Array, h: Array) -> tuple[Array]:
    rows = _tokens_last(x)
    if _form(call, x) == "direct":
        y = direct.convolve(_direct(call, x, "past"), rows, h)
    else:
        y = dft.convolve(_dft(call, x), rows, h)
    return (_tokens_first(y, x.shape),)


def _gradients(call: Call, x: Array, h: Array, dy: Array) -> tuple[Array, Array]:
    rows, cotangent = _tokens_last(x), _tokens_last(dy)
    if _form(call, x) == "direct":
        dx = direct.convolve(_direct(call, x, "future"), cotangent, h[:, ::-1])
        dh = direct.correlate(_direct(call, x, "past"), rows, cotangent)
    else:
        dx, dh = dft.gradients(_dft(call, x), rows, h, cotangent)
    return _tokens_first(dx, x.shape), dh


def _form(call: Call, x: Array) -> Form:
    return call.form or cheapest(x.shape[1], x.shape[0] * x.shape[3], x.dtype, call.causal)


def _direct(call: Call, x: Array, causal_reach: str) -> direct.Plan:
    reach = causal_reach if call.causal else "all"
    return direct.Plan(x.shape[1], x.shape[0] * x.shape[3], reach, jnp.dtype(x.dtype), call.interpret)


def _dft(call: Call, x: Array) -> dft.Plan:
    return dft.Plan(x.shape[1], x.shape[0] * x.shape[3], jnp.dtype(x.dtype), call.interpret)


def _tokens_last(x: Array) -> Array:
    """`[B, T, N, C]` → `[N, B · C, T]`."""
    batch, length, heads, channels = x.shape
    return jnp.transpose(x, (2, 0, 3, 1)).reshape(heads, batch * channels, length)


def _tokens_first(y: Array, shape: tuple[int, ...]) -> Array:
    batch, length, heads, channels = shape
    return jnp.transpose(y.reshape(heads, batch, channels, length), (1, 3, 0, 2))
