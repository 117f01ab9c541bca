"""Fused attention for TPUs, by Pallas on Mosaic: forward and backward in memory linear in length.

What it takes: bfloat16 and float32, heads up to 256 wide, grouped keys, causal, prefix and window masks, segment ids, key padding,
dropout; any sum of `Toeplitz`, `Multiply`, `RowColumn` and `Relative` terms, with one `PiecewiseLinear`. Whatever else is asked for is refused by
name; `xla` computes it. The kernels themselves are in `pallas_tpu_passes`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.attention.core import Shape, attend
from kernels.attention.curve import of_numbers
from kernels.attention.fused import (
    BAND,
    COLUMN,
    CURVE,
    LINE,
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
from kernels.attention.pallas_tpu_bands import Band
from kernels.attention.pallas_tpu_passes import backward_keys, backward_queries, forward
from kernels.attention.pallas_tpu_plan import Clipped, Plan
from kernels.attention.positions import Placement
from kernels.attention.separable import Basis, Sides, Sums
from kernels.attention.terms import Multiply, PiecewiseLinear, Relative, RowColumn, Term, Toeplitz
from kernels.mosaic_tpu import Interpret

_COMPUTED = RowColumn | Toeplitz | Multiply | Relative | PiecewiseLinear
_WIDTHS = (32, 64, 128, 256)
_BLOCKS = (512, 256, 128)
# Bytes of on-chip memory for tables and their gradients, of the 16 MiB that a v4 has.
_TABLE_BYTES = 8 << 20
# Widths of a head that the products of clipped tables may take; with more, bands take fewer bundles (docs/kernels.md).
_MOST_PARTS = 2


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
    interpret: Interpret = False,
) -> Float[Array, "B T N W"]:
    """As `reference.attention`, for the same arguments; `interpret` runs the kernels on a CPU, which tests do.

    A traced `scale` multiplies q, in q's dtype. Heads are padded to a width of 32, 64, 128 or 256.

    Raises:
      ValueError: a dtype, width, term or mask that the kernels do not compute; says which, and what does.
    """
    reasons = refusals(q, v, terms, mask, placement)
    if reasons:
        raise ValueError(f"attention implementation 'pallas_tpu': {'; '.join(reasons)}. implementation='xla' does it")
    batch, queries, heads, _ = q.shape
    tables = tables_of(terms)
    if k.shape[2] != heads and any(x.values.shape[1] == heads for x in tables["key"]):
        k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    if not isinstance(scale, int | float):
        q, scale = (q * scale).astype(q.dtype), 1.0
    keys, kv_heads = k.shape[1:3]
    wide = _wide(q, v)
    block = _block(queries, keys)
    left, right = mask.band
    rate, words = (0.0, None) if dropout is None else dropout
    basis = _basis(terms, wide)
    plan = Plan(
        batch=batch,
        queries=up(queries, block),
        keys=up(keys, block),
        heads=heads,
        kv_heads=kv_heads,
        width=wide,
        value_width=wide,
        scale=float(scale) * math.log2(math.e),
        offset=placement.offset or 0,
        left=left,
        right=right,
        past_or_prefix=mask.prefix_length is not None,
        rate=rate,
        interpret=interpret,
        block=block,
        band=None if basis else _band(terms, placement, queries, keys),
        clipped=basis and Clipped(basis.limit, _parts(basis, wide), bool(tables["query"]), bool(tables["value"])),
    )
    given = Given.of(plan, terms, mask, placement, words, (queries, keys))
    if plan.band is not None:
        bands = bands_of(plan, tables, q.dtype, start=plan.band.start, rows=plan.band.rows)
        given = given._replace(bands=bands)
    (relative,) = [term for term in terms if isinstance(term, Relative)] if basis else (None,)
    shape = Shape.of(plan, q, v, basis, plan.clipped.parts * wide if basis else 0)
    return attend(_Passes(plan), shape, q, padded(k, plan.keys, wide), padded(v, plan.keys, wide), relative, given)


def _block(queries: int, keys: int) -> int:
    """The largest block that pads neither side by more than an eighth over what blocks of 128 need."""
    smallest = _BLOCKS[-1]
    return next(
        block
        for block in _BLOCKS
        if all(8 * up(length, block) <= 9 * up(length, smallest) for length in (queries, keys))
    )


def _wide(q: Array, v: Array) -> int:
    return next(size for size in _WIDTHS if size >= max(q.shape[3], v.shape[3]))


def _basis(terms: tuple[Term, ...], wide: int) -> Basis | None:
    """Of the call's one `Relative` with clipped tables, where its products are narrow enough to be cheaper than bands."""
    relative = [term for term in terms if isinstance(term, Relative)]
    basis = Basis.of(relative[0]) if len(relative) == 1 else None
    return basis if basis and _parts(basis, wide) <= _MOST_PARTS else None


