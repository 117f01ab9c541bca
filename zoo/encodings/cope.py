"""CoPE: positions counted by what the tokens say, not by where they stand."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels import attention
from kernels.attention import AttentionMask, Dense, PiecewiseLinear, Positions, RowColumn, Term
from zoo.encodings.encoding import Dims, Encoded, Encoding, EncodingLayer, Facts, Site
from zoo.encodings.registration import registry
from zoo.errors import UserError

# Queries of a tile, each with all of its keys.
_CHUNK = 128


@registry.register("cope")
@dataclass(frozen=True)
class Cope(Encoding):
    """Every query counts the tokens that matter to it: logit = scale · ( ⟨q_i, k_j⟩ + ⟨q_i, e[p_ij]⟩ ).

    p_ij = min( Σ_{j≤t≤i} g_it , max_count − 1 ) adds up the gates g_it = σ(⟨q_i, k_t⟩ · scale), or σ(⟨q_i, k_t⟩) with
    form="paper", over the keys that i sees: those of its document, within a window where there is one. e[p] is interpolated
    between the two nearest rows of e `[max_count, H]`, which is learned per layer, shared over heads and starts at zero.
    For causal masks; keys stand in the order of their positions. A count beyond the table takes the last row, so any length.
    Source: Golovneva et al. 2024 (arXiv:2405.18719) and its released code. Its own gate keys are not here.
    """

    max_count: int = 64
    form: Literal["code", "paper"] = "code"

    def __post_init__(self):
        if self.max_count < 2:
            raise ValueError(
                f"encoding 'cope' has max_count={self.max_count}, the rows of its table; it needs at least 2"
            )

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"core"}), bidirectional=False, ordered_keys=True)

    def layer(self, dims: Dims) -> EncodingLayer:
        return Counts(self)


class Counts(EncodingLayer):
    encoding: Cope

    @nn.compact
    def __call__(self, shared: None, q: jax.Array, k: jax.Array, v: jax.Array, site: Site) -> Encoded:
        if site.place.sources is not None:
            raise UserError(
                "encoding 'cope' counts the tokens between a query and a key of one sequence; it cannot be used with "
                "attention to a context; use alibi, t5 or rope there"
            )
        shape = (self.encoding.max_count, q.shape[3])
        table = self.param("table", nn.initializers.zeros, shape, jnp.float32)
        return Encoded(q, k, v, core=CountingCore(table, self.encoding.form))


@dataclass(frozen=True)
class CountingCore:
    """Attention with `table` `[R, H]` at the counted positions; in tiles of queries, so that memory is linear in length."""

    table: jax.Array
    form: str

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        terms: tuple[Term, ...] = (),
        mask: AttentionMask = AttentionMask(),  # noqa: B008 (frozen, without arrays)
        scale: float | None = None,
        positions: Any = None,
        dropout: tuple[float, jax.Array] | None = None,
        implementation: str | None = None,
    ) -> jax.Array:
        """As `kernels.attention.attention`. With dropout every tile has a key of its own, the same in every implementation.

        Raises:
          UserError: an implementation other than "reference" and "xla".
        """
        if implementation not in (None, "reference", "xla"):
            raise UserError(
                f"encoding 'cope' has its own attention, which has no implementation {implementation!r}; leave it out, or "
                "take 'xla' or 'reference'"
            )
        queries, keys = _pair(positions, q.shape[1], k.shape[1])
        full = q.shape[1] // _CHUNK
        if full > 0:
            # Or a scan over layers keeps the masks of all tiles, as in `kernels.attention.xla`.
            q, terms, mask, queries, keys = jax.lax.optimization_barrier((q, terms, mask, queries, keys))

        def tile(first: jax.Array | int, length: int) -> jax.Array:
            part, part_terms, part_mask, part_queries = _cut(first, length, q, terms, mask, queries)
            bias = Dense(self._bias(part, k, part_mask, scale, part_queries, keys))
            key = None if dropout is None else (dropout[0], jax.random.fold_in(dropout[1], first))
            return attention.attention(
                part,
                k,
                v,
                terms=(*part_terms, bias),
                mask=part_mask,
                scale=scale,
                positions=(part_queries, keys),
                dropout=key,
                implementation="reference",
            )

        remat = jax.checkpoint(tile, static_argnums=1)
        done = []
        if full > 0:
            many = jax.lax.map(lambda number: remat(number * _CHUNK, _CHUNK), jnp.arange(full))
            done.append(jnp.moveaxis(many, 0, 1).reshape(q.shape[0], full * _CHUNK, *many.shape[3:]))
        if q.shape[1] % _CHUNK or not full:
            done.append(remat(full * _CHUNK, q.shape[1] - full * _CHUNK))
        return done[0] if len(done) == 1 else jnp.concatenate(done, axis=1)

    def logits(
        self,
        terms: tuple[Term, ...],
        q: jax.Array,
        k: jax.Array,
        *,
        mask: AttentionMask | None = None,
        scale: float | None = None,
        positions: Any = None,
    ) -> jax.Array:
        """The scores `[B, N, T, S]`, as `kernels.attention.logits`."""
        queries, keys = _pair(positions, q.shape[1], k.shape[1])
        bias = Dense(self._bias(q, k, mask or AttentionMask(), scale, queries, keys))
        return attention.logits((*terms, bias), q, k, mask=mask, scale=scale, positions=(queries, keys))

    def _bias(
        self,
        q: jax.Array,
        k: jax.Array,
        mask: AttentionMask,
        scale: float | None,
        queries: Positions,
        keys: Positions,
    ) -> jax.Array:
        """scale · ⟨q_i, e[p_ij]⟩, at least float32 `[B, N, T, S]`."""
        scale = q.shape[3] ** -0.5 if scale is None else scale
        products = attention.logits((), q, k, scale=scale if self.form == "code" else 1.0, positions=(queries, keys))
        seen = dataclasses.replace(mask, causal=True).visible(queries.token, keys.token)[:, None]
        # Sums of gates in float32: bfloat16 has no whole numbers beyond 256.
        gates = jnp.where(seen, jax.nn.sigmoid(products), 0)
        count = jnp.minimum(jax.lax.cumsum(gates, axis=3, reverse=True), self.table.shape[0] - 1)
        of_rows = jnp.einsum("btnh,rh->bntr", q.astype(count.dtype), self.table.astype(count.dtype))
        low = jnp.floor(count)
        below, above = (jnp.take_along_axis(of_rows, row.astype(jnp.int32), axis=3) for row in (low, jnp.ceil(count)))
        return scale * (below + (count - low) * (above - below))


def _pair(positions: Any, queries: int, keys: int) -> tuple[Positions, Positions]:
    if positions is None:
        return Positions.arange(queries, keys - queries), Positions.arange(keys)
    return (positions, positions) if isinstance(positions, Positions) else positions


def _cut(
    first: jax.Array | int,
    length: int,
    q: jax.Array,
    terms: tuple[Term, ...],
    mask: AttentionMask,
    queries: Positions,
) -> tuple[jax.Array, tuple[Term, ...], AttentionMask, Positions]:
    """q, the terms, the mask and the positions of `length` queries from `first` on."""

    def cut(x: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, first, length, axis)

    def cut_term(term: Term) -> Term:
        match term:
            case RowColumn():
                return RowColumn(cut(term.a, 2), term.b)
            case PiecewiseLinear():
                return dataclasses.replace(term, row_scale=cut(term.row_scale, 1))
            case Dense():
                return Dense(cut(term.bias, 2))
        return term

    segments = None if mask.query_segments is None else cut(mask.query_segments, 1)
    mask = dataclasses.replace(mask, query_segments=segments)
    places = jax.tree.map(lambda x: cut(x, 1), queries)
    return cut(q, 1), tuple(map(cut_term, terms)), mask, places
