"""Attention by a platform's fused kernels, with its derivative: what is the same on all of them.

Kernels compute `Sums` from q, k, v and `Sides` (`separable`); clipped tables become sides before and are joined to the sums behind. The sides are made
anew for the backward pass, the sums are kept: δ_i = Σ_j p_ij dP_ij is ⟨dO_i, O_i⟩ too, but a table that gives most of O, as NEZHA's may, would have its
rounding to bfloat16 in every score's gradient.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.attention.fused import Call, Given, padded
from kernels.attention.separable import Basis, Sides, Sums
from kernels.attention.terms import Relative
from kernels.kept import kept


@runtime_checkable
class Passes(Protocol):
    """The kernels of a platform for one call; hashable."""

    def forward(self, q: Array, k: Array, v: Array, sides: Sides | None, given: Given) -> tuple[Sums, Array]:
        """(sums, lse `[B, N, T]`) of padded q, k and v."""

    def backward(
        self, q: Array, k: Array, v: Array, sides: Sides | None, d: Sums, given: Given
    ) -> tuple[Array, Array, Array, Sides | None, Given]:
        """The cotangents of q, k, v, sides (but for g) and given; `given` has the rows lse and delta."""


@dataclass(frozen=True)
class Shape:
    """A call as it was asked for, and to what q and g are padded for the kernels."""

    length: int  # of queries
    width: int  # of q
    value_width: int
    queries: int
    keys: int
    padded_width: int
    offset: int
    basis: Basis | None  # of clipped tables
    basis_width: int

    @classmethod
    def of(cls, call: Call, q: Array, v: Array, basis: Basis | None, basis_width: int) -> Shape:
        """Of q and v before they are padded."""
        length, width = q.shape[1], q.shape[3]
        return cls(length, width, v.shape[3], call.queries, call.keys, call.width, call.offset, basis, basis_width)

    def padded(self, q: Float[Array, "B T N H"]) -> Array:
        return padded(q, self.queries, self.padded_width)

    def cut(self, dq: Array) -> Float[Array, "B T N H"]:
        return dq[:, : self.length, :, : self.width]

    def sides(self, relative: Relative, q: Float[Array, "B T N H"]) -> Sides:
        like = self.queries, self.keys, self.basis_width
        return Sides.of(self.basis, relative, q, offset=self.offset, like=like)

    def joined(self, sums: Sums, relative: Relative | None) -> Float[Array, "B T N W"]:
        if relative is None or relative.value is None:
            return sums.out[:, : self.length, :, : self.value_width]
        return sums.joined(self.basis, relative.value, offset=self.offset, length=self.length, width=self.value_width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(
    passes: Passes, shape: Shape, q: Array, k: Array, v: Array, relative: Relative | None, given: Given
) -> Array:
    """out `[B, T, N, W]` of q `[B, T, N, H]` and padded k and v; `relative` holds the tables of `shape.basis`."""
    return _forward(passes, shape, q, k, v, relative, given)[0]


def _forward(passes: Passes, shape: Shape, q, k, v, relative, given):
    sides = None if relative is None else shape.sides(relative, q)
    sums, lse = kept(passes.forward(shape.padded(q), k, v, sides, given))
    return shape.joined(sums, relative), (q, k, v, relative, given, sums, lse)


def _backward(passes: Passes, shape: Shape, saved: Any, gradient: Array):
    q, k, v, relative, given, sums, lse = saved
    _, of_output = jax.vjp(shape.joined, sums, relative)
    d_sums, d_relative = of_output(gradient)
    given = given.with_rows(lse=lse, delta=sums.along(d_sums))
    if relative is None:
        dq, dk, dv, _, d_given = passes.backward(shape.padded(q), k, v, None, d_sums, given)
        return shape.cut(dq), dk, dv, None, d_given
    sides, of_sides = jax.vjp(shape.sides, relative, q)
    dq, dk, dv, d_sides, d_given = passes.backward(shape.padded(q), k, v, sides, d_sums, given)
    more, dq_of_sides = of_sides(d_sides._replace(g=jnp.zeros_like(sides.g)))
    return shape.cut(dq) + dq_of_sides, dk, dv, jax.tree.map(jnp.add, d_relative, more), d_given


attend.defvjp(_forward, _backward)
