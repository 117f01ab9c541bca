"""Attention as its definition: dense, plain `jax.numpy`, differentiated by JAX. Every other implementation is tested against it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.attention.dropout import keep_mask
from kernels.attention.mask import AttentionMask
from kernels.attention.positions import Placement
from kernels.attention.terms import (
    Dense,
    Multiply,
    Pairwise,
    PiecewiseLinear,
    Relative,
    RowColumn,
    RowMap,
    Table,
    Term,
    Toeplitz,
)


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
) -> Float[Array, "B T N W"]:
    """out_i = Σ_j p̃_ij (v_j + Σ E[ρ(r)]), p = softmax over the visible keys, p̃ = p after dropout; sizes as in `attention`."""
    heads = q.shape[2]
    scores = logits(terms, q, k, mask=mask, scale=scale, placement=placement)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    probabilities = weights / jnp.where(total == 0, 1, total)
    if dropout is not None:
        rate, words = dropout
        queries, keys = jnp.arange(q.shape[1]), jnp.arange(k.shape[1])
        keep = keep_mask(words, rate, q.shape[0], heads, queries, keys)
        probabilities = jnp.where(keep, probabilities / (1 - rate), 0)
    operand = probabilities.astype(v.dtype)
    out = _einsum("bnts,bsnh->btnh", operand, jnp.repeat(v, heads // v.shape[2], axis=2))
    for term in terms:
        if isinstance(term, Relative) and term.value is not None:
            rows = _rows(term.value, heads, placement).astype(v.dtype)
            out = out + _einsum("bnts,btsnh->btnh", operand, _over_batch(rows, q.shape[0]))
    return out.astype(q.dtype)


def logits(
    terms: tuple[Term, ...],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    *,
    mask: AttentionMask | None,
    scale: float | int | Array,
    placement: Placement,
) -> Float[Array, "B N T S"]:
    """The scores before softmax, at least float32; −inf where `mask` hides the key."""
    batch, heads, dtype = q.shape[0], q.shape[2], accumulator(q.dtype)
    k = jnp.repeat(k, heads // k.shape[2], axis=2)
    scores = _content(terms, q, k, placement)
    for term in terms:
        if isinstance(term, Relative) and term.query is not None:
            rows = _rows(term.query, heads, placement).astype(q.dtype)
            scores = scores + _einsum("btnh,btsnh->bnts", q, _over_batch(rows, batch))
        if isinstance(term, Relative) and term.key is not None:
            rows = _rows(term.key, heads, placement).astype(k.dtype)
            scores = scores + _einsum("bsnh,btsnh->bnts", k, _over_batch(rows, batch))
    scores = scores * jnp.asarray(scale, dtype)
    for term in terms:
        if isinstance(term, Multiply) and term.values.ndim == 2:
            scores = scores * _lookup(term.values, term.zero, placement).astype(dtype)
    for term in terms:
        if not isinstance(term, Relative | Multiply):
            scores = scores + _bias(term, placement, dtype)
    visible = None if mask is None else mask.visible(placement.query.token, placement.key.token)
    return scores if visible is None else jnp.where(visible[:, None], scores, -jnp.inf)


def _content(terms: tuple[Term, ...], q: Array, k: Array, placement: Placement) -> Array:
    """Σ_c q_ic k_jc Π m[n, r, c], the product over the per-channel Multiply terms."""
    channels = [t for t in terms if isinstance(t, Multiply) and t.values.ndim == 3]
    if not channels:
        return _einsum("btnh,bsnh->bnts", q, k)
    factor = 1
    for term in channels:
        factor = factor * _lookup(term.values, term.zero, placement).astype(q.dtype)
    product = jnp.einsum("btnh,bsnh->bntsh", q, k) * factor
    return jnp.sum(product, axis=-1, dtype=accumulator(q.dtype))


def _bias(term: Term, placement: Placement, dtype: jnp.dtype) -> Array:
    """What an additive term outside the scale contributes: broadcastable to `[B, N, T, S]`."""
    match term:
        case Toeplitz():
            return _lookup(term.values, term.zero, placement).astype(dtype)
        case RowColumn():
            return (term.a[..., :, None] + term.b[..., None, :]).astype(dtype)
        case PiecewiseLinear():
            distance = _lookup(term.distance[None, :], term.zero, placement).astype(dtype)
            u = distance * term.row_scale.astype(dtype)[:, None, :, None]
            line, slopes, knots = (x.astype(dtype) for x in (term.line, term.slopes, term.knots))
            above = jnp.maximum(u[..., None], knots[None, None, None, None, :])
            bent = _einsum("bxtsm,nm->bnts", above, slopes)
            return line[None, :, 0, None, None] + line[None, :, 1, None, None] * u + bent
        case Pairwise():
            values = jax.vmap(lambda i, j: term.fn(term.params, i[:, None], j[None, :]))
            return values(*_same_batch(placement.query.token, placement.key.token)).astype(dtype)
        case Dense():
            return term.bias.astype(dtype)
    raise ValueError(f"unknown term {type(term).__name__}")


def _relative_position(placement: Placement) -> Array:
    """r = j − i, int32 `[B or 1, T, S]`."""
    return placement.key.token[:, None, :] - placement.query.token[:, :, None]


def _lookup(values: Array, zero: int | None, placement: Placement) -> Array:
    """values `[N, R, ...]` at clip(r + zero, 0, R − 1): `[B or 1, N, T, S, ...]`."""
    size = values.shape[1]
    index = jnp.clip(_relative_position(placement) + ((size - 1) // 2 if zero is None else zero), 0, size - 1)
    return jnp.moveaxis(values[:, index], 0, 1)


def _rows(table: Table, heads: int, placement: Placement) -> Array:
    """A[ρ(r)] for every query head: `[B or 1, T, S, N, H]`."""
    values = jnp.repeat(table.values, heads // table.values.shape[1], axis=1)
    return values[table_rows(table.rows, _relative_position(placement))]


def table_rows(rows: RowMap, r: Array) -> Array:
    """ρ(r) for an int32 array r of any shape."""
    lookup = jnp.asarray(rows.lookup())
    return lookup[jnp.clip(r, -rows.span, rows.span) + rows.span]


def _same_batch(x: Array, y: Array) -> tuple[Array, Array]:
    size = max(x.shape[0], y.shape[0])
    return _over_batch(x, size), _over_batch(y, size)


def _over_batch(x: Array, batch: int) -> Array:
    return jnp.broadcast_to(x, (batch, *x.shape[1:]))


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of sums and softmax: float64 for float64, float32 for everything narrower."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _einsum(spec: str, x: Array, y: Array) -> Array:
    return jnp.einsum(spec, x, y, preferred_element_type=accumulator(x.dtype))
