"""Attention for any backend, in memory linear in length: tiles of queries, softmax differentiated by hand.

The forward pass keeps q, k, v, the output and one log-sum-exp per query; the backward pass computes each tile's scores again.
Only `Dense` costs more, since its bias is quadratic already.
Source: Rabe and Staats 2021 (arXiv:2112.05682); Dao et al. 2022 (arXiv:2205.14135), Algorithm 4 for the backward pass. Here a
tile holds all keys that its queries may see, so its softmax needs no running maximum.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.attention.dropout import keep_mask
from kernels.attention.mask import AttentionMask
from kernels.attention.positions import Placement
from kernels.attention.reference import accumulator
from kernels.attention.terms import Term
from kernels.attention.tiles import Geometry, Tile, TileTerms, by_tile
from kernels.kept import kept

# One tile up to this many entries per head; beyond, tiles of so many queries.
_ONE_TILE_ENTRIES = 512 * 512
_CHUNK = 128
# Up to this many keys the backward pass is given the probabilities, no larger than q, k and v, instead of making them again.
_KEPT_KEYS = 128


@dataclass(frozen=True)
class _Plan:
    """The static part of a call."""

    geometry: Geometry
    terms: TileTerms
    scale: float | None
    rate: float
    keep: bool
    params_tree: object
    differentiable: tuple[bool, ...]


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
    chunk: int | None = None,
) -> Float[Array, "B T N W"]:
    """As `reference.attention`, for the same arguments; `chunk` is the number of queries of a tile, None chooses it."""
    geometry = _geometry(q.shape, k.shape, mask, placement, chunk)
    dtype = accumulator(q.dtype)
    tile_terms, rows, whole = TileTerms.prepare(terms, geometry, dtype)
    pad = functools.partial(_pad_keys, geometry=geometry)
    by_head = by_tile(geometry.by_group(jnp.swapaxes(q, 1, 2), axis=1), 3, geometry)
    rows["q"] = by_head.reshape(*by_head.shape[:3], geometry.groups * geometry.chunk, q.shape[3])
    whole["k"], whole["v"] = (pad(jnp.swapaxes(x, 1, 2), 2) for x in (k, v))
    fixed_scale = float(scale) if isinstance(scale, int | float) else None
    if fixed_scale is None:
        whole["scale"] = jnp.asarray(scale, dtype)
    query_segments = () if mask.query_segments is None else by_tile(mask.query_segments, 1, geometry)
    given_rows = (by_tile(placement.query.token, 1, geometry), query_segments)
    key_mask = dataclasses.replace(
        mask,
        query_segments=None,
        key_segments=None if mask.key_segments is None else pad(mask.key_segments, 1),
        key_valid=None if mask.key_valid is None else pad(mask.key_valid, 1),
    )
    leaves, tree = jax.tree.flatten(whole)
    differentiable = tuple(bool(jnp.issubdtype(x.dtype, jnp.floating)) for x in leaves)
    rate, words = (0.0, ()) if dropout is None else dropout
    given = (
        given_rows,
        (pad(placement.key.token, 1), key_mask, words),
        [x for x, d in zip(leaves, differentiable, strict=True) if not d],
    )
    plan = _Plan(
        geometry,
        tile_terms,
        fixed_scale,
        rate,
        geometry.keys <= _KEPT_KEYS and geometry.tiles == 1,
        tree,
        differentiable,
    )
    out = _core(plan, rows, [x for x, d in zip(leaves, differentiable, strict=True) if d], given)
    out = out.reshape(*out.shape[:3], geometry.groups, geometry.chunk, v.shape[3])
    # [tiles, B, K, G, chunk, Hv] → [B, T, N, Hv]
    out = jnp.moveaxis(out, (0, 4), (1, 2)).reshape(q.shape[0], -1, q.shape[2], v.shape[3])
    return out[:, : q.shape[1]]


def _geometry(q_shape, k_shape, mask: AttentionMask, placement: Placement, chunk: int | None) -> Geometry:
    batch, queries, heads, _ = q_shape
    keys, kv_heads = k_shape[1:3]
    left, right = mask.band
    reach = None if left is None or right is None or placement.offset is None else max(left, 0) + max(right, 0)
    if chunk is None:
        narrow = reach is not None and 2 * (_CHUNK + reach) <= keys
        whole = queries <= _CHUNK or (queries * keys <= _ONE_TILE_ENTRIES and not narrow)
        chunk = queries if whole else _CHUNK
    band = None if reach is None or chunk + reach >= keys else (left, right)
    width = keys if band is None else chunk + reach
    tiles = -(-queries // chunk)
    return Geometry(batch, queries, keys, kv_heads, heads // kv_heads, chunk, tiles, placement.offset, band, width)


def _pad_keys(x: Array, axis: int, *, geometry: Geometry) -> Array:
    padding = [(0, 0)] * x.ndim
    padding[axis] = geometry.key_padding
    return x if geometry.band is None else jnp.pad(x, padding)


def _by_name(plan: _Plan, floats: list[Array], others: list[Array]) -> dict:
    floats, others = iter(floats), iter(others)
    return jax.tree.unflatten(plan.params_tree, [next(floats if d else others) for d in plan.differentiable])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(plan: _Plan, rows, floats, given) -> Array:
    return _forward(plan, rows, floats, given)[0]


def _forward(plan: _Plan, rows, floats, given):
    if plan.geometry.tiles > 1:
        # Under a scan over layers JAX moves whatever does not depend on the layer out of it and keeps it for the backward pass:
        # here the masks and the biases of all tiles, which together are queries × keys. Behind the barrier all depends on q.
        rows, floats, given = jax.lax.optimization_barrier((rows, floats, given))
    given_rows, given_whole, others = given
    whole = _by_name(plan, floats, others)

    def one(number, tile_rows, tile_given):
        tile, visible = _place(plan, number, tile_given, given_whole)
        scores = _scores(plan, tile, visible, tile_rows, whole)
        top = jnp.max(scores, axis=-1, keepdims=True)
        top = jnp.where(top == -jnp.inf, 0, top)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        # An empty row has total 0: its output is zero, and +inf makes every later exp(score − lse) zero too.
        p = weights / jnp.where(total == 0, 1, total)
        saved = p if plan.keep else jnp.where(total == 0, jnp.inf, top + jnp.log(total))
        p = _drop(plan, tile, given_whole[2], p)
        out = plan.terms.outputs(tile, p, tile.of_keys(whole["v"], 2), whole)
        return out.astype(tile_rows["q"].dtype), saved

    out, softmax = kept(_over_tiles(plan, one, (rows, given_rows)))
    return out, (rows, floats, given, out, softmax)


def _backward(plan: _Plan, saved, gradient):
    rows, floats, given, out, softmax = saved
    given_rows, given_whole, others = given

    def one(total, number, tile_rows, tile_given, out, softmax, gradient):
        tile, visible = _place(plan, number, tile_given, given_whole)
        scores, pull_scores = jax.vjp(
            lambda rows, floats: _scores(plan, tile, visible, rows, _by_name(plan, floats, others)), tile_rows, floats
        )
        p = softmax if plan.keep else jnp.exp(scores - softmax)

        def outputs(p, floats):
            whole = _by_name(plan, floats, others)
            return plan.terms.outputs(tile, p, tile.of_keys(whole["v"], 2), whole)

        _, pull_outputs = jax.vjp(outputs, _drop(plan, tile, given_whole[2], p), floats)
        gradient = gradient.astype(scores.dtype)
        d_dropped, d_floats = pull_outputs(gradient)
        delta = jnp.sum(gradient * out.astype(scores.dtype), axis=-1, keepdims=True)
        d_rows, more = pull_scores(p * (_drop(plan, tile, given_whole[2], d_dropped) - delta))
        added = [a + b for a, b in zip(d_floats, more, strict=True)]
        if total is not None:
            added = [t + a.astype(t.dtype) for t, a in zip(total, added, strict=True)]
        return added, d_rows

    xs = (rows, given_rows, out, softmax, gradient)
    if plan.geometry.tiles == 1:
        total, d_rows = one(None, 0, *(jax.tree.map(lambda x: x[0], x) for x in xs))
        d_rows = jax.tree.map(lambda x: x[None], d_rows)
    else:
        zero = [jnp.zeros(x.shape, accumulator(x.dtype)) for x in floats]
        numbers = jnp.arange(plan.geometry.tiles, dtype=jnp.int32)
        total, d_rows = jax.lax.scan(lambda total, x: one(total, *x), zero, (numbers, *xs))
    return d_rows, [t.astype(x.dtype) for t, x in zip(total, floats, strict=True)], None


_core.defvjp(_forward, _backward)


def _over_tiles(plan: _Plan, one, xs):
    if plan.geometry.tiles == 1:
        return jax.tree.map(lambda x: x[None], one(0, *(jax.tree.map(lambda x: x[0], x) for x in xs)))
    numbers = jnp.arange(plan.geometry.tiles, dtype=jnp.int32)
    return jax.lax.scan(lambda _, x: (None, one(*x)), None, (numbers, *xs))[1]


def _place(plan: _Plan, number: int | Array, tile_given, given_whole) -> tuple[Tile, Array | None]:
    """The tile, and which keys its queries see: bool broadcastable to `[B, K, G·T, S]`, or None for all."""
    query_positions, query_segments = tile_given
    key_positions, mask, _ = given_whole
    anywhere = Tile(plan.geometry, number, query_positions, key_positions)
    tile = dataclasses.replace(anywhere, key_positions=anywhere.of_keys(key_positions, 1))
    mask = dataclasses.replace(
        mask,
        query_segments=None if mask.key_segments is None else query_segments,
        key_segments=None if mask.key_segments is None else tile.of_keys(mask.key_segments, 1),
        key_valid=None if mask.key_valid is None else tile.of_keys(mask.key_valid, 1),
    )
    visible = mask.visible(tile.query_positions, tile.key_positions)
    if plan.geometry.band is not None:
        index = tile.first_key + jnp.arange(plan.geometry.width, dtype=jnp.int32)
        visible = visible & ((index >= 0) & (index < plan.geometry.keys))[None, None, :]
    return tile, None if visible is None else plan.geometry.merge(visible[:, None, None])


def _scores(plan: _Plan, tile: Tile, visible: Array | None, rows, whole) -> Array:
    scale = whole["scale"] if plan.scale is None else plan.scale
    scores = plan.terms.scores(tile, rows["q"], tile.of_keys(whole["k"], 2), scale, rows, whole)
    return scores if visible is None else jnp.where(visible, scores, -jnp.inf)


def _drop(plan: _Plan, tile: Tile, words, p: Array) -> Array:
    """Dropout of the tile's probabilities, and of their cotangents: it is its own transpose."""
    if plan.rate == 0:
        return p
    g = plan.geometry
    queries = tile.first_query + jnp.arange(g.chunk, dtype=jnp.int32)
    keys = tile.first_key + jnp.arange(g.width, dtype=jnp.int32)
    keep = g.merge(g.by_group(keep_mask(words, plan.rate, g.batch, g.heads, queries, keys), axis=1))
    return jnp.where(keep, p / (1 - plan.rate), 0)
