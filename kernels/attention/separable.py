"""Clipped relative tables as a product of two vectors, one that knows only the query and one that knows only the key.

A table A of 2K + 1 rows, looked up by clip(r, −K, K) + K with r = j − i, is for |r| < K exactly

    A[r + K] = Σ_m B_m (R(i) g_j)_m

with a basis g_j of width G, a rotation R(i) of its pairs, and coefficients B that carry all that is learned. So ⟨q_i, A[r + K]⟩ is
⟨f_i, g_j⟩ with f_i = R(i)ᵀ B q_i, and Σ_j p_ij A[r + K] is Bᵀ R(i) W_i with W_i = Σ_j p_ij g_j. For |r| ≥ K the row is constant:
one number for each query on either side. A kernel then needs neither a gather nor a table, and a table's gradient is that of B.

Two bases. A table that *is* a sinusoid (`Wave`) is its own: g_j holds sin(j ω) and cos(j ω), G the head's width, B a reordering.
Any other table is its real Fourier series of period 2K: g_j holds the orthonormal basis at j, G = 2K, B = the coefficients.
Angles are computed in float64 on the host.

So a kernel takes `Sides` beside q, k and v and gives `Sums`, and everything learned stays outside of it, to be differentiated by JAX:

    score = scale · (⟨q_i, k_j⟩ + ρ_ij),   ρ_ij = ⟨f_i, g_j⟩ for |r| < K, c⁺_i for r ≥ K, c⁻_i for r ≤ −K
    out_i = Σ_j p_ij v_j,   W_i = Σ_{|r|<K} p_ij g_j,   P⁺_i = Σ_{r≥K} p_ij,   P⁻_i = Σ_{r≤−K} p_ij

Its backward pass has the same three cases in dP_ij = ⟨dO_i, v_j⟩ + (⟨dW_i, g_j⟩, dP⁺_i or dP⁻_i).

The rotation of NEZHA's table is that of RoPE (Su et al. 2021, arXiv:2104.09864) with another start; that a clipped table is a short
Fourier series is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels.attention.fused import OUT, ROW, dots, padded
from kernels.attention.terms import Clip, Relative, Reverse, Table, Wave


@dataclass(frozen=True)
class Basis:
    """The basis of tables clipped at K = `limit`; `wave` where it is a sinusoid of the head's width, None for Fourier.

    Channels are halves: sines (or the constant and the cosines) first, then cosines (or the alternating one and the sines).
    """

    limit: int
    width: int
    wave: Wave | None = None

    @classmethod
    def of(cls, relative: Relative) -> Basis | None:
        """The narrowest that fits the query and the value table; None where there is none, or a key table."""
        tables = [table for table in (relative.query, relative.value) if table is not None]
        clips = {_clip(table) for table in tables}
        if relative.key is not None or len(clips) != 1 or None in clips:
            return None
        (limit,) = clips
        waves = {table.wave for table in tables}
        widths = {table.values.shape[2] for table in tables}
        if len(waves) == 1 and len(widths) == 1 and None not in waves and not any(_reversed(t) for t in tables):
            return cls(limit, *widths, *waves)
        return cls(limit, 2 * limit)

    def of_keys(self, length: int) -> np.ndarray:
        """g_j, float32 `[length, G]`, for j = 0 … length − 1."""
        angle = np.arange(length)[:, None] * self._frequencies()
        if self.wave is not None:
            return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)
        norm = np.full(self.limit, math.sqrt(2 / self.width))
        norm[0] = math.sqrt(1 / self.width)
        second = np.sin(angle)
        second[:, 0] = np.cos(np.pi * (np.arange(length) % 2))
        return np.concatenate([np.cos(angle) * norm, second * norm], axis=1).astype(np.float32)

    def to_queries(self, table: Table, q: Float[Array, "B T N H"], first: int) -> Float[Array, "B T N G"]:
        """f_i = R(i)ᵀ B q_i for i = first …, in the dtype of q."""
        a, b, c = (x[None, :, None] for x in self._rotation(first, q.shape[1]))
        x, y = self._halves(table, q.astype(jnp.float32))
        return jnp.concatenate([a * x - c * y, c * x + b * y], axis=-1).astype(q.dtype)

    def from_keys(self, table: Table, w: Float[Array, "B T N G"], first: int) -> Float[Array, "B T N H"]:
        """Bᵀ R(i) W_i for i = first …, float32."""
        a, b, c = (x[None, :, None] for x in self._rotation(first, w.shape[1]))
        x, y = jnp.split(w.astype(jnp.float32), 2, axis=-1)
        x, y = a * x + c * y, b * y - c * x
        if self.wave is None:
            return jnp.einsum("bthg,ghd->bthd", jnp.concatenate([x, y], axis=-1), self._series(table, w.shape[2]))
        return jnp.stack([x, y], axis=-1).reshape(w.shape) if self._interleaved else jnp.concatenate([x, y], axis=-1)

    def beyond(self, table: Table, heads: int) -> tuple[Float[Array, "N H"], Float[Array, "N H"]]:
        """The rows for r ≥ K and for r ≤ −K."""
        line = _line(table, heads)
        return line[-1], line[0]

    def _rotation(self, first: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(a, b, c), float32 `[length, G/2]`: R(i) takes (x, y) to (a x + c y, b y − c x), for i = first …"""
        i = first + np.arange(length)[:, None]
        if self.wave is not None:
            angle = (self.limit - self.wave.phase - i) * self._frequencies()
            a = b = np.cos(angle)
            c = np.sin(angle)
        else:
            angle = (i % self.width) * self._frequencies()
            a, c = np.cos(angle), np.sin(angle)
            b = a.copy()
            b[:, 0] = np.cos(np.pi * (i[:, 0] % 2))  # the alternating channel has no partner, nor has the constant
        return tuple(x.astype(np.float32) for x in (a, b, c))

    def _halves(self, table: Table, q: Array) -> list[Array]:
        """B q, in two."""
        if self.wave is None:
            return jnp.split(jnp.einsum("bthd,ghd->bthg", q, self._series(table, q.shape[2])), 2, axis=-1)
        return [q[..., ::2], q[..., 1::2]] if self._interleaved else jnp.split(q, 2, axis=-1)

    def _series(self, table: Table, heads: int) -> Float[Array, "G N H"]:
        """The Fourier coefficients of each channel of the table, whose rows r = 1 − K … K − 1 are one period but one."""
        line = _line(table, heads)
        inside, never_read = line[1:-1], (line[:1] + line[-1:]) / 2
        period = jnp.concatenate([inside[self.limit - 1 :], never_read, inside[: self.limit - 1]])
        return jnp.einsum("xg,xnh->gnh", self.of_keys(self.width), period, precision="highest")

    @property
    def _interleaved(self) -> bool:
        return self.wave is not None and self.wave.layout == "interleaved"

    def _frequencies(self) -> np.ndarray:
        if self.wave is not None:
            return self.wave.base ** (-2.0 * np.arange(self.width // 2) / self.width)
        return 2 * np.pi * np.arange(self.limit) / self.width


class Sides(NamedTuple):
    """f `[B, T, N, G]`, c⁺ and c⁻ `[B, N, T]` (None without a query table), and g `[S, G]`."""

    f: Array | None
    above: Array | None
    below: Array | None
    g: Array

    @classmethod
    def of(
        cls, basis: Basis, relative: Relative, q: Float[Array, "B T N H"], *, offset: int, like: tuple[int, int, int]
    ) -> Sides:
        """like: (queries, keys, G) to which they are padded with zeros."""
        queries, keys, width = like
        g = jnp.asarray(np.pad(basis.of_keys(keys), ((0, 0), (0, width - basis.width))), q.dtype)
        if relative.query is None:
            return cls(None, None, None, g)
        f = padded(basis.to_queries(relative.query, q, offset), queries, width)
        # Sums of products, not contractions: XLA transposes all of q for a GPU to multiply it by one row for each head.
        ends = basis.beyond(relative.query, q.shape[2])
        products = (jnp.sum(q.astype(jnp.float32) * end[None, None], axis=-1) for end in ends)
        above, below = (jnp.swapaxes(padded(x, queries), 1, 2) for x in products)
        return cls(f, above, below, g)

    @staticmethod
    def axes(scores: bool) -> Sides:
        return Sides(*(("b t n e", ROW, ROW) if scores else (None,) * 3), "s e")


class Sums(NamedTuple):
    """out `[B, T, N, Hv]`; W `[B, T, N, G]`, P⁺ and P⁻ `[B, N, T]`, None without a value table."""

    out: Array
    w: Array | None
    above: Array | None
    below: Array | None

    @staticmethod
    def axes(values: bool) -> Sums:
        return Sums(OUT, *(("b t n e", ROW, ROW) if values else (None,) * 3))

    def joined(self, basis: Basis, table: Table, *, offset: int, length: int, width: int) -> Array:
        """What attention gives, `[B, T, N, W]` of `length` queries and `width` channels: out and the value table's part."""
        out = self.out[:, :length, :, :width]
        above, below = (jnp.swapaxes(x[:, :, :length], 1, 2)[..., None] for x in (self.above, self.below))
        end, start = (x[None, None] for x in basis.beyond(table, out.shape[2]))
        added = basis.from_keys(table, self.w[:, :length, :, : basis.width], offset)
        added += above * end + below * start
        return (out.astype(jnp.float32) + added).astype(out.dtype)

    def along(self, gradient: Sums) -> Float[Array, "B N T"]:
        """δ: Σ_j p_ij dP_ij of each query, dP before its own δ is taken off."""
        delta = dots(gradient.out, self.out)
        if self.w is None:
            return delta
        return delta + dots(gradient.w, self.w) + gradient.above * self.above + gradient.below * self.below


def _line(table: Table, heads: int) -> Float[Array, "R N H"]:
    """The rows for r = −K … K, of every head; those of a sinusoid are constants."""
    values = jax.lax.stop_gradient(table.values) if table.wave is not None else table.values
    values = values.astype(jnp.float32)
    values = jnp.repeat(values, heads // values.shape[1], axis=1)
    return values[::-1] if _reversed(table) else values


def _clip(table: Table) -> int | None:
    rows = table.rows.rows if isinstance(table.rows, Reverse) else table.rows
    return rows.limit if isinstance(rows, Clip) and rows.limit > 0 else None


def _reversed(table: Table) -> bool:
    return isinstance(table.rows, Reverse)
