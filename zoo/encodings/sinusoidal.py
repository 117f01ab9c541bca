"""Fixed sinusoidal absolute positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import AttentionMask
from zoo.encodings.encoding import Dims, Encoding, Facts, Place
from zoo.encodings.registration import registry


@registry.register("sinusoidal")
@dataclass(frozen=True)
class Sinusoidal(Encoding):
    """Fixed sinusoids: x_i ← √E · x_i + PE(p_i), with PE holding sin(p ω_m) and cos(p ω_m).

    frequencies="paper": ω_m = base^(−2m/E); "tensor2tensor": ω_m = base^(−m/(E/2 − 1)), its last exactly 1/base.
    layout="interleaved": sin and cos of a frequency are neighbours; "halves": all sines, then all cosines.
    `scale_embeddings` is the paper's √E, without which sinusoids of size 1 drown embeddings of size 0.02.
    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.5. An odd E ends in one zero channel.
    """

    base: float = 10000.0
    layout: Literal["interleaved", "halves"] = "interleaved"
    frequencies: Literal["paper", "tensor2tensor"] = "paper"
    scale_embeddings: bool = True

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"embedding"}))

    def embedding(self, dims: Dims) -> nn.Module:
        return SinusoidalPositions(self)


class SinusoidalPositions(nn.Module):
    encoding: Sinusoidal

    @nn.compact
    def __call__(self, x: jax.Array, place: Place, mask: AttentionMask, cache: Any) -> tuple[jax.Array, Any]:
        width = x.shape[-1]
        waves = sinusoids(self.encoding, place.queries.token, width).astype(x.dtype)
        return (x * width**0.5 if self.encoding.scale_embeddings else x) + waves, cache


def sinusoids(encoding: Sinusoidal, positions: jax.Array, width: int) -> jax.Array:
    """PE(p) for integer positions `[...]`: float32 `[..., width]`."""
    half = width // 2
    step = np.arange(half) / (max(half - 1, 1) if encoding.frequencies == "tensor2tensor" else width / 2)
    omega = jnp.asarray(encoding.base**-step, jnp.float32)
    angle = positions[..., None].astype(jnp.float32) * omega
    if encoding.layout == "interleaved":
        waves = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*positions.shape, 2 * half)
    else:
        waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return jnp.pad(waves, [(0, 0)] * positions.ndim + [(0, width - 2 * half)])
