"""TUPE: untied positions, correlated with each other by projections of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import Positions
from zoo.encodings.encoding import Dims, Encoded, Encoding, EncodingLayer, Facts, Place, Site
from zoo.encodings.registration import registry
from zoo.errors import UserError


@registry.register("tupe")
@dataclass(frozen=True)
class Tupe(Encoding):
    """Words and positions meet their own kind only: logit = ( ⟨q_i, k_j⟩ + ⟨p_i U_Q, p_j U_K⟩ ) / √(2H).

    p `[max_length, D]` and both projections are learned, one set for all layers; nothing is added to the embeddings or the
    values. With `untie_cls` the position part is one scalar per head where the query is token 0, and another where the key
    is: [CLS] stands nowhere. form="code" is the released one: a LayerNorm over p, projections with biases, and the scalars
    ⟨p_0 U_Q, p_0 U_K⟩ and ⟨p_1 U_Q, p_1 U_K⟩ of two rows of p, whose row t + 1 is position t; "paper" has free scalars and
    none of these. Attention sees [q_i; p_i U_Q] and [k_j; p_j U_K] (and two channels for the scalars), so keys are cached wider.
    TUPE-R is `tupe+t5:scale=none`, without the released code's own buckets for [CLS].
    Source: Ke et al. 2020 (arXiv:2006.15595) and its released code.
    """

    form: Literal["code", "paper"] = "code"
    untie_cls: bool = True
    stddev: float = 0.02

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"transform"}))

    def shared(self, dims: Dims) -> nn.Module:
        return PositionProjections(self, dims)

    def layer(self, dims: Dims) -> EncodingLayer:
        return Concatenation((2 * dims.head_dim) ** -0.5)

    def cached_widths(self, dims: Dims, key: int, value: int) -> tuple[int, int]:
        return key + dims.head_dim + (2 if self.untie_cls else 0), value

    def init_cache(self, dims: Dims, batch: int, max_length: int, dtype: Any) -> None:
        if max_length > dims.max_length:
            raise UserError(_too_long(dims.max_length, max_length))


class PositionProjections(nn.Module):
    """What is appended to q `[B or 1, T, N, W]` and to k `[B or 1, S, K, W]`; float32."""

    encoding: Tupe
    dims: Dims

    @nn.compact
    def __call__(self, place: Place) -> tuple[jax.Array, jax.Array]:
        dims, code = self.dims, self.encoding.form == "code"
        positions = place.queries
        if place.keys is None and positions.contiguous and positions.length > dims.max_length:
            raise UserError(_too_long(dims.max_length, positions.length))
        start = nn.initializers.truncated_normal(self.encoding.stddev)
        offset = 1 if code and self.encoding.untie_cls else 0
        p = self.param("table", start, (dims.max_length + offset, dims.model_dim), jnp.float32)
        if code:
            p = nn.LayerNorm(epsilon=1e-5, name="norm")(p)

        def project(heads: int, name: str) -> jax.Array:
            dense = nn.Dense(heads * dims.head_dim, use_bias=code, kernel_init=start, precision="highest", name=name)
            return dense(p).reshape(p.shape[0], heads, dims.head_dim)

        of_queries, of_keys = project(dims.num_heads, "query"), project(dims.num_kv_heads, "key")
        if not self.encoding.untie_cls:
            return _rows(of_queries, positions, 0), _rows(of_keys, place.source_positions, 0)
        if code:
            groups = dims.num_heads // dims.num_kv_heads
            alike = jnp.sum(of_queries[:2] * jnp.repeat(of_keys[:2], groups, axis=1), axis=-1)
        else:
            scale = (2 * dims.head_dim) ** -0.5
            alike = self.param("cls", start, (2, dims.num_heads), jnp.float32) / scale
        return self._untied(_rows(of_queries, positions, offset), positions, alike), self._untied(
            _rows(of_keys, place.source_positions, offset), place.source_positions, None
        )

    def _untied(self, rows: jax.Array, positions: Positions, scalars: jax.Array | None) -> jax.Array:
        """`rows` with none for token 0, and two channels whose product is the scalar of the pair instead.

        Query: (θ1 where i = 0, θ2 elsewhere in the other channel); key: (1, 1 where j = 0).
        """
        first = (positions.token == 0)[..., None]
        rows = jnp.where(first[..., None], 0.0, rows)
        if scalars is None:
            pair = jnp.stack([jnp.ones_like(first), first], axis=-1)
            pair = jnp.broadcast_to(pair, (*rows.shape[:-1], 2)).astype(rows.dtype)
        else:
            pair = jnp.stack([jnp.where(first, scalars[0], 0.0), jnp.where(first, 0.0, scalars[1])], axis=-1)
        return jnp.concatenate([rows, pair], axis=-1)


class Concatenation(EncodingLayer):
    scale: float

    @nn.compact
    def __call__(
        self, shared: tuple[jax.Array, jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, site: Site
    ) -> Encoded:
        def widened(x: jax.Array, more: jax.Array) -> jax.Array:
            more = jnp.broadcast_to(more, (x.shape[0], *more.shape[1:]))
            return jnp.concatenate([x, more.astype(x.dtype)], axis=-1)

        return Encoded(widened(q, shared[0]), widened(k, shared[1]), v, scale=self.scale)


def _rows(table: jax.Array, positions: Positions, offset: int) -> jax.Array:
    """Rows of `table` at the positions; NaN outside, which no run survives unseen, as in `learned`."""
    wanted = jnp.where(positions.token < 0, table.shape[0], positions.token + offset)
    return jnp.take(table, wanted, axis=0, mode="fill")


def _too_long(max_length: int, length: int) -> str:
    return (
        f"encoding 'tupe' has max_length={max_length} positions, the sequence has {length}; "
        "raise model.max_length, shorten the input, or choose a relative encoding"
    )
