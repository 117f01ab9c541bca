"""The kinds of term a position encoding adds to attention, as data.

For query i, key j, head n, with q and k after the encoding's own transform and r = j − i:

    logit = scale · ( ⟨q_i, k_j⟩ + ⟨q_i, A[ρ(r)]⟩ + ⟨k_j, C[ρ(r)]⟩ ) · m[n,r]  +  t[n,r]  +  a[n,i] + b[n,j]  +  f(i, j; θ)  +  dense[n,i,j]
    out_i = Σ_j p_ij ( v_j + E[ρ(r)] )

Relative terms stand inside the scale, Toeplitz and RowColumn outside it. Every class is a pytree whose arrays are
differentiable leaves; static fields are scalars or frozen dataclasses of scalars, never arrays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol, no_type_check, runtime_checkable

import jax
import numpy as np


def _static(**kwargs):
    return field(metadata={"static": True}, **kwargs)


def _pytree(cls):
    # Leaves may be whatever JAX puts through a pytree (shapes, specs, None), so a type checker must not look at them.
    return no_type_check(jax.tree_util.register_dataclass(dataclass(frozen=True)(cls)))


@runtime_checkable
class RowMap(Protocol):
    """ρ: relative position → row of a table. Frozen, hashable, made of scalars only."""

    @property
    def span(self) -> int:
        """|r| at and beyond which ρ is constant on either side."""

    @property
    def num_rows(self) -> int:
        """Rows of the table that ρ points into."""

    def lookup(self) -> np.ndarray:
        """int32 `[2·span + 1]`: ρ(r) for r = −span … span; ρ(r) = lookup[clip(r, −span, span) + span]."""


@dataclass(frozen=True)
class Clip:
    """ρ(r) = clip(r, −limit, limit) + limit, a table of 2·limit + 1 rows (Shaw et al. 2018, arXiv:1803.02155, eq. 4)."""

    limit: int

    @property
    def span(self) -> int:
        return self.limit

    @property
    def num_rows(self) -> int:
        return 2 * self.limit + 1

    def lookup(self) -> np.ndarray:
        return np.arange(2 * self.limit + 1, dtype=np.int32)


@dataclass(frozen=True)
class LogBuckets:
    """DeBERTa's rows δ over query minus key, exact near the diagonal and logarithmic beyond it.

    With x = −r, mid = buckets / 2 and M = max_distance:
        bucket(x) = x                                                             for |x| ≤ mid
                  = sign(x) (⌈ ln(|x|/mid) / ln((M−1)/mid) · (mid − 1) ⌉ + mid)    beyond
        ρ(r) = clip(bucket(x) + buckets, 0, 2·buckets − 1),  a table of 2·buckets rows.
    So keys M and more to the right have row 0, which no nearer key has, and those to the left the last row, as at M − 1.
    Source: He, Gao, Chen 2021 (arXiv:2111.09543); the boundaries are those of the released code, computed once on the host.
    """

    buckets: int
    max_distance: int

    @property
    def span(self) -> int:
        return self.max_distance

    @property
    def num_rows(self) -> int:
        return 2 * self.buckets

    def lookup(self) -> np.ndarray:
        x = -np.arange(-self.span, self.span + 1)
        mid = self.buckets // 2
        distance = np.abs(x)
        far = np.maximum(distance, mid) / mid
        logarithmic = np.ceil(np.log(far) / math.log((self.max_distance - 1) / mid) * (mid - 1)) + mid
        bucket = np.where(distance <= mid, distance, logarithmic) * np.sign(x)
        return np.clip(bucket + self.buckets, 0, 2 * self.buckets - 1).astype(np.int32)


@dataclass(frozen=True)
class Reverse:
    """ρ'(r) = ρ(−r): for an encoding that looks up one side by query minus key."""

    rows: RowMap

    @property
    def span(self) -> int:
        return self.rows.span

    @property
    def num_rows(self) -> int:
        return self.rows.num_rows

    def lookup(self) -> np.ndarray:
        return self.rows.lookup()[::-1].copy()