def _parts(basis: Basis, wide: int) -> int:
    return -(-basis.width // wide)


def _band(terms: tuple[Term, ...], placement: Placement, queries: int, keys: int) -> Band | None:
    spans = [table.rows.span for tables in tables_of(terms).values() for table in tables]
    block = _block(queries, keys)
    return Band.of(max(spans), placement.offset or 0, up(queries, block), up(keys, block), block) if spans else None


def refusals(q: Array, v: Array, terms: tuple[Term, ...], mask: AttentionMask, placement: Placement) -> list[str]:
    """Why the kernels do not compute this call; empty where they do."""
    reasons = []
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        reasons.append(f"it multiplies bfloat16 and float32, not {q.dtype}")
    if max(q.shape[3], v.shape[3]) > _WIDTHS[-1]:
        reasons.append(f"its heads are at most {_WIDTHS[-1]} wide, not {max(q.shape[3], v.shape[3])}")
    other = sorted({type(term).__name__ for term in terms if not isinstance(term, _COMPUTED)})
    if other:
        reasons.append(f"it has no {' and no '.join(other)}")
    if any(isinstance(term, Multiply) and term.values.ndim == 3 for term in terms):
        reasons.append("it multiplies scores, not channels: Multiply has one value a head and distance")
    if sum(isinstance(term, PiecewiseLinear) for term in terms) > 1:
        reasons.append("it has one PiecewiseLinear at most")
    reasons += refusals_of_masks(terms, mask, placement)
    if not reasons and not _basis(terms, _wide(q, v)):
        band = _band(terms, placement, q.shape[1], v.shape[1])
        sides = sum(bool(tables) for tables in tables_of(terms).values())
        # Both are there twice: while one is computed with, the next is on its way.
        row = 2 * max(128, _wide(q, v)) * (q.dtype.itemsize + jnp.dtype(jnp.float32).itemsize)
        if band is not None and sides * band.rows * row > _TABLE_BYTES:
            most = _TABLE_BYTES // (sides * row)
            reasons.append(
                f"{sides} tables of {band.rows} distances do not fit on the chip, of which {most} do (those that differ, in whole tiles)"
            )
    return reasons


@dataclass(frozen=True)
class _Passes:
    plan: Plan

    @property
    def _axes(self) -> tuple[Sides | None, Sums]:
        clipped = self.plan.clipped
        sides = Sides.axes(clipped.scores) if clipped else None
        return sides, Sums.axes(clipped is not None and clipped.values)

    def forward(self, q: Array, k: Array, v: Array, sides: Sides | None, given: Given) -> tuple[Sums, Array]:
        of_sides, of_sums = self._axes
        operands = (q, Q), (k, K), (v, V), (sides, of_sides)
        return divided(self.plan, forward, operands, given, (of_sums, ROW))

    def backward(self, q: Array, k: Array, v: Array, sides: Sides | None, d: Sums, given: Given) -> tuple:
        of_sides, of_sums = self._axes
        operands = (q, Q), (k, K), (v, V), (sides, of_sides), (d, of_sums)
        run = functools.partial(divided, self.plan, operands=operands, given=given)
        of_keys = {name: BAND[name] for name in ("key",) if name in given.bands}
        of_given = Given(
            rows={name: ROW for name in given.rows if name == "reach"},
            columns={},
            lines=dict.fromkeys(given.lines, LINE),
            bands={name: BAND[name] for name in given.bands if name not in of_keys},
            curves=dict.fromkeys(given.curves, CURVE),
            dense={},
        )
        of_f = of_sides._replace(g=None) if of_sides else None
        dq, d_sides, found = run(backward_queries, results=(Q, of_f, of_given))
        columns = {name: COLUMN for name in given.columns if name == "bias"}
        dk, dv, d_columns, d_key = run(backward_keys, results=(K, V, columns, of_keys))
        d_bands = {name: of_band(x, given.bands[name]) for name, x in (found.bands | d_key).items()}
        d_given = given.gradients(
            rows={name: jnp.sum(x, axis=1) for name, x in found.rows.items()},
            columns=d_columns,
            lines=found.lines,
            bands=d_bands,
            curves={name: of_numbers(given.curves[name], x) for name, x in found.curves.items()},
        )
        return dq, dk, dv, d_sides, d_given
