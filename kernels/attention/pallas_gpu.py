"""Fused attention for Hopper and newer GPUs, by Pallas on Mosaic GPU: forward and backward in memory linear in length.

What it takes: bfloat16 and float16, heads up to 128 wide, grouped keys, causal, prefix and window masks, segment ids, key
padding, dropout; any sum of `Toeplitz`, `RowColumn` and `Dense` terms with one `PiecewiseLinear`; one `Relative` with query and value
tables of one clip; or `Relative` terms with query and key tables of any map of rows (heads up to 64 wide), beside `Toeplitz` and `RowColumn`. Whatever
else is asked for is refused by name; `xla` computes it. Of a `Dense` bias, quadratic as it is, memory holds a padded copy and a
transposed one, and its sum where there are several. The kernels themselves are in `pallas_gpu_passes`, `pallas_gpu_dense`, `pallas_gpu_bands` and
`pallas_gpu_relative`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.attention import pallas_gpu_relative
from kernels.attention.core import Shape, attend
from kernels.attention.curve import of_numbers
from kernels.attention.fused import (
    BAND,
    CURVE,
    DENSE,
    LINE,
    OUT,
    ROW,
    Given,
    K,
    Q,
    V,
    divided,
    padded,
    refusals_of_masks,
    up,
)
from kernels.attention.laid_out import bands_of, of_band, tables_of
from kernels.attention.mask import AttentionMask
from kernels.attention.pallas_gpu_bands import backward_table
from kernels.attention.pallas_gpu_dense import backward_bias
from kernels.attention.pallas_gpu_passes import OfQueries, backward_keys, backward_queries, forward
from kernels.attention.pallas_gpu_plan import Plan
from kernels.attention.pallas_gpu_relative import Band
from kernels.attention.positions import Placement
from kernels.attention.separable import Basis, Sides, Sums
from kernels.attention.terms import Dense, PiecewiseLinear, Relative, RowColumn, Term, Toeplitz

_WIDEST, _WIDEST_MET = 128, 64  # heads; those that meet tables of any map of rows
_TILE = 128  # lengths are padded to a multiple of it, with keys that nobody sees


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K W"],
    *,
    terms: tuple[Term, ...],
    mask: AttentionMask,
    scale: float | int | Array,
    placement: Placement,
    dropout: tuple[float, Array] | None,
    interpret: bool = False,
) -> Float[Array, "B T N W"]:
    """As `reference.attention`, for the same arguments; `interpret` runs the kernels on a CPU, which tests do.

    A traced `scale` multiplies q, in q's dtype; with a `RowColumn` or a key table for each query head, grouped keys and values are repeated for
    their heads.

    Raises:
      ValueError: a dtype, width, term or mask that the kernels do not compute; says which, and what does.
    """
    reasons = refusals(q, v, terms, mask, placement)
    if reasons:
        raise ValueError(f"attention implementation 'pallas_gpu': {'; '.join(reasons)}. implementation='xla' does it")
    batch, queries, heads, width = q.shape
    if not isinstance(scale, int | float):
        q, scale = (q * scale).astype(q.dtype), 1.0
    tables = tables_of(terms)
    of_heads = any(isinstance(term, RowColumn) for term in terms) or any(
        table.values.shape[1] == heads for table in tables["key"]
    )
    if of_heads and k.shape[2] != heads:
        k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    (keys, kv_heads), value_width = k.shape[1:3], v.shape[3]
    left, right = mask.band
    basis = _basis(terms)
    met = basis is None and any(tables.values())
    widths = up(width, 32), up(value_width, 32)
    if basis is not None:
        widths = (max(widths),) * 2  # its kernels put results where the operands were
    rate, words = (0.0, None) if dropout is None else dropout
    plan = Plan(
        batch=batch,
        queries=up(queries, _TILE),
        keys=up(keys, _TILE),
        heads=heads,
        kv_heads=kv_heads,
        width=widths[0],
        value_width=widths[1],
        scale=float(scale) * math.log2(math.e),
        offset=placement.offset or 0,
        left=left,
        right=right,
        past_or_prefix=mask.prefix_length is not None,
        rate=rate,
        interpret=interpret,
        column_bias=any(isinstance(term, RowColumn) for term in terms),
        dense_bytes=0,
        curved=any(isinstance(term, PiecewiseLinear) for term in terms),
        met=met,
    )
    given = Given.of(plan, terms, mask, placement, words, (queries, keys))
    if given.dense:
        plan = dataclasses.replace(plan, dense_bytes=given.dense["bias"].dtype.itemsize)
    if met:
        bands = bands_of(plan, tables, q.dtype, start=-plan.queries, rows=plan.queries + plan.keys)
        given = given._replace(bands=bands)
    relative = band = None
    if basis is not None:
        (relative,) = terms
        band = Band(plan, basis.limit, up(basis.width, 32), relative.query is not None, relative.value is not None)
    shape = Shape.of(plan, q, v, basis, band.width if band else 0)
    k, v = padded(k, plan.keys, plan.width), padded(v, plan.keys, plan.value_width)
    return attend(_Clipped(band) if band else _Plain(plan), shape, q, k, v, relative, given)


def _basis(terms: tuple[Term, ...]) -> Basis | None:
    """Of the call's one term, where its tables are products of two sides that are narrow enough."""
    if len(terms) != 1 or not isinstance(terms[0], Relative):
        return None
    basis = Basis.of(terms[0])
    return basis if basis is not None and basis.width <= _WIDEST else None


