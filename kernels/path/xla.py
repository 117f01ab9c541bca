"""PaTH attention for any backend, in memory linear in length: tiles of queries walk back over blocks of keys.

The path over a whole block is H_c … H_1 = I − Wᵀ U, so a query passes c tokens by two products. Everything within blocks is
`compact`, which JAX differentiates; the walk from block to block is differentiated by hand. The forward pass keeps its
arguments, the output and one log-sum-exp per query. The backward pass walks again and keeps one tile's queries at every block,
since a projection (β = 1) cannot be undone.
Source: Yang et al. 2025 (arXiv:2505.16381), section 3. Here a tile holds the scores of all keys, so its softmax needs no running
maximum; the backward pass of the walk is our own.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.attention import AttentionMask, Dense, RowColumn, Term
from kernels.attention.dropout import keep_mask
from kernels.attention.positions import Placement
from kernels.attention.reference import accumulator
from kernels.attention.sums import restarting_sums
from kernels.attention.tiles import Geometry, Tile, TileTerms, by_tile
from kernels.kept import kept

# The solve of a block loses digits as it grows, and the work within blocks grows with it.
_BLOCK = 64


@dataclass(frozen=True)
class _Plan:
    """The static part of a call.

    Tile number t of the queries stands at block `first_block` + t of the keys, of which `front` were added before the first
    one. A tile sees no key more than `reach` blocks before its own.
    """

    geometry: Geometry
    terms: TileTerms
    rate: float
    front: int
    reach: int
    dtype: jnp.dtype
    params_tree: object
    differentiable: tuple[bool, ...]

    @property
    def blocks(self) -> int:
        return self.geometry.keys // self.geometry.chunk

    @property
    def first_block(self) -> int:
        return self.blocks - self.geometry.tiles

    def product(self, spec: str, x: Array, y: Array) -> Array:
        """An einsum with operands in the dtype of the call and sums in float32 at least."""
        wide = accumulator(self.dtype)
        return jnp.einsum(spec, x.astype(self.dtype), y.astype(self.dtype), preferred_element_type=wide)


def path_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K W"],
    w: Float[Array, "B S K H"],
    beta: Float[Array, "B S K"],
    log_forget: Float[Array, "B S N"] | None,
    *,
    terms: tuple[Term, ...],
    mask: AttentionMask,
    scale: float | int | Array,
    placement: Placement,
    dropout: tuple[float, Array] | None,
) -> Float[Array, "B T N W"]:
    """As `reference.path_attention`, for the same arguments."""
    geometry, front = _geometry(q.shape, k.shape, placement)
    wide = accumulator(q.dtype)
    pad = functools.partial(_pad_keys, front=front, length=geometry.keys)
    if log_forget is not None:
        terms = (*terms, gate_biases(log_forget, mask, q.shape[1]))
    tile_terms, rows, whole = TileTerms.prepare(tuple(_padded(term, pad) for term in terms), geometry, wide)
    scaled = q.astype(wide) * jnp.asarray(scale, wide)
    queries = by_tile(geometry.by_group(jnp.swapaxes(scaled, 1, 2), axis=1), 3, geometry)
    k, w, beta = (_by_block(pad(x.astype(wide)), geometry.chunk) for x in (k, w, beta))
    rows["q"], rows["local"], k, u = compact(queries, k, w, beta)
    keys = (k, w, u, pad(jnp.swapaxes(v, 1, 2), axis=2))

    query_segments = () if mask.query_segments is None else by_tile(mask.query_segments, 1, geometry)
    key_mask = dataclasses.replace(
        mask,
        query_segments=None,
        key_segments=None if mask.key_segments is None else pad(mask.key_segments),
        key_valid=None if mask.key_valid is None else pad(mask.key_valid),
    )
    leaves, tree = jax.tree.flatten(whole)
    differentiable = tuple(bool(jnp.issubdtype(x.dtype, jnp.floating)) for x in leaves)
    rate, words = (0.0, ()) if dropout is None else dropout
    given = (
        (by_tile(placement.query.token, 1, geometry), query_segments),
        (pad(placement.key.token), key_mask, words),
        [x for x, d in zip(leaves, differentiable, strict=True) if not d],
    )
    reach = _reach(mask, placement, geometry)
    plan = _Plan(geometry, tile_terms, rate, front, reach, jnp.dtype(q.dtype), tree, differentiable)
    out = _core(plan, rows, keys, [x for x, d in zip(leaves, differentiable, strict=True) if d], given)
    out = out.reshape(*out.shape[:3], geometry.groups, geometry.chunk, v.shape[3])
    # [tiles, B, K, G, c, Hv] → [B, T, N, Hv]
    out = jnp.moveaxis(out, (0, 4), (1, 2)).reshape(q.shape[0], -1, q.shape[2], v.shape[3])
    return out[:, : q.shape[1]]


def compact(
    q: Float[Array, "tiles B K G c H"],
    k: Float[Array, "blocks B K c H"],
    w: Float[Array, "blocks B K c H"],
    beta: Float[Array, "blocks B K c"],
) -> tuple[Array, Array, Array, Array]:
    """What the tokens of a block are to those of others and to each other: (q̃, local, k̃, U).

    With A = tril(β W Wᵀ, −1) and C = (I + A)⁻¹ diag(β), of which the part of any run of tokens is that of the run alone:

        U = C W            H_c … H_1 = I − Wᵀ U
        q̃ = q − tril(q Wᵀ) U                                 q_iᵀ H_i … H_1: the query at the start of its block
        k̃ = k − (C tril(W kᵀ, −1))ᵀ W                        H_c … H_{j+1} k_j: the key at the end of its block
        local = q kᵀ − tril(q Wᵀ) C tril(W kᵀ, −1)           q_iᵀ H_i … H_{j+1} k_j, for j ≤ i

    q̃ is `[tiles, B, K, G·c, H]` and local `[tiles, B, K, G·c, c]`. The tiles of queries stand at the last blocks.
    """
    times = functools.partial(jnp.einsum, precision="highest")
    size = k.shape[3]
    among = beta[..., None] * jnp.tril(times("nbksh,nbkth->nbkst", w, w), -1)
    c = inverse(among) * beta[..., None, :]
    u = times("nbkst,nbkth->nbksh", c, w)
    met_by_keys = times("nbkst,nbktu->nbksu", c, jnp.tril(times("nbksh,nbkth->nbkst", w, k), -1))
    keys = k - times("nbkst,nbksh->nbkth", met_by_keys, w)
    here = slice(k.shape[0] - q.shape[0], None)
    met_by_queries = jnp.tril(times("nbkgqh,nbksh->nbkgqs", q, w[here]))
    queries = q - times("nbkgqs,nbksh->nbkgqh", met_by_queries, u[here])
    local = times("nbkgqh,nbksh->nbkgqs", q, k[here])
    local = local - times("nbkgqs,nbkst->nbkgqt", met_by_queries, met_by_keys[here])
    queries, local = (x.reshape(*x.shape[:3], x.shape[3] * size, x.shape[5]) for x in (queries, local))
    return queries, local, keys, u


def inverse(strictly_lower: Float[Array, "*batch c c"]) -> Float[Array, "*batch c c"]:
    """(I + A)⁻¹ of a strictly lower triangular A, from blocks of 1 that are joined two by two: exact steps, no powers of A.

    [[L, 0], [M, N]]⁻¹ = [[L⁻¹, 0], [−N⁻¹ M L⁻¹, N⁻¹]]. By products alone: on CPUs jaxlib (0.10) hands a batch of triangular solves
    to the threads that run the program, and two such at a time wait for each other for ever.
    """
    times = functools.partial(jnp.matmul, precision="highest")
    size = strictly_lower.shape[-1]
    whole = 1 << (size - 1).bit_length()
    padding = [(0, 0)] * (strictly_lower.ndim - 2) + [(0, whole - size)] * 2
    a = jnp.pad(strictly_lower, padding)
    inverses = jnp.ones((*a.shape[:-2], whole, 1, 1), a.dtype)
    while (half := inverses.shape[-1]) < whole:
        pairs = whole // (2 * half)
        blocks = a.reshape(*a.shape[:-2], pairs, 2, half, pairs, 2, half)
        below = jnp.moveaxis(jnp.diagonal(blocks[..., 1, :, :, 0, :], axis1=-4, axis2=-2), -1, -3)
        upper, lower = inverses[..., 0::2, :, :], inverses[..., 1::2, :, :]
        corner = -times(lower, times(below, upper))
        top = jnp.concatenate([upper, jnp.zeros_like(upper)], axis=-1)
        inverses = jnp.concatenate([top, jnp.concatenate([corner, lower], axis=-1)], axis=-2)
    return inverses[..., 0, :size, :size]


def carried(
    k: Float[Array, "B S K H"], w: Float[Array, "B S K H"], beta: Float[Array, "B S K"], before: Float[Array, "B P K H"]
) -> Float[Array, "B _ K H"]:
    """H_S … H_{j+1} k_j for `before` and k, in work linear in length: what a block of tokens does to a key is one matrix `[H, H]`."""
    wide, size = accumulator(before.dtype), _block_size(k.shape[1])
    times = functools.partial(jnp.einsum, precision="highest")
    pad = functools.partial(_pad_keys, front=0, length=-(-k.shape[1] // size) * size)
    own, w, beta = (_by_block(pad(x.astype(wide)), size) for x in (k, w, beta))
    _, _, own, u = compact(own[:0, :, :, None], own, w, beta)
    keys = jnp.swapaxes(before.astype(wide), 1, 2)
    if own.shape[0] == 1:  # a few tokens, as while decoding: their own product is thinner than a matrix
        keys = keys - times("bksc,bkch->bksh", times("bksh,bkch->bksc", keys, u[0]), w[0])
    else:
        one = jnp.eye(k.shape[3], dtype=wide)
        p = one[None, None, None] - times("nbkch,nbkcj->nbkhj", w, u)

        # What the blocks behind each one do, and all of them.
        def step(behind: Array, p: Array) -> tuple[Array, Array]:
            return times("bkhi,bkij->bkhj", behind, p), behind

        whole, behind = jax.lax.scan(step, jnp.broadcast_to(one, p.shape[1:]), p, reverse=True)
        own = times("nbkch,nbkjh->nbkcj", own, behind)
        keys = times("bksh,bkjh->bksj", keys, whole)
    own = jnp.moveaxis(own, 0, 2).reshape(*own.shape[1:3], -1, own.shape[4])[:, :, : k.shape[1]]
    return jnp.swapaxes(jnp.concatenate([keys, own], axis=2), 1, 2).astype(before.dtype)


def _block_size(keys: int) -> int:
    """At most `_BLOCK`, and such that the last block is not mostly padding."""
    blocks = max(1, -(-keys // _BLOCK))
    return max(1, keys) if blocks == 1 else -(-keys // (8 * blocks)) * 8


def _geometry(q_shape, k_shape, placement: Placement) -> tuple[Geometry, int]:
    """Tiles and blocks that begin at the same tokens, and how many keys are added before the first for that."""
    batch, queries, heads, _ = q_shape
    keys, kv_heads = k_shape[1:3]
    size = _block_size(keys)
    front = (queries - keys) % size
    offset, tiles = keys - queries + front, -(-queries // size)
    whole = offset + tiles * size
    offset = None if placement.offset is None else offset
    return Geometry(batch, queries, whole, kv_heads, heads // kv_heads, size, tiles, offset, None, whole), front


def _reach(mask: AttentionMask, placement: Placement, geometry: Geometry) -> int:
    left = mask.band[0]
    everything = geometry.keys // geometry.chunk
    return everything if left is None or placement.offset is None else min(everything, -(-left // geometry.chunk))


def _pad_keys(x: Array, axis: int = 1, *, front: int, length: int) -> Array:
    padding = [(0, 0)] * x.ndim
    padding[axis] = (front, length - front - x.shape[axis])
    return jnp.pad(x, padding)


def _by_block(x: Array, size: int) -> Array:
    """`[B, S, K, …]` → `[blocks, B, K, c, …]`."""
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return jnp.moveaxis(x, (1, 3), (0, 2))


def _padded(term: Term, pad) -> Term:
    match term:
        case RowColumn():
            return RowColumn(term.a, pad(term.b, axis=2))
        case Dense():
            return Dense(pad(term.bias, axis=3))
    return term


def gate_biases(log_forget: Array, mask: AttentionMask, queries: int) -> RowColumn:
    """Σ_{j<t≤i} log_forget_t as differences of sums, which begin anew in every document."""
    starts = jnp.zeros(log_forget.shape[:2], bool)
    if mask.key_segments is not None:
        starts = starts.at[:, 1:].set(mask.key_segments[:, 1:] != mask.key_segments[:, :-1])
    sums = jnp.swapaxes(restarting_sums(log_forget, starts), 1, 2)
    return RowColumn(sums[:, :, sums.shape[2] - queries :], -sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(plan: _Plan, rows, keys, floats, given) -> Array:
    return _forward(plan, rows, keys, floats, given)[0]


def _forward(plan: _Plan, rows, keys, floats, given):
    numbers = jnp.arange(plan.geometry.tiles, dtype=jnp.int32)
    # Under a scan over layers JAX would keep, for the backward pass, the masks of all tiles, which depend on no layer and
    # together are queries × keys. Behind the barrier everything does.
    numbers, rows, keys, floats, given = jax.lax.optimization_barrier((numbers, rows, keys, floats, given))
    given_rows, given_whole, others = given
    whole = _by_name(plan, floats, others)

    def one(_, xs):
        number, tile_rows, tile_given = xs
        products, _ = _walk(plan, number, tile_rows, keys, keep=False)
        tile, visible = _place(plan, number, tile_given, given_whole)
        scores = _scores(plan, tile, visible, products, tile_rows, whole)
        top = jnp.max(scores, axis=-1, keepdims=True)
        top = jnp.where(top == -jnp.inf, 0, top)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        p = _drop(plan, tile, given_whole[2], weights / jnp.where(total == 0, 1, total))
        out = plan.product("bkqs,bksh->bkqh", p, keys[3]).astype(plan.dtype)
        # An empty row has total 0: its output is zero, and +inf makes every later exp(score − lse) zero too.
        return None, (out, jnp.where(total == 0, jnp.inf, top + jnp.log(total)))

    out, lse = kept(_over_tiles(one, None, (numbers, rows, given_rows))[1])
    return out, (rows, keys, floats, given, out, lse)


def _backward(plan: _Plan, saved, gradient):
    rows, keys, floats, given, out, lse = saved
    given_rows, given_whole, others = given

    def one(sums, xs):
        number, tile_rows, tile_given, out, lse, gradient = xs
        products, visited = _walk(plan, number, tile_rows, keys, keep=True)
        tile, visible = _place(plan, number, tile_given, given_whole)

        def scores_of(products, biases, floats):
            return _scores(plan, tile, visible, products, {"biases": biases}, _by_name(plan, floats, others))

        scores, pull = jax.vjp(scores_of, products, tile_rows["biases"], floats)
        p = jnp.exp(scores - lse)
        d_v = plan.product("bkqs,bkqh->bksh", _drop(plan, tile, given_whole[2], p), gradient)
        d_p = _drop(plan, tile, given_whole[2], plan.product("bkqh,bksh->bkqs", gradient, keys[3]))
        delta = jnp.sum(gradient.astype(p.dtype) * out.astype(p.dtype), axis=-1, keepdims=True)
        d_products, d_biases, d_floats = pull(p * (d_p - delta))
        d_q, d_local, d_path = _walk_back(plan, number, keys, visited, d_products, sums[0])
        sums = (d_path, sums[1] + d_v, [a + b.astype(a.dtype) for a, b in zip(sums[2], d_floats, strict=True)])
        return sums, {"q": d_q, "local": d_local, "biases": d_biases}

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, accumulator(x.dtype)), (keys[:3], keys[3], floats))
    numbers = jnp.arange(plan.geometry.tiles, dtype=jnp.int32)
    sums, d_rows = _over_tiles(one, zeros, (numbers, rows, given_rows, out, lse, gradient))
    (d_k, d_w, d_u), d_v, d_floats = sums
    d_floats = [total.astype(x.dtype) for total, x in zip(d_floats, floats, strict=True)]
    return d_rows, (d_k, d_w, d_u, d_v.astype(keys[3].dtype)), d_floats, None


_core.defvjp(_forward, _backward)


def _over_tiles(one, carry, xs):
    """A scan; one tile is no loop."""
    if xs[0].shape[0] > 1:
        return jax.lax.scan(one, carry, xs)
    carry, ys = one(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda x: x[None], ys)


def _walk(plan: _Plan, number: Array, rows, keys, *, keep: bool) -> tuple[Array, Array | None]:
    """A tile's products with all keys it can see, `[B, K, G·c, S]`, and, to keep, its queries as they meet each block."""
    q, size = rows["q"], plan.geometry.chunk
    own = plan.first_block + number
    products = jnp.zeros((*q.shape[:3], plan.geometry.keys), q.dtype)
    visited = jnp.zeros((plan.blocks, *q.shape), q.dtype) if keep else None

    def step(count, state):
        x, products, visited = state
        block = own - 1 - count
        k, w, u = _at(block, keys[:3])
        met = plan.product("bkqh,bksh->bkqs", x, k)
        products = jax.lax.dynamic_update_slice_in_dim(products, met, block * size, axis=3)
        if keep:
            visited = jax.lax.dynamic_update_index_in_dim(visited, x, block, 0)
        return x - jnp.einsum("bkqs,bksh->bkqh", jnp.einsum("bkqh,bksh->bkqs", x, w), u), products, visited

    state = (q, products, visited)
    if plan.blocks > 1:
        state = jax.lax.fori_loop(0, jnp.minimum(own, plan.reach), step, state)
    products = jax.lax.dynamic_update_slice_in_dim(state[1], rows["local"], own * size, axis=3)
    return products, state[2]


