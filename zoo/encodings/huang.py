"""Four ways for a relative position to enter the product of query and key, of Huang et al. 2020."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import Clip, Multiply, Relative, Table
from zoo.encodings.encoding import Dims, Encoded, Encoding, EncodingLayer, Facts, Site
from zoo.encodings.registration import registry


@dataclass(frozen=True)
class _Clipped(Encoding):
    """What the four have in common: tables of each layer's own, which all heads share, clipped at `limit`."""

    limit: int = 511

    def __post_init__(self):
        if self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1")

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"multiply"}))


@registry.register("huang_m1")
@dataclass(frozen=True)
class HuangM1(_Clipped):
    """A learned factor of the distance: logit = ⟨q_i, k_j⟩/√H · a[min(|r|, limit)].

    The factors `[limit + 1]` start at 1. They turn around where the product is negative, so there is no bias equal to them.
    Source: Huang et al. 2020 (arXiv:2009.13658), method 1. The initial values are ours.
    """

    def layer(self, dims: Dims) -> EncodingLayer:
        return Factors(dims, self.limit, signed=False, per_channel=False)


@registry.register("huang_m2")
@dataclass(frozen=True)
class HuangM2(_Clipped):
    """A learned factor of the relative position: logit = ⟨q_i, k_j⟩/√H · a[clip(r, −limit, limit)].

    As `huang_m1`, with the sign of r: `[2·limit + 1]` factors that start at 1.
    Source: Huang et al. 2020 (arXiv:2009.13658), method 2.
    """

    def layer(self, dims: Dims) -> EncodingLayer:
        return Factors(dims, self.limit, signed=True, per_channel=False)


@registry.register("huang_m3")
@dataclass(frozen=True)
class HuangM3(_Clipped):
    """A learned factor per channel: logit = Σ_c q_ic k_jc a[clip(r, −limit, limit), c] / √H, a `[2·limit + 1, H]` starting at 1.

    No fused kernel has it: the product of queries and keys is another one at every distance.
    Source: Huang et al. 2020 (arXiv:2009.13658), method 3.
    """

    def layer(self, dims: Dims) -> EncodingLayer:
        return Factors(dims, self.limit, signed=True, per_channel=True)


@registry.register("huang_m4")
@dataclass(frozen=True)
class HuangM4(_Clipped):
    """A learned vector that meets query and key: logit = ( ⟨q_i, k_j⟩ + ⟨q_i, a_r⟩ + ⟨k_j, a_r⟩ ) / √H, a_r = a[clip(r, −limit, limit)].

    The "relative_key_query" of Hugging Face's BERT, whose table is stored from the largest r to the smallest; `keys` false
    leaves the third part out, its "relative_key", which is Shaw's key side.
    Source: Huang et al. 2020 (arXiv:2009.13658), method 4.
    """

    keys: bool = True
    stddev: float = 0.02

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"relative"}))

    def layer(self, dims: Dims) -> EncodingLayer:
        return OneTable(self, dims)


class Factors(EncodingLayer):
    dims: Dims
    limit: int
    signed: bool
    per_channel: bool

    @nn.compact
    def __call__(self, shared: None, q: jax.Array, k: jax.Array, v: jax.Array, site: Site) -> Encoded:
        rows = 2 * self.limit + 1 if self.signed else self.limit + 1
        channels = (self.dims.head_dim,) if self.per_channel else ()
        factors = self.param("factors", nn.initializers.ones, (rows, *channels), jnp.float32)
        if not self.signed:
            factors = jnp.concatenate([factors[:0:-1], factors])
        values = jnp.broadcast_to(factors[None], (self.dims.num_heads, *factors.shape))
        return Encoded(q, k, v, terms=(Multiply(values),))


class OneTable(EncodingLayer):
    encoding: HuangM4
    dims: Dims

    @nn.compact
    def __call__(self, shared: None, q: jax.Array, k: jax.Array, v: jax.Array, site: Site) -> Encoded:
        rows, start = Clip(self.encoding.limit), nn.initializers.truncated_normal(self.encoding.stddev)
        values = self.param("table", start, (rows.num_rows, self.dims.head_dim), jnp.float32)
        table = Table(values[:, None], rows)
        return Encoded(q, k, v, terms=(Relative(query=table, key=table if self.encoding.keys else None),))
