"""iRPE: piecewise relative positions, exact near the diagonal and logarithmic beyond it, as a bias or by content."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import Positions, Relative, Reverse, RowMap, Table, Term, Toeplitz
from zoo.encodings.encoding import Dims, Encoded, Encoding, EncodingLayer, Facts, Site
from zoo.encodings.registration import registry
from zoo.errors import UserError

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


@dataclass(frozen=True)
class PiecewiseOnGrid(RowMap):
    """ρ of r = Δrow · 2W + Δcolumn on a grid of H × W cells, by Δ of query minus key, b = ⌊β⌋:

    "product": (g(Δrow) + b)(2b + 1) + g(Δcolumn) + b of (2b + 1)² rows; "rows" and "columns": g(Δ) + b of 2b + 1 of the one axis;
    "distance": g(round √(Δrow² + Δcolumn²)) and "squared": g(Δrow² + Δcolumn²) of b + 1.
    """

    alpha: float
    beta: float
    gamma: float
    form: Literal["product", "rows", "columns", "distance", "squared"]
    grid: tuple[int, int]

    @property
    def span(self) -> int:
        height, width = self.grid
        return (height - 1) * 2 * width + width - 1

    @property
    def num_rows(self) -> int:
        b = math.floor(self.beta)
        return {"product": (2 * b + 1) ** 2, "rows": 2 * b + 1, "columns": 2 * b + 1}.get(self.form, b + 1)

    def lookup(self) -> np.ndarray:
        # A column offset is within ±(W − 1), so rounding to the next multiple of 2W parts the two.
        row, column = np.divmod(np.arange(self.span, -self.span - 1, -1) + self.grid[1], 2 * self.grid[1])
        column -= self.grid[1]
        b = math.floor(self.beta)
        match self.form:
            case "product":
                return (self._index(row) + b) * (2 * b + 1) + self._index(column) + b
            case "rows" | "columns":
                return self._index(row if self.form == "rows" else column) + b
            case "distance":
                return self._index(np.round(np.hypot(row, column)))
        return self._index(row**2 + column**2)

    def _index(self, x: np.ndarray) -> np.ndarray:
        return piecewise(x, self.alpha, self.beta, self.gamma)


@registry.register("irpe")
@dataclass(frozen=True)
class Irpe(Encoding):
    """A learned bias or vector per bucket of the offset i − j, whose buckets widen with it (α, β, γ = ratio · 1, 2, 8; see `piecewise`):

        bias:        logit = ⟨q_i, k_j⟩/√H + t[ρ(r)]
        contextual:  logit = ( ⟨q_i, k_j⟩ + ⟨q_i, T^K[ρ(r)]⟩ + ⟨k_j, T^Q[ρ(−r)]⟩ ) / √H,   out_i = Σ_j p_ij (v_j + T^V[ρ(r)])

    `on` says which of key, query and value have a table, named as in the paper by what the table stands beside: the one on
    keys meets queries. All start at 0; each layer has its own, and all heads share it with `share_heads`.
    `grid` = (rows, columns) is for images, whose tokens stand at `Positions.on_grid(rows, columns)`, or at a part of it:
    `product` has a bucket for each pair of a row's and a column's, `cross` a table for each and their sum, `euclidean` goes by
    the distance, and `quantized` by its square, as in the released code; those two have no rows for a sign.
    Without a grid a sequence is an image of one row. Then `product` and `cross` are one map, of the signed offset, since the row
    offset is always 0 and what belongs to it a constant.
    Source: Wu et al. 2021 (arXiv:2107.14222) and its released code, whose extra bucket for pairs with a class token is not here.
    Beyond γ all offsets share a bucket.
    """

    mapping: Mapping = "product"
    mode: Literal["bias", "contextual"] = "contextual"
    on: tuple[Literal["query", "key", "value"], ...] = ("key",)
    ratio: float = 1.9
    share_heads: bool = True
    grid: tuple[int, int] | None = None

    def __post_init__(self):
        if not self.on or len(set(self.on)) < len(self.on):
            raise ValueError(f"on={self.on} must name one or several of query, key and value, each once")
        if self.mode == "bias" and "value" in self.on:
            raise ValueError("mode='bias' has no table on value: it adds to logits; use mode='contextual'")
        if self.ratio < 1:
            raise ValueError(f"ratio={self.ratio} must be at least 1")
        if self.grid is not None and min(self.grid) < 1:
            raise ValueError(f"grid={self.grid} is (rows, columns), each at least 1")

    @property
    def maps(self) -> dict[str, RowMap]:
        """What is added to the names of the tables → the rows they are looked up at."""
        sizes = (self.ratio, 2 * self.ratio, 8 * self.ratio)
        form = {"euclidean": "distance", "quantized": "squared"}.get(self.mapping)
        if self.grid is None:
            return {"": Piecewise(*sizes, form or "signed")}
        if self.mapping == "cross":
            return {f"_{axis}": PiecewiseOnGrid(*sizes, axis, self.grid) for axis in ("rows", "columns")}
        return {"": PiecewiseOnGrid(*sizes, form or "product", self.grid)}

    def facts(self) -> Facts:
        # The cache keeps token positions, not those on a grid.
        return Facts(kinds=frozenset({"toeplitz" if self.mode == "bias" else "relative"}), decodes=self.grid is None)

    def layer(self, dims: Dims) -> EncodingLayer:
        if self.grid is not None:
            last = next(iter(self.maps.values())).span
            if last >= dims.max_length:
                raise UserError(
                    f"encoding 'irpe' on a grid of {self.grid[0]} × {self.grid[1]} has tokens at positions up to {last}, "
                    f"max_length={dims.max_length} ends before; set model.max_length={last + 1} or more"
                )
        return BucketTables(self, dims)


class BucketTables(EncodingLayer):
    encoding: Irpe
    dims: Dims

    @nn.compact
    def __call__(self, shared: None, q: jax.Array, k: jax.Array, v: jax.Array, site: Site) -> Encoded:
        e, dims = self.encoding, self.dims
        if e.grid is not None:
            place = site.place
            q, k = (_where_on_grid(x, p, e.grid) for x, p in ((q, place.queries), (k, place.source_positions)))
        heads = 1 if e.share_heads else dims.num_heads
        width = () if e.mode == "bias" else (dims.head_dim,)
        terms = []
        for suffix, rows in e.maps.items():
            # What stands beside queries is looked up by key minus query.
            of = {side: Reverse(rows) if side == "query" else rows for side in e.on}
            tables = {
                side: self.param(side + suffix, nn.initializers.zeros, (rows.num_rows, heads, *width), jnp.float32)
                for side in e.on
            }
            if e.mode == "bias":
                terms += [self._bias(table, of[side]) for side, table in tables.items()]
            else:
                made = {side: Table(table, of[side]) for side, table in tables.items()}
                terms.append(Relative(query=made.get("key"), key=made.get("query"), value=made.get("value")))
        return Encoded(q, k, v, terms=tuple(terms))

    def _bias(self, table: jax.Array, rows: RowMap) -> Term:
        # One-hot rows instead of a gather: a bucket's gradient is summed in a fixed order on every device.
        one_hot = jnp.asarray(np.eye(rows.num_rows, dtype=np.float32)[rows.lookup()])
        values = jnp.einsum("xr,rn->nx", one_hot, table, precision="highest")
        return Toeplitz(jnp.broadcast_to(values, (self.dims.num_heads, values.shape[1])))


def _where_on_grid(x: jax.Array, positions: Positions, grid: tuple[int, int]) -> jax.Array:
    """x `[B, T, N, H]`, NaN in the rows of a batch that have a token beside the grid or not at 2W · row + column."""
    if positions.grid is None:
        raise UserError(
            "encoding 'irpe' with a grid needs rows and columns: give Positions.on_grid(rows, columns), or use it without a grid"
        )
    row, column = positions.grid[..., 0], positions.grid[..., 1]
    inside = (row >= 0) & (row < grid[0]) & (column >= 0) & (column < grid[1])
    right = jnp.all(inside & (positions.token == 2 * grid[1] * row + column), axis=-1)
    return jnp.where(right[:, None, None, None], x, jnp.nan)
