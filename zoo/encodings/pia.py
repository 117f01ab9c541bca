"""Position-infused attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.encodings.encoding import Dims, Encoded, Encoding, EncodingLayer, Facts, Place, Site
from zoo.encodings.registration import registry
from zoo.encodings.sinusoidal import Sinusoidal, sinusoids


@registry.register("pia")
@dataclass(frozen=True)
class Pia(Encoding):
    """Sinusoids added before the projections of queries and keys, in every layer, never to values:

        q_i = W_q (x_i + p_i),   k_j = W_k (x_j + p_j),   v_j = W_v x_j

    so that hidden states hold no position. Computed as W x + b plus W p, which is the same since W is linear, and so p is
    projected once for the whole batch. The sinusoids have the width of the model; fairseq's, which the authors' code uses, are
    the default, all sines before all cosines (see `sinusoidal` for the options), without its offset of two positions.
    Source: Press et al. 2020 (arXiv:2012.15832). No parameters.
    """

    base: float = 10000.0
    layout: Literal["interleaved", "halves"] = "halves"
    frequencies: Literal["paper", "tensor2tensor"] = "tensor2tensor"

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"transform"}))

    def shared(self, dims: Dims) -> nn.Module:
        return InfusedSinusoids(self, dims.model_dim)

    def layer(self, dims: Dims) -> EncodingLayer:
        return Infusion()


class InfusedSinusoids(nn.Module):
    """The sinusoids at the queries' positions and at those that keys are made from, float32 `[B or 1, T, D]`."""

    encoding: Pia
    width: int

    @nn.compact
    def __call__(self, place: Place) -> tuple[jax.Array, jax.Array]:
        e = self.encoding
        waves = Sinusoidal(e.base, e.layout, e.frequencies)
        queries = sinusoids(waves, place.queries.token, self.width)
        if place.sources is None:
            return queries, queries
        return queries, sinusoids(waves, place.sources.token, self.width)


class Infusion(EncodingLayer):
    @nn.compact
    def __call__(
        self, shared: tuple[jax.Array, jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, site: Site
    ) -> Encoded:
        of_queries, of_keys = (waves.astype(site.x.dtype) for waves in shared)
        nothing = jnp.zeros_like(of_keys[:1, :1])  # the projections' biases, which q and k have already
        q = q + (site.project.query(of_queries) - site.project.query(nothing))
        k = k + (site.project.key(of_keys) - site.project.key(nothing))
        return Encoded(q, k, v)
