"""KERPLE: kernelised relative positions, a learned decay of the distance per head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import Toeplitz
from zoo.encodings.encoding import AddTerms, Dims, Encoding, EncodingLayer, Facts, Place
from zoo.encodings.registration import registry

SMALLEST = 0.01
"""What the released code clamps both parameters to."""

Form = Literal["clamp", "softplus"]


@registry.register("kerple_log")
@dataclass(frozen=True)
class KerpleLog(Encoding):
    """A learned logarithmic penalty on distance: logit = ⟨q_i, k_j⟩/√H − r1_n ln(1 + r2_n |r|), r1, r2 > 0.

    Both parameters are one number per head, shared by all layers as in the released code, and start from U(0, 2) and
    U(0, 1). parametrisation="clamp" is that code's r = max(r, 0.01), here inside the forward pass, so that a head that has
    reached the bound stays there; "softplus" is r = 0.01 + ln(1 + e^w), which never loses its gradient.
    Source: Chi et al. 2022 (arXiv:2205.09921), the logarithmic kernel. Any length.
    """

    parametrisation: Form = "clamp"

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"toeplitz"}))

    def shared(self, dims: Dims) -> nn.Module:
        return KernelBias(dims.num_heads, self.parametrisation, starts=(2.0, 1.0), power=False)

    def layer(self, dims: Dims) -> EncodingLayer:
        return AddTerms()


@registry.register("kerple_power")
@dataclass(frozen=True)
class KerplePower(Encoding):
    """A learned power of the distance as penalty: logit = ⟨q_i, k_j⟩/√H − r1_n |r|^r2_n, r1 > 0, 0 < r2 ≤ 2.

    r2 = 1 is ALiBi with the slope r1. The parameters start from U(0, 1) and U(0, 2); the rest is as in `kerple_log`.
    Source: Chi et al. 2022 (arXiv:2205.09921), the power kernel. Any length.
    """

    parametrisation: Form = "clamp"

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"toeplitz"}))

    def shared(self, dims: Dims) -> nn.Module:
        return KernelBias(dims.num_heads, self.parametrisation, starts=(1.0, 2.0), power=True)

    def layer(self, dims: Dims) -> EncodingLayer:
        return AddTerms()


class KernelBias(nn.Module):
    """The bias of every head over r = −span … span; `starts` are the upper ends of the uniform first values of r1 and r2."""

    num_heads: int
    parametrisation: Form
    starts: tuple[float, float]
    power: bool

    @nn.compact
    def __call__(self, place: Place) -> tuple[Toeplitz]:
        r1, r2 = (self._positive(name, start) for name, start in zip(("r1", "r2"), self.starts, strict=True))
        # float32, so no int32 power: exact up to a distance of 2^24.
        distance = jnp.abs(jnp.arange(-place.span, place.span + 1)).astype(jnp.float32)
        if not self.power:
            return (Toeplitz(-r1[:, None] * jnp.log1p(r2[:, None] * distance)),)
        # d/dr2 of 0^r2 is 0 · ln 0: the distance 0 goes another way, in the backward pass too.
        grown = jnp.exp(jnp.minimum(r2, 2.0)[:, None] * jnp.log(jnp.maximum(distance, 1.0)))
        return (Toeplitz(-r1[:, None] * jnp.where(distance == 0, 0.0, grown)),)

    def _positive(self, name: str, start: float) -> jax.Array:
        def draw(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            first = jax.random.uniform(key, shape, dtype, maxval=start)
            return first if self.parametrisation == "clamp" else jnp.log(jnp.expm1(jnp.maximum(first, SMALLEST)))

        w = self.param(name, draw, (self.num_heads,), jnp.float32)
        return jnp.maximum(w, SMALLEST) if self.parametrisation == "clamp" else SMALLEST + jax.nn.softplus(w)