def _walk_back(plan: _Plan, number: Array, keys, visited: Array, d_products: Array, sums):
    """The transpose of `_walk`: from the farthest block to the tile's own; (dq̃, d local, `sums` with those of k̃, W, U added)."""
    size = plan.geometry.chunk
    own = plan.first_block + number

    def step(block, state):
        d, sums = state
        (k, w, u), x = _at(block, keys[:3]), _at(block, visited)
        d_met = jax.lax.dynamic_slice_in_dim(d_products, block * size, size, axis=3)
        # x ← x − g U with g = x Wᵀ; d is the gradient of the new x.
        g, d_g = jnp.einsum("bkqh,bksh->bkqs", x, w), -jnp.einsum("bkqh,bksh->bkqs", d, u)
        more = (
            plan.product("bkqs,bkqh->bksh", d_met, x),
            jnp.einsum("bkqs,bkqh->bksh", d_g, x),
            -jnp.einsum("bkqs,bkqh->bksh", g, d),
        )
        sums = jax.tree.map(
            lambda total, new: jax.lax.dynamic_update_index_in_dim(total, _at(block, total) + new, block, 0), sums, more
        )
        return d + jnp.einsum("bkqs,bksh->bkqh", d_g, w) + plan.product("bkqs,bksh->bkqh", d_met, k), sums

    state = (jnp.zeros(visited.shape[1:], visited.dtype), sums)
    if plan.blocks > 1:
        state = jax.lax.fori_loop(jnp.maximum(own - plan.reach, 0), own, step, state)
    d_q, sums = state
    return d_q, jax.lax.dynamic_slice_in_dim(d_products, own * size, size, axis=3), sums


