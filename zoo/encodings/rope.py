"""Rotary position embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.encodings.encoding import Dims, Encoded, Encoding, EncodingLayer, Facts, Place, Site
from zoo.encodings.registration import registry
from zoo.encodings.rope_scaling import Scaling, plain_frequencies

Layout = Literal["half", "interleaved"]
_STRIDE = 1024


@registry.register("rope")
@dataclass(frozen=True)
class Rope(Encoding):
    """Rotary positions: each channel pair (a, b) of q and k turns by the angle p · θ_m, θ_m = theta^(−2m/R).

        a' = a cos(p θ_m) − b sin(p θ_m),   b' = b cos(p θ_m) + a sin(p θ_m)

    so that ⟨q'_i, k'_j⟩ depends on positions through r alone. R = fraction · H channels turn, the others pass.
    layout="half" pairs channel m with m + R/2 (GPT-NeoX, most checkpoints), "interleaved" pairs 2m with 2m + 1 (the
    paper, RoFormer, GPT-J); weights of one layout do not fit the other. `scaling` changes the frequencies to read further
    than the model was trained (`zoo.encodings.rope_scaling`): linear, ntk, dynamic_ntk, yarn or llama3.
    Source: Su et al. 2021 (arXiv:2104.09864), eq. 34. Angles and rotation in float32.
    """

    theta: float = 10000.0
    layout: Layout = "half"
    fraction: float = 1.0
    scaling: Scaling | None = None

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"transform"}))

    def shared(self, dims: Dims) -> nn.Module:
        return RotaryTables(self, rotary_dim("rope", self.fraction, dims.head_dim))

    def layer(self, dims: Dims) -> EncodingLayer:
        return RotaryLayer(self.layout)


def rotary_dim(name: str, fraction: float, head_dim: int) -> int:
    """R, the channels that turn.

    Raises:
      ValueError: R is odd, zero or above the head width.
    """
    rotary = round(fraction * head_dim)
    if rotary % 2 or not 0 < rotary <= head_dim:
        raise ValueError(
            f"encoding {name!r}: fraction={fraction} of a head width {head_dim} gives {rotary} rotary channels; "
            "they must be even, above 0 and at most the head width; use another head_dim, or alibi, kerple_log or t5, "
            "which take any"
        )
    return rotary


class Rotation(NamedTuple):
    """cos and sin of the angles, float32 `[B or 1, T, R/2]`."""

    cos: jax.Array
    sin: jax.Array


class RotaryTables(nn.Module):
    """The rotations of the queries' tokens and of those that keys are made from."""

    encoding: Rope
    rotary_dim: int

    @nn.compact
    def __call__(self, place: Place) -> tuple[Rotation, Rotation]:
        scaling, theta = self.encoding.scaling, self.encoding.theta
        if scaling is None:
            frequencies, temperature = plain_frequencies(theta, self.rotary_dim), 1.0
        else:
            frequencies = scaling.frequencies(theta, self.rotary_dim, place.span + 1)
            temperature = scaling.temperature
        queries = rotation(place.queries.token, frequencies, temperature)
        if place.sources is None:
            return queries, queries
        return queries, rotation(place.sources.token, frequencies, temperature)


class RotaryLayer(EncodingLayer):
    layout: Layout

    @nn.compact
    def __call__(
        self, shared: tuple[Rotation, Rotation], q: jax.Array, k: jax.Array, v: jax.Array, site: Site
    ) -> Encoded:
        return Encoded(rotate(q, shared[0], self.layout), rotate(k, shared[1], self.layout), v)


def angles(positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """p · θ_m up to whole turns, float32 `[..., R/2]`, for integer positions `[...]` and float64 frequencies `[R/2]`.

    Positions are split by 1024, and the angle of 1024 tokens is brought below a turn on the host: at a position of 100,000
    the angle is then off by 1e-4 where one float32 product is off by 5e-3, and by 5e-4 instead of 5e-2 at a million.
    """
    per_stride = np.remainder(_STRIDE * frequencies, 2 * np.pi)
    strides, rest = positions // _STRIDE, positions % _STRIDE
    return strides[..., None].astype(jnp.float32) * per_stride.astype(np.float32) + rest[..., None].astype(
        jnp.float32
    ) * frequencies.astype(np.float32)


def rotation(positions: jax.Array, frequencies: np.ndarray, temperature: float = 1.0) -> Rotation:
    """The angles' cos and sin, times `temperature`, for integer positions `[B or 1, T]`."""
    turned = angles(positions, frequencies)
    return Rotation(temperature * jnp.cos(turned), temperature * jnp.sin(turned))


def rotate(x: jax.Array, by: Rotation, layout: Layout) -> jax.Array:
    """x `[B, T, N, H]` with its first R channels turned, in x's dtype; the rotation itself in float32."""
    half = by.cos.shape[-1]
    turning, passing = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    cos, sin = by.cos[:, :, None, :], by.sin[:, :, None, :]
    if layout == "interleaved":
        pairs = turning.reshape(*turning.shape[:-1], half, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turning.shape)
    else:
        a, b = turning[..., :half], turning[..., half:]
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), passing], axis=-1)
