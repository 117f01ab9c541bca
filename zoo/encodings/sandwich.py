"""Sandwich: the inner product of sinusoids as a bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from kernels.attention import Toeplitz
from zoo.encodings.encoding import AddTerms, Dims, Encoding, EncodingLayer, Facts, Place
from zoo.encodings.registration import registry


@registry.register("sandwich")
@dataclass(frozen=True)
class Sandwich(Encoding):
    """The inner product of two sinusoids as a bias: logit = ⟨q_i, k_j⟩/√H + (1/c_n) Σ_m cos(r ω_m).

    ω_m = base^(−2m/width), width/2 frequencies whatever the head width, and c_n = 8n/N for head n = 1 … N. No parameters,
    any length, even in r. The paper's sum begins at m = 1, its listing at 0: `first_index` chooses.
    Source: Chi et al. 2023 (arXiv:2212.10356).
    """

    width: int = 128
    base: float = 10000.0
    first_index: Literal[0, 1] = 0

    def __post_init__(self):
        if self.width < 2 or self.width % 2:
            raise ValueError(f"width={self.width} counts sines and cosines: it must be even and at least 2")

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"toeplitz"}))

    def shared(self, dims: Dims) -> nn.Module:
        return SinusoidBias(self, dims.num_heads)

    def layer(self, dims: Dims) -> EncodingLayer:
        return AddTerms()


class SinusoidBias(nn.Module):
    encoding: Sandwich
    num_heads: int

    @nn.compact
    def __call__(self, place: Place) -> tuple[Toeplitz]:
        return (Toeplitz(jnp.asarray(sinusoid_bias(self.encoding, self.num_heads, place.span))),)


def sinusoid_bias(encoding: Sandwich, num_heads: int, span: int) -> np.ndarray:
    """The bias over r = −span … span, float32 `[N, 2·span + 1]`; angles in float64."""
    index = np.arange(encoding.width // 2) + encoding.first_index
    omega = encoding.base ** (-2.0 * index / encoding.width)
    distance = np.arange(span + 1.0)
    # Frequency by frequency: distances × frequencies would be 50 MB at a span of 100,000.
    total = sum(np.cos(distance * w) for w in omega)
    both = np.concatenate([total[:0:-1], total])
    return (both / (8.0 * np.arange(1, num_heads + 1) / num_heads)[:, None]).astype(np.float32)
