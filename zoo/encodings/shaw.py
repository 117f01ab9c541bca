"""Shaw's relative position representations."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import Clip, Relative, Table
from zoo.encodings.encoding import Dims, Encoded, Encoding, EncodingLayer, Facts, Site
from zoo.encodings.registration import registry


@registry.register("shaw")
@dataclass(frozen=True)
class Shaw(Encoding):
    """A learned vector per clipped relative position, on the key and on the value side:

        logit = ⟨q_i, k_j + A[ρ(r)]⟩ / √H,   out_i = Σ_j p_ij (v_j + E[ρ(r)]),   ρ(r) = clip(r, −limit, limit) + limit

    A and E are `[2·limit + 1, H]`, each layer's own; all heads share them, as in the released code, or have one each
    (`share_heads` false, of the heads of queries). Distances beyond `limit` share one vector, so any length goes.
    `values` false leaves E out. Under a causal mask the rows of r > 0 are never read.
    Source: Shaw et al. 2018 (arXiv:1803.02155), eq. 3 and 4. Initial values: a normal of `stddev`, not Glorot's.
    """

    limit: int = 16
    values: bool = True
    share_heads: bool = True
    stddev: float = 0.02

    def __post_init__(self):
        if self.limit < 1:
            raise ValueError(f"limit={self.limit} must be at least 1")

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"relative"}))

    def layer(self, dims: Dims) -> EncodingLayer:
        return ClippedTables(self, dims)


class ClippedTables(EncodingLayer):
    encoding: Shaw
    dims: Dims

    @nn.compact
    def __call__(self, shared: None, q: jax.Array, k: jax.Array, v: jax.Array, site: Site) -> Encoded:
        rows = Clip(self.encoding.limit)
        heads = 1 if self.encoding.share_heads else self.dims.num_heads
        start = nn.initializers.truncated_normal(self.encoding.stddev)

        def table(name: str) -> Table:
            return Table(self.param(name, start, (rows.num_rows, heads, self.dims.head_dim), jnp.float32), rows)

        term = Relative(query=table("keys"), value=table("values") if self.encoding.values else None)
        return Encoded(q, k, v, terms=(term,))
