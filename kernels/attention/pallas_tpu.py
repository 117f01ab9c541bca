"""Fused attention for TPUs, by Pallas on Mosaic: forward and backward in memory linear in length.

What it takes: bfloat16 and float32, heads up to 256 wide, grouped keys, causal, prefix and window masks, segment ids, key padding,
dropout; any sum of `Toeplitz`, `Multiply` and `RowColumn` terms. Whatever else is asked for is refused by name; `xla` computes it. The
kernels themselves are in `pallas_tpu_passes`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.attention.fused import COLUMN, OUT, ROW, Given, K, Q, V, divided, dots, padded, refusals_of_masks, up
from kernels.attention.mask import AttentionMask
from kernels.attention.pallas_tpu_passes import Plan, backward_keys, backward_queries, forward
from kernels.attention.positions import Placement
from kernels.attention.terms import Multiply, RowColumn, Term, Toeplitz
from kernels.mosaic_tpu import Interpret

_WIDTHS = (32, 64, 128, 256)
_BLOCKS = (512, 256, 128)
OF_LINE = "b n r"


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
    batch, queries, heads, width = q.shape
    if not isinstance(scale, int | float):
        q, scale = (q * scale).astype(q.dtype), 1.0
    (keys, kv_heads), value_width = k.shape[1:3], v.shape[3]
    wide = next(size for size in _WIDTHS if size >= max(width, value_width))
    block = _block(queries, keys)
    left, right = mask.band
    rate, words = (0.0, None) if dropout is None else dropout
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
    )
    given = Given.of(plan, terms, mask, placement, words, (queries, keys))
    q, k, v = padded(q, plan.queries, wide), padded(k, plan.keys, wide), padded(v, plan.keys, wide)
    return _core(plan, q, k, v, given)[:, :queries, :, :value_width]


def _block(queries: int, keys: int) -> int:
    """The largest block that pads neither side by more than an eighth over what blocks of 128 need."""
    smallest = _BLOCKS[-1]
    return next(
        block
        for block in _BLOCKS
        if all(8 * up(length, block) <= 9 * up(length, smallest) for length in (queries, keys))
    )


def refusals(q: Array, v: Array, terms: tuple[Term, ...], mask: AttentionMask, placement: Placement) -> list[str]:
    """Why the kernels do not compute this call; empty where they do."""
    reasons = []
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        reasons.append(f"it multiplies bfloat16 and float32, not {q.dtype}")
    if max(q.shape[3], v.shape[3]) > _WIDTHS[-1]:
        reasons.append(f"its heads are at most {_WIDTHS[-1]} wide, not {max(q.shape[3], v.shape[3])}")
    other = sorted({type(term).__name__ for term in terms if not isinstance(term, RowColumn | Toeplitz | Multiply)})
    if other:
        reasons.append(f"it has no {' and no '.join(other)}")
    if any(isinstance(term, Multiply) and term.values.ndim == 3 for term in terms):
        reasons.append("it multiplies scores, not channels: Multiply has one value a head and distance")
    return reasons + refusals_of_masks(terms, mask, placement)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(plan: Plan, q, k, v, given):
    return _forward(plan, q, k, v, given)[0]


def _forward(plan: Plan, q, k, v, given):
    out, lse = divided(plan, forward, ((q, Q), (k, K), (v, V)), given, (OUT, ROW))
    return out, (q, k, v, given, out, lse)


def _backward(plan: Plan, saved: Any, gradient: Array):
    q, k, v, given, out, lse = saved
    given = given.with_rows(lse=lse, delta=dots(gradient, out))
    operands = ((q, Q), (k, K), (v, V), (gradient, OUT))
    run = functools.partial(divided, plan, operands=operands, given=given)
    dq, *d_lines = run(_leaves(backward_queries), results=(Q, *(OF_LINE for _ in given.lines)))
    biased = ["bias"] if "bias" in given.columns else []
    dk, dv, *d_columns = run(_leaves(backward_keys), results=(K, V, *(COLUMN for _ in biased)))
    lines = {name: jnp.sum(x, axis=0) for name, x in zip(sorted(given.lines), d_lines, strict=True)}
    return dq, dk, dv, given.gradients(dict(zip(biased, d_columns, strict=True)), lines)


def _leaves(function):
    return lambda *parts: tuple(jax.tree.leaves(function(*parts)))


_core.defvjp(_forward, _backward)