@dataclass(frozen=True)
class Wave:
    """Says that a table *is* a sinusoid: row p, frequency ω_m = base^(−2m/H), holds sin and cos of (p − phase) · ω_m.

    `interleaved` puts sin and cos of one frequency in neighbouring channels, `halves` all sines before all cosines.
    A kernel may use it to avoid the table; a test holds table and wave equal.
    """

    base: float
    phase: float
    layout: Literal["interleaved", "halves"] = "interleaved"

    def table(self, num_rows: int, width: int) -> np.ndarray:
        """The float32 table `[num_rows, width]` this wave describes; angles in float64."""
        omega = self.base ** (-2.0 * np.arange(width // 2) / width)
        angle = (np.arange(num_rows) - self.phase)[:, None] * omega
        pair = np.stack([np.sin(angle), np.cos(angle)], axis=-1 if self.layout == "interleaved" else 1)
        return pair.reshape(num_rows, 2 * (width // 2)).astype(np.float32)


@_pytree
class Table:
    """Rows `values[R, N or K or 1, H]`, found by `rows`: A[ρ(r)] = values[rows(r)].

    The middle axis is per query head, per key/value head, or 1 for a table that all heads share.
    """

    values: jax.Array
    rows: RowMap = _static()
    wave: Wave | None = _static(default=None)


@_pytree
class Relative:
    """Content-dependent relative terms, each table named by what it meets.

    query: ⟨q_i, A[ρ(r)]⟩ and key: ⟨k_j, C[ρ(r)]⟩ stand inside the scale; value: E[ρ(r)] is summed with the probabilities.
    """

    query: Table | None = None
    key: Table | None = None
    value: Table | None = None


@_pytree
class Toeplitz:
    """t[n, r] = values[n, clip(r + zero, 0, R − 1)], values `[N, R]`; `zero` is the column of r = 0, by default (R − 1) // 2.

    A value of −inf masks that entry. "Zero beyond the table" means zero end columns.
    """

    values: jax.Array
    zero: int | None = _static(default=None)


@_pytree
class Multiply:
    """m[n, r] multiplies the scaled product; values `[N, R]`, or `[N, R, H]` acting per channel inside ⟨q_i, k_j⟩.

    The lookup is that of `Toeplitz`. The `[N, R, H]` form is for `reference` and `xla` only.
    Source: Huang et al. 2020 (arXiv:2009.13658), methods 1 to 3.
    """

    values: jax.Array
    zero: int | None = _static(default=None)


@_pytree
class RowColumn:
    """a[b, n, i] + b[b, n, j]: a data-dependent, separable bias; `a` is `[B, N, T]`, `b` is `[B, N, S]`, both float32.

    Under softmax `a` cancels, so its gradient is zero.
    """

    a: jax.Array
    b: jax.Array


@_pytree
class PiecewiseLinear:
    """A piecewise linear function of u = φ[r] · row_scale[i], per head (FIRE's ReLU network is exactly that):

        f[n] = line[n, 0] + line[n, 1] · u + Σ_m slopes[n, m] · max(u, knots[m])

    `distance[R]` is φ with the lookup of `Toeplitz` (`zero` its column of r = 0), `row_scale` `[B, T]`, `knots` `[M]`,
    `slopes` `[N, M]`, `line` `[N, 2]`. Here M counts knots. Exactly at a knot, where f has no derivative, fused kernels give that of
    the left, others the mean of both sides.
    """

    distance: jax.Array
    row_scale: jax.Array
    knots: jax.Array
    slopes: jax.Array
    line: jax.Array
    zero: int | None = _static(default=None)


@_pytree
class Pairwise:
    """Any function of both positions, for `reference` and `xla` only.

    `fn(params, q_pos[bq, 1], k_pos[1, bk]) → [N, bq, bk]`, a frozen dataclass of scalars: pure, closing over nothing,
    with everything differentiable in `params`. (A lambda or bound method would retrace at every call.)
    """

    params: object
    fn: object = _static()


@_pytree
class Dense:
    """The last resort: bias `[1 or B, 1 or N, T, S]`, added as it is."""

    bias: jax.Array


Term = Relative | Toeplitz | Multiply | RowColumn | PiecewiseLinear | Pairwise | Dense
