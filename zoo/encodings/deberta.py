"""DeBERTa's disentangled attention: content to position and position to content."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import LogBuckets, Relative, Reverse, RowMap, Table
from zoo.encodings.encoding import Dims, Encoded, Encoding, EncodingLayer, Facts, Place, Site
from zoo.encodings.registration import registry


@dataclass(frozen=True)
class Shifted(RowMap):
    """ρ(r) = clip(limit − r, 0, 2·limit − 1): DeBERTa's rows without buckets, over query minus key."""

    limit: int

    @property
    def span(self) -> int:
        return self.limit

    @property
    def num_rows(self) -> int:
        return 2 * self.limit

    def lookup(self) -> np.ndarray:
        return np.clip(2 * self.limit - np.arange(2 * self.limit + 1), 0, 2 * self.limit - 1).astype(np.int32)


@registry.register("deberta")
@dataclass(frozen=True)
class Deberta(Encoding):
    """Content meets the position of the other side, through the layer's own projections:

        logit = ( ⟨q_i, P_δ W_K⟩ + ⟨k_j, P_δ W_Q⟩ + ⟨q_i, k_j⟩ ) / √(3H),   δ = ρ(r)

    P is one learned table for all layers, a row per bucket of query minus key. The defaults are those of the released v2 and
    v3: `buckets` log buckets a side up to `max_distance`, a LayerNorm over P, and the layer's projections of queries and keys.
    v1 is `buckets=none`, `norm=false`, `share_projections=false`: a row for every distance up to `max_distance`, and own
    projections, that of keys without a bias; the code of v2 gives it one, `key_bias`, where it does not share. Either term may be
    left out; 3 is one more than the number of terms. `p2c="paper"` looks the second term up by ρ(−r), as the paper prints it;
    both released codes use ρ(r) there too.
    Source: He et al. 2020 (arXiv:2006.03654), 2021 (arXiv:2111.09543), and their released code. Without dropout of P.
    """

    buckets: int | None = 256
    max_distance: int = 512
    share_projections: bool = True
    key_bias: bool = False
    norm: bool = True
    c2p: bool = True
    p2c: Literal["code", "paper", "none"] = "code"
    norm_epsilon: float = 1e-7
    stddev: float = 0.02

    def __post_init__(self):
        if self.max_distance < 1:
            raise ValueError(f"max_distance={self.max_distance} must be at least 1")
        if self.buckets is not None and (self.buckets < 4 or self.buckets % 2):
            raise ValueError(f"buckets={self.buckets} must be an even number from 4 on, or none")
        if self.buckets is not None and self.max_distance < self.buckets // 2 + 2:
            raise ValueError(f"max_distance={self.max_distance} must be at least {self.buckets // 2 + 2}")
        if self.key_bias and (self.share_projections or not self.c2p):
            raise ValueError("key_bias is of a key projection of its own: set share_projections=false and c2p=true")
        if not self.c2p and self.p2c == "none":
            raise ValueError("with neither c2p nor p2c there are no positions: use the encoding 'none'")

    @property
    def rows(self) -> RowMap:
        return Shifted(self.max_distance) if self.buckets is None else LogBuckets(self.buckets, self.max_distance)

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"relative"}))

    def shared(self, dims: Dims) -> nn.Module:
        return PositionTable(self, dims.model_dim)

    def layer(self, dims: Dims) -> EncodingLayer:
        return Disentangled(self, dims)


class PositionTable(nn.Module):
    """P, float32 `[R, D]`."""

    encoding: Deberta
    width: int

    @nn.compact
    def __call__(self, place: Place) -> jax.Array:
        start = nn.initializers.truncated_normal(self.encoding.stddev)
        table = self.param("table", start, (self.encoding.rows.num_rows, self.width), jnp.float32)
        return nn.LayerNorm(epsilon=self.encoding.norm_epsilon, name="norm")(table) if self.encoding.norm else table


class Disentangled(EncodingLayer):
    encoding: Deberta
    dims: Dims

    @nn.compact
    def __call__(self, shared: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, site: Site) -> Encoded:
        e, dims, query, key = self.encoding, self.dims, None, None
        if e.c2p:
            projected = site.project.key(shared) if e.share_projections else self._own(shared, "key", dims.num_kv_heads)
            query = Table(projected, e.rows)
        if e.p2c != "none":
            projected = (
                site.project.query(shared) if e.share_projections else self._own(shared, "query", dims.num_heads)
            )
            key = Table(projected, Reverse(e.rows) if e.p2c == "paper" else e.rows)
        terms = 1 + (query is not None) + (key is not None)
        scale = (terms * dims.head_dim) ** -0.5
        return Encoded(q, k, v, terms=(Relative(query=query, key=key),), scale=scale)

    def _own(self, table: jax.Array, name: str, heads: int) -> jax.Array:
        dense = nn.Dense(
            heads * self.dims.head_dim,
            use_bias=name == "query" or self.encoding.key_bias,
            kernel_init=nn.initializers.truncated_normal(self.encoding.stddev),
            precision="highest",
            name=name,
        )
        return dense(table).reshape(-1, heads, self.dims.head_dim)
