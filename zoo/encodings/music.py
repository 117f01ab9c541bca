"""The Music Transformer's relative attention: a learned vector per head and distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import Clip, Relative, Table
from zoo.encodings.encoding import Dims, Encoded, Encoding, EncodingLayer, Facts, Site
from zoo.encodings.registration import registry


@registry.register("music")
@dataclass(frozen=True)
class Music(Encoding):
    """Shaw's key side for all distances of the training length, every head with its own table:

        logit = ⟨q_i, k_j + E_n[r]⟩ / √H

    E_n holds r = 1 − length … 0, and with `bidirectional` r up to length − 1. A distance beyond it takes the outermost row
    (beyond="clip", as in Shaw's) or adds nothing ("zero", what Tensor2Tensor does). The paper's skew, which turns one column
    per distance into one per key by a reshape, is how `kernels.attention` evaluates any such table: memory is linear in length.
    Source: Huang et al. 2018 (arXiv:1809.04281), section 3.4 and its released code; initial values are a normal of 1/√H.
    """

    length: int = 512
    bidirectional: bool = False
    beyond: Literal["clip", "zero"] = "clip"

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"length={self.length} must be at least 1")

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"relative"}), bidirectional=self.bidirectional)

    def layer(self, dims: Dims) -> EncodingLayer:
        return DistanceTable(self, dims)


class DistanceTable(EncodingLayer):
    encoding: Music
    dims: Dims

    @nn.compact
    def __call__(self, shared: None, q: jax.Array, k: jax.Array, v: jax.Array, site: Site) -> Encoded:
        length, width = self.encoding.length, self.dims.head_dim
        rows = 2 * length - 1 if self.encoding.bidirectional else length
        start = nn.initializers.truncated_normal(width**-0.5)
        table = self.param("table", start, (rows, self.dims.num_heads, width), jnp.float32)
        nothing = jnp.zeros_like(table[:1])
        ends = (table[:1], table[-1:]) if self.encoding.beyond == "clip" else (nothing, nothing)
        # Rows r = −length … length; a causal mask shows no key of r > 0.
        future = [] if self.encoding.bidirectional else [jnp.broadcast_to(nothing, (length - 1, *table.shape[1:]))]
        right = ends[1] if self.encoding.bidirectional else nothing
        return Encoded(
            q, k, v, terms=(Relative(query=Table(jnp.concatenate([ends[0], table, *future, right]), Clip(length))),)
        )
