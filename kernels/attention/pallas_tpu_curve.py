"""A piecewise linear function of distance and query inside a TPU kernel, and its gradients, one knot at a time.

    f = line_0 + line_1 u + Σ_m slopes_m max(u, knots_m),   u = φ[j − i] · reach_i

Every entry costs three vector operations a knot forward and eight backward, more than everything else of a tile: nothing is approximated.
Source: Li et al. 2023 (arXiv:2310.04418), whose network of one hidden layer is such a function (`kernels.attention.PiecewiseLinear`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

REGISTER = (8, 128)


@dataclass(frozen=True)
class Curve:
    """The function of one head. scalars: a ref of numbers `[heads, 2 + 2M]` in scalar memory; head: its row."""

    scalars: Any
    head: Any

    @property
    def knots(self) -> int:
        return (self.scalars.shape[1] - 2) // 2

    def _slope(self, m: Any) -> Any:
        return self.scalars[self.head, 2 + m]

    def _knot(self, m: Any) -> Any:
        return self.scalars[self.head, 2 + self.knots + m]

    def at(self, u: jax.Array) -> jax.Array:
        straight = self.scalars[self.head, 0] + self.scalars[self.head, 1] * u
        return lax.fori_loop(
            0, self.knots, lambda m, total: total + self._slope(m) * jnp.maximum(u, self._knot(m)), straight
        )

    def gradients(self, u: jax.Array, df: jax.Array, sums: Any) -> jax.Array:
        """du. Adds to the ref `sums` `[2 + 2M, 8, 128]` what adds up to the gradients of the scalars."""
        sums[0] += folded(df)
        sums[1] += folded(df * u)

        def step(m: Any, total: jax.Array) -> jax.Array:
            knot, slope = self._knot(m), self._slope(m)
            # As of `maximum`: at a knot, where u of the own token often lies, both sides have one half.
            above = 0.5 * (jnp.where(u > knot, 1.0, 0.0) + jnp.where(u >= knot, 1.0, 0.0))
            sums[2 + m] += folded(df * jnp.maximum(u, knot))
            sums[2 + self.knots + m] += slope * folded(df * (1.0 - above))
            return total + slope * above

        return df * lax.fori_loop(0, self.knots, step, jnp.full(u.shape, self.scalars[self.head, 1], jnp.float32))


def folded(x: jax.Array) -> jax.Array:
    """`[8, 128]`, whose sum is that of x."""
    rows, lanes = REGISTER
    x = jnp.sum(x.reshape(-1, rows, x.shape[1]), axis=0)
    return sum(x[:, n : n + lanes] for n in range(0, x.shape[1], lanes))
