"""Transformer-XL's relative attention: a projected sinusoid of the distance and two global biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import Clip, Relative, Table, Toeplitz
from zoo.encodings.encoding import Dims, Encoded, Encoding, EncodingLayer, Facts, Place, Site
from zoo.encodings.registration import registry
from zoo.encodings.sinusoidal import Sinusoidal, sinusoids


@registry.register("transformer_xl")
@dataclass(frozen=True)
class TransformerXL(Encoding):
    """Content meets content and position, each with a bias that stands for a query:

        logit = ( ⟨q_i + u, k_j⟩ + ⟨q_i + w, W_R s(i − j)⟩ ) / √H,   s(n) = [sin(n ω) | cos(n ω)],  ω_m = base^(−2m/D)

    W_R `[D, N·H]` is each layer's own; u and w `[N, H]` are shared by all layers, or each layer's own with `untie`. The
    sinusoid is fixed, so any length goes; `clamp` is the distance beyond which it stays the same (None: nowhere). Under a
    bidirectional mask n is negative for later keys, as in XLNet. Attention is handed q + u, the table W_R s, and
    ⟨w − u, W_R s⟩ as a Toeplitz bias, which is the same sum and leaves nothing to cache.
    Source: Dai et al. 2019 (arXiv:1901.02860), section 3.3, and its released code. The memory of earlier segments is not here.
    """

    base: float = 10000.0
    clamp: int | None = None
    untie: bool = False
    stddev: float = 0.02

    def __post_init__(self):
        if self.clamp is not None and self.clamp < 1:
            raise ValueError(f"clamp={self.clamp} must be at least 1")

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"transform", "relative", "toeplitz"}))

    def shared(self, dims: Dims) -> nn.Module:
        if dims.model_dim % 2:
            raise ValueError(
                f"encoding 'transformer_xl' pairs channels: the model width must be even, not {dims.model_dim}"
            )
        return Waves(self, dims)

    def layer(self, dims: Dims) -> EncodingLayer:
        return ProjectedWaves(self, dims)


class Biases(nn.Module):
    """u and w, float32 `[N, H]`."""

    dims: Dims
    stddev: float

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        shape, start = (self.dims.num_heads, self.dims.head_dim), nn.initializers.truncated_normal(self.stddev)
        return self.param("content", start, shape, jnp.float32), self.param("position", start, shape, jnp.float32)


class Shared(NamedTuple):
    """The sinusoid for r = −span … span, `[2·span + 1, D]`, and the biases, None where each layer has its own."""

    waves: jax.Array
    biases: tuple[jax.Array, jax.Array] | None


class Waves(nn.Module):
    encoding: TransformerXL
    dims: Dims

    @nn.compact
    def __call__(self, place: Place) -> Shared:
        e = self.encoding
        span = place.span if e.clamp is None else min(place.span, e.clamp)
        waves = sinusoids(Sinusoidal(e.base, "halves"), jnp.arange(span, -span - 1, -1), self.dims.model_dim)
        return Shared(waves, None if e.untie else Biases(self.dims, e.stddev, name="biases")())


class ProjectedWaves(EncodingLayer):
    encoding: TransformerXL
    dims: Dims

    @nn.compact
    def __call__(self, shared: Shared, q: jax.Array, k: jax.Array, v: jax.Array, site: Site) -> Encoded:
        e, dims = self.encoding, self.dims
        project = nn.Dense(
            dims.num_heads * dims.head_dim,
            use_bias=False,
            kernel_init=nn.initializers.truncated_normal(e.stddev),
            precision="highest",
            name="position",
        )
        table = project(shared.waves).reshape(-1, dims.num_heads, dims.head_dim)
        u, w = Biases(dims, e.stddev, name="biases")() if shared.biases is None else shared.biases
        bias = jnp.einsum("rnh,nh->nr", table, w - u, precision="highest") * dims.head_dim**-0.5
        rows = Clip(table.shape[0] // 2)
        terms = (Relative(query=Table(table, rows)), Toeplitz(bias))
        return Encoded(q + u.astype(q.dtype), k, v, terms=terms)
