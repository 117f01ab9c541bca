"""Fused attention for Hopper and newer GPUs, by Pallas on Mosaic GPU: forward and backward in memory linear in length.

What it takes: bfloat16 and float16, heads up to 128 wide, grouped keys, causal, prefix and window masks, segment ids, key
padding, dropout, and `RowColumn`. Whatever else is asked for is refused by name; `xla` computes it. The kernels themselves are
in `pallas_gpu_passes`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels.attention.dropout import row_words
from kernels.attention.mask import AttentionMask
from kernels.attention.pallas_gpu_passes import Given, Plan, backward_keys, backward_queries, backward_table, forward
from kernels.attention.positions import Placement
from kernels.attention.skew import expand
from kernels.attention.terms import RowColumn, Term, Toeplitz

_WIDEST = 128
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

    A traced `scale` multiplies q, in q's dtype; with a `RowColumn`, grouped keys and values are repeated for their heads.

    Raises:
      ValueError: a dtype, width, term or mask that the kernels do not compute; says which, and what does.
    """
    reasons = refusals(q, v, terms, mask, placement)
    if reasons:
        raise ValueError(f"attention implementation 'pallas_gpu': {'; '.join(reasons)}. implementation='xla' does it")
    batch, queries, heads, width = q.shape
    if not isinstance(scale, int | float):
        q, scale = (q * scale).astype(q.dtype), 1.0
    if any(isinstance(term, RowColumn) for term in terms) and k.shape[2] != heads:
        k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    keys, kv_heads = k.shape[1:3]
    left, right = mask.band
    rate, words = (0.0, None) if dropout is None else dropout
    plan = Plan(
        batch=batch,
        queries=_up(queries, _TILE),
        keys=_up(keys, _TILE),
        heads=heads,
        kv_heads=kv_heads,
        width=_up(width, 32),
        value_width=_up(v.shape[3], 32),
        scale=float(scale) * math.log2(math.e),
        offset=placement.offset or 0,
        left=left,
        right=right,
        past_or_prefix=mask.prefix_length is not None,
        column_bias=any(isinstance(term, RowColumn) for term in terms),
        rate=rate,
        interpret=interpret,
    )
    given = _given(plan, terms, mask, placement, words, (queries, keys))
    padded = (
        _pad(x, length, plan_width)
        for x, length, plan_width in (
            (q, plan.queries, plan.width),
            (k, plan.keys, plan.width),
            (v, plan.keys, plan.value_width),
        )
    )
    return _core(plan, *padded, given)[:, :queries, :, : v.shape[3]]


def refusals(q: Array, v: Array, terms: tuple[Term, ...], mask: AttentionMask, placement: Placement) -> list[str]:
    """Why the kernels do not compute this call; empty where they do."""
    reasons = []
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        reasons.append(f"it multiplies bfloat16 and float16, not {q.dtype}")
    if max(q.shape[3], v.shape[3]) > _WIDEST:
        reasons.append(f"its heads are at most {_WIDEST} wide, not {max(q.shape[3], v.shape[3])}")
    other = sorted({type(term).__name__ for term in terms if not isinstance(term, RowColumn | Toeplitz)})
    if other:
        reasons.append(f"it has no {' and no '.join(other)}")
    if mask.block is not None:
        reasons.append("it has no block mask")
    by_distance = mask.causal or mask.window is not None or any(isinstance(term, Toeplitz) for term in terms)
    if placement.offset is None and by_distance:
        reasons.append("distances need contiguous positions, the same struct for queries and keys")
    return reasons


def _given(
    plan: Plan, terms: tuple[Term, ...], mask: AttentionMask, placement: Placement, words: Array | None, lengths
) -> Given:
    queries, keys = lengths
    rows: dict[str, Array] = {}
    columns: dict[str, Array] = {}
    if plan.past_or_prefix:
        in_prefix = placement.key.token < mask.prefix_length[:, None]
        columns["prefix"] = _pad(in_prefix.astype(jnp.int32), plan.keys)
    if mask.query_segments is not None or mask.key_valid is not None or keys != plan.keys:
        # A key of segment 0 is seen by no query, a query of segment −1 sees no key.
        ones = functools.partial(jnp.ones, dtype=jnp.int32)
        own = ones((plan.batch, queries)) if mask.query_segments is None else mask.query_segments.astype(jnp.int32)
        of_keys = ones((plan.batch, keys)) if mask.key_segments is None else mask.key_segments.astype(jnp.int32)
        if mask.key_valid is not None:
            of_keys = jnp.where(mask.key_valid, of_keys, 0)
        rows["segments"] = _pad(jnp.where(own > 0, own, -1), plan.queries)
        columns["segments"] = _pad(of_keys, plan.keys)
    if plan.rate > 0:
        index = jnp.arange(plan.queries, dtype=jnp.int32)
        rows["first"], rows["second"] = row_words(words, plan.batch, plan.heads, index)
    biases = [term.b for term in terms if isinstance(term, RowColumn)]
    if biases:
        # `a` is the same for all keys of a query: softmax does not see it, and its gradient is zero.
        bias = functools.reduce(jnp.add, (b.astype(jnp.float32) for b in biases)) * math.log2(math.e)
        columns["bias"] = jnp.pad(bias, ((0, 0), (0, 0), (0, plan.keys - keys)))
    tables = [_line(term, plan) for term in terms if isinstance(term, Toeplitz)]
    table = functools.reduce(jnp.add, tables) * math.log2(math.e) if tables else None
    return Given(rows, columns, table)


def _line(term: Toeplitz, plan: Plan) -> Array:
    """`[N, T + S − 1]`: the term's values from the smallest relative position of the padded lengths on."""
    size = term.values.shape[1]
    zero = (size - 1) // 2 if term.zero is None else term.zero
    r = np.arange(plan.queries + plan.keys - 1) + plan.least
    return expand(term.values.astype(jnp.float32), np.clip(r + zero, 0, size - 1), axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(plan: Plan, q, k, v, given):
    return _forward(plan, q, k, v, given)[0]


def _forward(plan: Plan, q, k, v, given):
    out, lse = forward(plan, q, k, v, given)
    return out, (q, k, v, given, out, lse)


def _backward(plan: Plan, saved: Any, gradient: Array):
    q, k, v, given, out, lse = saved
    delta = jnp.einsum("btnh,btnh->bnt", gradient.astype(jnp.float32), out.astype(jnp.float32))
    with_sums = given.with_rows(lse=lse, delta=delta)
    dq = backward_queries(plan, q, k, v, gradient, with_sums)
    dk, dv, db = backward_keys(plan, q, k, v, gradient, with_sums)
    # The bias and the table are in base 2, their gradients come in base e.
    d_columns = {name: db * math.log(2) if name == "bias" else None for name in given.columns}
    d_table = None
    if given.table is not None:
        d_table = backward_table(plan, q, k, v, gradient, with_sums) * math.log(2)
    return dq, dk, dv, Given(dict.fromkeys(given.rows), d_columns, d_table)


_core.defvjp(_forward, _backward)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _pad(x: Array, length: int, width: int | None = None) -> Array:
    """Zeros up to `length` along axis 1, and up to `width` along the last."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, length - x.shape[1])
    if width is not None:
        padding[-1] = (0, width - x.shape[-1])
    return jnp.pad(x, padding)