def refusals(q: Array, v: Array, terms: tuple[Term, ...], mask: AttentionMask, placement: Placement) -> list[str]:
    """Why the kernels do not compute this call; empty where they do."""
    reasons = []
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        reasons.append(f"it multiplies bfloat16 and float16, not {q.dtype}")
    wide = max(q.shape[3], v.shape[3])
    if wide > _WIDEST:
        reasons.append(f"its heads are at most {_WIDEST} wide, not {wide}")
    taken = RowColumn | Toeplitz | Dense | PiecewiseLinear | Relative
    other = sorted({type(term).__name__ for term in terms if not isinstance(term, taken)})
    if other:
        reasons.append(f"it has no {' and no '.join(other)}")
    if sum(isinstance(term, PiecewiseLinear) for term in terms) > 1:
        reasons.append("it has one PiecewiseLinear at most")
    tables = tables_of(terms)
    if any(tables.values()) and _basis(terms) is None:
        if tables["value"]:
            reasons.append(
                "of value tables it has those alone whose rows, and those of a query table beside it, are one Clip, at most at "
                f"{_WIDEST // 2}, with no key table and no other term"
            )
        if wide > _WIDEST_MET:
            reasons.append(f"its heads are at most {_WIDEST_MET} wide, not {wide}, where they meet such tables")
        if any(isinstance(term, Dense | PiecewiseLinear) for term in terms):
            reasons.append("it has no Relative beside Dense or PiecewiseLinear")
    return reasons + refusals_of_masks(terms, mask, placement)


@dataclass(frozen=True)
class _Plain:
    """Without clipped tables."""

    plan: Plan

    def forward(self, q: Array, k: Array, v: Array, sides: None, given: Given) -> tuple[Sums, Array]:
        operands = (q, Q), (k, K), (v, V)
        out, lse = divided(self.plan, forward, operands, given, (OUT, ROW))
        return Sums(out, None, None, None), lse

    def backward(self, q: Array, k: Array, v: Array, sides: None, d: Sums, given: Given) -> tuple:
        operands = (q, Q), (k, K), (v, V), (d.out, OUT)
        run = functools.partial(divided, self.plan, operands=operands, given=given)
        bands = {
            side: of_band(*run(functools.partial(backward_table, side), results=(BAND[side],)), band)
            for side, band in given.bands.items()
        }
        axes = OfQueries(
            Q,
            dict.fromkeys(given.lines, LINE),
            dict.fromkeys(given.curves, CURVE),
            {"reach": ROW} if given.curves else {},
        )
        of_queries = run(backward_queries, results=axes)
        dk, dv, db = run(backward_keys, results=(K, V, "b m s"))
        dense = {name: self._of_bias(x, *run(backward_bias, results=(DENSE,))) for name, x in given.dense.items()}
        of_given = given.gradients(
            rows={name: jnp.sum(x, axis=1) for name, x in of_queries.rows.items()},
            columns={"bias": db},
            lines=of_queries.lines,
            curves={name: of_numbers(given.curves[name], x) for name, x in of_queries.curves.items()},
            dense=dense,
            bands=bands,
        )
        return of_queries.dq, dk, dv, None, of_given

    def _of_bias(self, bias: Array, parts: Array) -> Array:
        """The sum over the devices that share a bias: along its axes of length 1 each has given a part of its own."""
        shared = tuple(axis for axis in (0, 1) if bias.shape[axis] == 1)
        return jnp.sum(parts, axis=shared, keepdims=True).astype(bias.dtype)


@dataclass(frozen=True)
class _Clipped:
    """With clipped tables."""

    band: Band

    def forward(self, q: Array, k: Array, v: Array, sides: Sides, given: Given) -> tuple[Sums, Array]:
        of_sides, of_sums = self._axes
        operands = (q, Q), (k, K), (v, V), (sides, of_sides)
        return divided(self.band.plan, self._run(pallas_gpu_relative.forward), operands, given, (of_sums, ROW))

    def backward(self, q: Array, k: Array, v: Array, sides: Sides, d: Sums, given: Given) -> tuple:
        of_sides, of_sums = self._axes
        operands = (q, Q), (k, K), (v, V), (sides, of_sides), (d, of_sums)
        run = functools.partial(divided, self.band.plan, operands=operands, given=given)
        of_queries, of_keys = (
            self._run(f) for f in (pallas_gpu_relative.backward_queries, pallas_gpu_relative.backward_keys)
        )
        dq, d_sides = run(of_queries, results=(Q, of_sides._replace(g=None)))
        dk, dv = run(of_keys, results=(K, V))
        return dq, dk, dv, d_sides, given.gradients()

    def _run(self, function: Callable[..., tuple]) -> Callable[..., tuple]:
        """The function of a `Band`, of the plan that a device has."""
        return lambda here, *parts: function(dataclasses.replace(self.band, plan=here), *parts)

    @property
    def _axes(self) -> tuple[Sides, Sums]:
        return Sides.axes(self.band.scores), Sums.axes(self.band.values)
