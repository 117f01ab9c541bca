"""The Toeplitz product for TPUs, by Pallas: forward and backward on the matrix unit, in memory linear in length."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import mosaic_tpu
from kernels.sharded import by_batch_and_heads
from kernels.toeplitz import pallas_tpu_direct as direct
from kernels.toeplitz.lags import by_look_back

# Axes, as `sharded` names them.
X, H = "b t n c", "n r"

_LONGEST = 8192


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about a call."""

    causal: bool
    interpret: mosaic_tpu.Interpret = False


def toeplitz_matmul(
    t: Float[Array, "N R"],
    x: Float[Array, "B T N C"],
    *,
    causal: bool,
    interpret: mosaic_tpu.Interpret = False,
) -> Float[Array, "B T N C"]:
    """As `reference.toeplitz_matmul`, for the same arguments; `interpret` runs the kernels on a CPU, which tests do.

    float32 is multiplied in float32, bfloat16 by a table rounded to bfloat16, with sums in float32; other dtypes as float32.

    Raises:
      ValueError: a dtype or length that the kernels do not compute; says which, and what does.
    """
    reasons = refusals(x.shape[1], x.dtype)
    if reasons:
        raise ValueError(
            f"toeplitz_matmul implementation 'pallas_tpu': {'; '.join(reasons)}. implementation='xla' does it"
        )
    operand = x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)
    h = by_look_back(t.astype(jnp.float32), causal)
    return _core(Call(causal, interpret), operand, h).astype(x.dtype)


def refusals(length: int, dtype: jnp.dtype) -> list[str]:
    """Why the kernels do not compute this call; empty where they do."""
    reasons = []
    if dtype == jnp.float64:
        reasons.append("it computes in float32, not float64")
    if length > _LONGEST:
        reasons.append(f"sequences have at most {_LONGEST} tokens, not {length}")
    return reasons


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(call: Call, x: Array, h: Array) -> Array:
    return _divided(call, functools.partial(_product, call), (x, h), (X, H), (X,))[0]


def _forward(call: Call, x: Array, h: Array) -> tuple[Array, tuple[Array, Array]]:
    return _core(call, x, h), (x, h)


def _backward(call: Call, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    return _divided(call, functools.partial(_gradients, call), (*saved, dy), (X, H, X), (X, H))


_core.defvjp(_forward, _backward)


def _product(call: Call, x: Array, h: Array) -> tuple[Array]:
    plan = _plan(call, x, "past" if call.causal else "all")
    return (_tokens_first(direct.convolve(plan, _tokens_last(x), h), x.shape),)


def _gradients(call: Call, x: Array, h: Array, dy: Array) -> tuple[Array, Array]:
    plan = _plan(call, x, "past" if call.causal else "all")
    transposed = _plan(call, x, "future" if call.causal else "all")
    given, cotangent = _tokens_last(x), _tokens_last(dy)
    dx = direct.convolve(transposed, cotangent, h[:, ::-1])
    return _tokens_first(dx, x.shape), direct.correlate(plan, given, cotangent)


def _plan(call: Call, x: Array, reach: str) -> direct.Plan:
    batch, length, _, channels = x.shape
    return direct.Plan(length, batch * channels, reach, jnp.dtype(x.dtype), call.interpret)


def _tokens_last(x: Array) -> Array:
    """`[B, T, N, C]` → `[N, B · C, T]`."""
    batch, length, heads, channels = x.shape
    return jnp.transpose(x, (2, 0, 3, 1)).reshape(heads, batch * channels, length)


def _tokens_first(y: Array, shape: tuple[int, ...]) -> Array:
    batch, length, heads, channels = shape
    return jnp.transpose(y.reshape(heads, batch, channels, length), (1, 3, 0, 2))


def _divided(call: Call, function, operands, axes, results):
    """function(*operands), each device with its part of batch and heads."""
    if call.interpret:  # on one device: an interpreted kernel has effects, which a divided operation may not have
        return function(*operands)
    return by_batch_and_heads(function, axes, results)(*operands)