def _at(block: Array, tree):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, block, keepdims=False), tree)


def _by_name(plan: _Plan, floats: list[Array], others: list[Array]) -> dict:
    floats, others = iter(floats), iter(others)
    return jax.tree.unflatten(plan.params_tree, [next(floats if d else others) for d in plan.differentiable])


def _place(plan: _Plan, number: Array, tile_given, given_whole) -> tuple[Tile, Array]:
    """The tile, and which keys its queries see: bool broadcastable to `[B, K, G·c, S]`."""
    g = plan.geometry
    query_positions, query_segments = tile_given
    key_positions, mask, _ = given_whole
    tile = Tile(g, number, query_positions, key_positions)
    key = jnp.arange(g.keys, dtype=jnp.int32)[None, :]
    query = (plan.first_block + number) * g.chunk + jnp.arange(g.chunk, dtype=jnp.int32)[:, None]
    seen = ((key <= query) & (key >= plan.front))[None]
    mask = dataclasses.replace(mask, query_segments=None if mask.key_segments is None else query_segments)
    return tile, g.merge((seen & mask.visible(query_positions, key_positions))[:, None, None])


def _scores(plan: _Plan, tile: Tile, visible: Array, products: Array, rows, whole) -> Array:
    return jnp.where(visible, plan.terms.biased(tile, products, rows, whole), -jnp.inf)


def _drop(plan: _Plan, tile: Tile, words, p: Array) -> Array:
    """Dropout of the tile's probabilities, and of their cotangents: it is its own transpose."""
    if plan.rate == 0:
        return p
    g = plan.geometry
    queries = tile.first_query + jnp.arange(g.chunk, dtype=jnp.int32)
    keys = jnp.arange(g.keys, dtype=jnp.int32) - plan.front
    keep = g.merge(g.by_group(keep_mask(words, plan.rate, g.batch, g.heads, queries, keys), axis=1))
    return jnp.where(keep, p / (1 - plan.rate), 0)
