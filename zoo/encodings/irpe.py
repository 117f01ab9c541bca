"""iRPE: piecewise relative positions, exact near the diagonal and logarithmic beyond it, as a bias or by content."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import Relative, Reverse, RowMap, Table, Term, Toeplitz
from zoo.encodings.encoding import Dims, Encoded, Encoding, EncodingLayer, Facts, Site
from zoo.encodings.registration import registry

Mapping = Literal["product", "cross", "euclidean", "quantized"]


def piecewise(x: np.ndarray, alpha: float, beta: float, gamma: float) -> np.ndarray:
    """g(x) = round(x) for |x| ≤ α, else sign(x) · min(β, round(α + ln(|x|/α) / ln(γ/α) · (β − α))), cut to an integer.

    Half rounds to even, as in the released code. The range is −⌊β⌋ … ⌊β⌋.
    """
    distance = np.abs(x).astype(np.float64)
    far = np.maximum(distance, alpha) / alpha
    logarithmic = np.round(alpha + np.log(far) / math.log(gamma / alpha) * (beta - alpha))
    index = np.where(distance <= alpha, np.round(distance), np.minimum(logarithmic, beta))
    return (np.sign(x) * np.trunc(index)).astype(np.int32)


@dataclass(frozen=True)
class Piecewise(RowMap):
    """ρ(r) = g(−r) + ⌊β⌋ of 2⌊β⌋ + 1 rows where the sign counts, else g(|r|) or g(r²) of ⌊β⌋ + 1 rows."""

    alpha: float
    beta: float
    gamma: float
    form: Literal["signed", "distance", "squared"]

    @property
    def span(self) -> int:
        return math.ceil(math.sqrt(self.gamma) if self.form == "squared" else self.gamma)

    @property
    def num_rows(self) -> int:
        return (2 if self.form == "signed" else 1) * math.floor(self.beta) + 1

    def lookup(self) -> np.ndarray:
        offset = -np.arange(-self.span, self.span + 1)
        x = {"signed": offset, "distance": np.abs(offset), "squared": offset**2}[self.form]
        return piecewise(x, self.alpha, self.beta, self.gamma) + (math.floor(self.beta) if self.form == "signed" else 0)


@registry.register("irpe")
@dataclass(frozen=True)
class Irpe(Encoding):
    """A learned bias or vector per bucket of the offset i − j, whose buckets widen with it (α, β, γ = ratio · 1, 2, 8; see `piecewise`):

        bias:        logit = ⟨q_i, k_j⟩/√H + t[ρ(r)]
        contextual:  logit = ( ⟨q_i, k_j⟩ + ⟨q_i, T^K[ρ(r)]⟩ + ⟨k_j, T^Q[ρ(−r)]⟩ ) / √H,   out_i = Σ_j p_ij (v_j + T^V[ρ(r)])

    `on` says which of key, query and value have a table, named as in the paper by what the table stands beside: the one on
    keys meets queries. All start at 0; each layer has its own, and all heads share it with `share_heads`.
    Here a sequence is an image of one row. Then `product` and `cross` are one map, of the signed offset, since the row offset
    is always 0 and what belongs to it a constant; `euclidean` is of the distance, and `quantized` of its square, as in
    the released code; those two ignore the sign and have no rows for it.
    Source: Wu et al. 2021 (arXiv:2107.14222) and its released code. Beyond γ all offsets share a bucket.
    """

    mapping: Mapping = "product"
    mode: Literal["bias", "contextual"] = "contextual"
    on: tuple[Literal["query", "key", "value"], ...] = ("key",)
    ratio: float = 1.9
    share_heads: bool = True

    def __post_init__(self):
        if not self.on or len(set(self.on)) < len(self.on):
            raise ValueError(f"on={self.on} must name one or several of query, key and value, each once")
        if self.mode == "bias" and "value" in self.on:
            raise ValueError("mode='bias' has no table on value: it adds to logits; use mode='contextual'")
        if self.ratio < 1:
            raise ValueError(f"ratio={self.ratio} must be at least 1")

    @property
    def rows(self) -> Piecewise:
        form = {"euclidean": "distance", "quantized": "squared"}.get(self.mapping, "signed")
        return Piecewise(self.ratio, 2 * self.ratio, 8 * self.ratio, form)

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"toeplitz" if self.mode == "bias" else "relative"}))

    def layer(self, dims: Dims) -> EncodingLayer:
        return BucketTables(self, dims)


class BucketTables(EncodingLayer):
    encoding: Irpe
    dims: Dims

    @nn.compact
    def __call__(self, shared: None, q: jax.Array, k: jax.Array, v: jax.Array, site: Site) -> Encoded:
        e, dims = self.encoding, self.dims
        heads = 1 if e.share_heads else dims.num_heads
        width = () if e.mode == "bias" else (dims.head_dim,)
        tables = {
            side: self.param(side, nn.initializers.zeros, (e.rows.num_rows, heads, *width), jnp.float32)
            for side in e.on
        }
        # What stands beside queries is looked up by key minus query.
        rows = {"key": e.rows, "query": Reverse(e.rows), "value": e.rows}
        if e.mode == "bias":
            return Encoded(q, k, v, terms=tuple(self._bias(table, rows[side]) for side, table in tables.items()))
        made = {side: Table(table, rows[side]) for side, table in tables.items()}
        term = Relative(query=made.get("key"), key=made.get("query"), value=made.get("value"))
        return Encoded(q, k, v, terms=(term,))

    def _bias(self, table: jax.Array, rows: RowMap) -> Term:
        # One-hot rows instead of a gather: a bucket's gradient is summed in a fixed order on every device.
        one_hot = jnp.asarray(np.eye(rows.num_rows, dtype=np.float32)[rows.lookup()])
        values = jnp.einsum("xr,rn->nx", one_hot, table, precision="highest")
        return Toeplitz(jnp.broadcast_to(values, (self.dims.num_heads, values.shape[1])))
