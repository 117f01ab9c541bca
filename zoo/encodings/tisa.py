"""TISA: a learned sum of bumps over the relative position, for each head of each layer."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import Toeplitz
from zoo.encodings.encoding import Dims, Encoded, Encoding, EncodingLayer, Facts, Site
from zoo.encodings.registration import registry


@registry.register("tisa")
@dataclass(frozen=True)
class Tisa(Encoding):
    """Translation-invariant self-attention: a few Gaussian bumps over the relative position, of any height, width and place:

        logit = ⟨q_i, k_j⟩/√H + Σ_s a_ns exp(−|b_ns| (r − c_ns)²)

    `bumps` = S of them per head, each layer with its own: 3 N S L numbers in all. a, b and c start from normal distributions of
    deviation 1, 1 and 5; the paper gives none. Far from all bumps the term is zero, so any length.
    Source: Wennberg and Henter 2021 (arXiv:2106.01950), its scoring function for positions; there in ALBERT, in the place of all
    position embeddings.
    """

    bumps: int = 5

    def __post_init__(self):
        if self.bumps < 1:
            raise ValueError(f"bumps={self.bumps}; it must be at least 1")

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"toeplitz"}))

    def layer(self, dims: Dims) -> EncodingLayer:
        return Bumps(self.bumps, dims.num_heads)


class Bumps(EncodingLayer):
    bumps: int
    num_heads: int

    @nn.compact
    def __call__(self, shared: None, q: jax.Array, k: jax.Array, v: jax.Array, site: Site) -> Encoded:
        def param(name: str, deviation: float) -> jax.Array:
            draw = nn.initializers.normal(deviation)
            return self.param(name, draw, (self.num_heads, self.bumps), jnp.float32)[:, None]

        height, sharpness, centre = param("height", 1.0), param("sharpness", 1.0), param("centre", 5.0)
        span = site.place.span
        r = jnp.arange(-span, span + 1).astype(jnp.float32)[None, :, None]
        values = (height * jnp.exp(-jnp.abs(sharpness) * (r - centre) ** 2)).sum(-1)
        return Encoded(q, k, v, terms=(Toeplitz(values),))
