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


@registry.register("rope")
@dataclass(frozen=True)
class Rope(Encoding):
    """Rotary positions: each channel pair (a, b) of q and k turns by the angle p · θ_m, θ_m = theta^(−2m/R).

        a' = a cos(p θ_m) − b sin(p θ_m),   b' = b cos(p θ_m) + a sin(p θ_m)

    so that ⟨q'_i, k'_j⟩ depends on positions through r alone. R = fraction · H channels turn, the others pass.
    layout="half" pairs channel m with m + R/2 (GPT-NeoX, most checkpoints), "interleaved" pairs 2m with 2m + 1 (the
    paper, RoFormer, GPT-J); weights of one layout do not fit the other.
    Source: Su et al. 2021 (arXiv:2104.09864), eq. 34. Angles and rotation in float32.
    """

    theta: float = 10000.0
    layout: Literal["half", "interleaved"] = "half"
    fraction: float = 1.0

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"transform"}))

    def shared(self, dims: Dims) -> nn.Module:
        return RotaryTables(self, self.rotary_dim(dims.head_dim))

    def layer(self, dims: Dims) -> EncodingLayer:
        return RotaryLayer(self.layout)

    def rotary_dim(self, head_dim: int) -> int:
        """R, the channels that turn.

        Raises:
          ValueError: R is odd, zero or above the head width.
        """
        rotary = round(self.fraction * head_dim)
        if rotary % 2 or not 0 < rotary <= head_dim:
            raise ValueError(
                f"encoding 'rope': fraction={self.fraction} of a head width {head_dim} gives {rotary} rotary channels; "
                "they must be even, above 0 and at most the head width"
            )
        return rotary


class Rotation(NamedTuple):
    """cos and sin of the angles, float32 `[B or 1, T, R/2]`."""

    cos: jax.Array
    sin: jax.Array


class RotaryTables(nn.Module):
    encoding: Rope
    rotary_dim: int

    @nn.compact
    def __call__(self, place: Place) -> tuple[Rotation, Rotation]:
        queries = rotation(place.queries.token, self.encoding.theta, self.rotary_dim)
        if place.sources is None:
            return queries, queries
        return queries, rotation(place.sources.token, self.encoding.theta, self.rotary_dim)


class RotaryLayer(EncodingLayer):
    layout: str

    @nn.compact
    def __call__(
        self, shared: tuple[Rotation, Rotation], q: jax.Array, k: jax.Array, v: jax.Array, site: Site
    ) -> Encoded:
        return Encoded(rotate(q, shared[0], self.layout), rotate(k, shared[1], self.layout), v)


def rotation(positions: jax.Array, theta: float, rotary_dim: int) -> Rotation:
    """The angles' cos and sin for integer positions `[B or 1, T]`."""
    frequencies = jnp.asarray(theta ** (-2.0 * np.arange(rotary_dim // 2) / rotary_dim), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: jax.Array, by: Rotation, layout: str) -> jax.Array:
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
