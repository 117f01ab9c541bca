"""PaTH attention for TPUs, by Pallas: forward and backward in memory linear in length.

What it takes: bfloat16 and float32, heads up to 128 wide, grouped keys, `log_forget`, `RowColumn` terms, windows, segment ids, key
padding and positions of any kind. Whatever else is asked for is refused by name; `xla` computes it.
`pallas_tpu_blocks` prepares the keys; a query attends to its own block of them by `pallas_tpu_near` and to those before it by
`pallas_tpu_far`; their log-sum-exps join the two.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.attention import AttentionMask, RowColumn, Term
from kernels.attention.positions import Placement
from kernels.mosaic_tpu import Interpret
from kernels.path.pallas_tpu_blocks import reflected
from kernels.path.pallas_tpu_far import far
from kernels.path.pallas_tpu_near import near
from kernels.path.pallas_tpu_plan import Plan
from kernels.path.xla import gate_biases

_WIDEST = 128
_PIECE = 128  # tokens whose reflections are solved for at once: the side of a matrix unit
_PIECES = 4  # of a block of queries or keys, at most
_SUMS = 8 << 20  # bytes on the chip for what the backward pass keeps of every block


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
    interpret: Interpret = False,
) -> Float[Array, "B T N W"]:
    """As `reference.path_attention`, for the same arguments; `interpret` runs the kernels on a CPU, which tests do.

    Raises:
      ValueError: a dtype, width, length, term or mask that the kernels do not compute; says which, and what does.
    """
    reasons = refusals(q, k, v, terms, mask, dropout)
    if reasons:
        raise ValueError(
            f"path_attention implementation 'pallas_tpu': {'; '.join(reasons)}. implementation='xla' does it"
        )
    if log_forget is not None:
        terms = (*terms, gate_biases(log_forget, mask, q.shape[1]))
    length, front, block = _cut(q.shape[1], k.shape[1])
    blocks, tiles = length // block, -(-q.shape[1] // block)
    reach = blocks - 1
    left = mask.band[0]
    if left is not None and placement.offset is not None:
        reach = min(reach, -(-left // block))
    plan = Plan(block, _PIECE, blocks - tiles, reach, left, jnp.dtype(q.dtype), interpret)
    of_queries = functools.partial(_padded, before=0, length=tiles * block)
    of_keys = functools.partial(_padded, before=front, length=length)

    scaled = of_queries(_by_head(q.astype(jnp.float32) * jnp.asarray(scale, jnp.float32)))
    v_, k_, w_ = (of_keys(_by_head(x)) for x in (v, k.astype(jnp.float32), w.astype(jnp.float32)))
    made = reflected(plan, {"k": k_, "w": w_, "beta": of_keys(jnp.swapaxes(beta, 1, 2)[..., None])})
    sides = _sides(terms, mask, placement, batch=q.shape[0], front=front)
    queries = {name: of_queries(x) for name, x in sides["queries"].items()}
    keys = {name: of_keys(x) for name, x in sides["keys"].items()}
    bias = {"bias": keys.pop("bias")} if "bias" in keys else {}
    fixed = {"queries": queries, "keys": keys}

    # Of what has rows for each block, the last `tiles` blocks: those of the queries.
    own = jax.tree.map(
        lambda x: x[:, :, x.shape[2] // blocks * plan.first :],
        {"v": v_, "k": k_, "w": w_, **made, **bias, "fixed": keys},
    )
    start, out, lse = near(
        plan,
        {"q": scaled} | {name: own[name] for name in bias},
        {name: own[name] for name in ("v", "k", "w", "u", "m")},
        {"queries": queries, "keys": own["fixed"]},
    )
    if plan.reach:
        out = _joined(out, lse, *far(plan, {"q": start, "v": v_, "k": made["end"], "p": made["p"], **bias}, fixed))
    return jnp.swapaxes(out, 1, 2)[:, : q.shape[1], :, : v.shape[3]].astype(q.dtype)


def refusals(
    q: Array, k: Array, v: Array, terms: tuple[Term, ...], mask: AttentionMask, dropout: tuple[float, Array] | None
) -> list[str]:
    """Why the kernels do not compute this call; empty where they do."""
    reasons = []
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        reasons.append(f"it multiplies bfloat16 and float32, not {q.dtype}")
    width = max(q.shape[3], v.shape[3])
    if width > _WIDEST:
        reasons.append(f"its heads are at most {_WIDEST} wide, not {width}")
    other = sorted({type(term).__name__ for term in terms if not isinstance(term, RowColumn)})
    if other:
        reasons.append(f"it has no {' and no '.join(other)}")
    if mask.block is not None:
        reasons.append("it has no block mask")
    if dropout is not None:
        reasons.append("it has no dropout")
    longest = _SUMS // (4 * _wide(q.shape[3]) * _WIDEST) * _PIECES * _PIECE
    if q.shape[1] > longest:
        reasons.append(f"its queries of width {q.shape[3]} are at most {longest}, not {q.shape[1]}")
    return reasons


def _wide(width: int) -> int:
    """Half a row of lanes or a whole one."""
    return _WIDEST // 2 if width <= _WIDEST // 2 else _WIDEST


def _cut(queries: int, keys: int) -> tuple[int, int, int]:
    """(padded length of the keys, how many of it stand before the first, tokens of a block): queries begin at a block."""
    pieces = -(-keys // _PIECE)
    sizes = [n * _PIECE for n in ([pieces] if pieces <= _PIECES else range(2, _PIECES + 1))]

    def padded(size: int) -> int:
        return (queries - keys) % size + (keys - queries) + -(-queries // size) * size

    block = min(sizes, key=lambda size: (padded(size), -size))
    return padded(block), (queries - keys) % block, block


def _by_head(x: Array) -> Array:
    """`[B, L, N, H]` to `[B, N, L, H]`, the width padded with zeros, which change no product."""
    return jnp.pad(jnp.swapaxes(x, 1, 2), [(0, 0)] * 3 + [(0, _wide(x.shape[3]) - x.shape[3])])


def _padded(x: Array, *, before: int, length: int) -> Array:
    """`length` tokens along axis 2."""
    padding = [(0, 0)] * x.ndim
    padding[2] = (before, length - before - x.shape[2])
    return jnp.pad(x, padding)


def _sides(
    terms: tuple[Term, ...], mask: AttentionMask, placement: Placement, *, batch: int, front: int
) -> dict[str, dict[str, Array]]:
    """What `masked` takes of "queries" and of "keys": `[B, N or 1, T]` and `[B, N or 1, S]`. Padding is 0 in all of it."""
    queries: dict[str, Array] = {}
    keys: dict[str, Array] = {}
    biases = [term for term in terms if isinstance(term, RowColumn)]
    if biases:
        # The same for all keys of a query: softmax does not see it, and its gradient is zero. It keeps the sums small.
        rows = sum(term.a.astype(jnp.float32) for term in biases)
        queries["bias"] = jax.lax.stop_gradient(rows)
        keys["bias"] = sum(term.b.astype(jnp.float32) for term in biases)
    if placement.offset is None:
        for side, positions in ((queries, placement.query), (keys, placement.key)):
            side["positions"] = jnp.broadcast_to(positions.token[:, None], (batch, 1, positions.length))
    if mask.query_segments is not None or mask.key_valid is not None or front:
        # A key of segment 0 is seen by no query, a query of segment −1 sees no key.
        own = _ids(mask.query_segments, batch, placement.query.length)
        of_keys = _ids(mask.key_segments, batch, placement.key.length)
        if mask.key_valid is not None:
            of_keys = jnp.where(mask.key_valid, of_keys, 0)
        queries["segments"], keys["segments"] = (x[:, None] for x in (jnp.where(own > 0, own, -1), of_keys))
    return {"queries": queries, "keys": keys}


def _ids(segments: Array | None, batch: int, length: int) -> Array:
    return jnp.ones((batch, length), jnp.int32) if segments is None else segments.astype(jnp.int32)


def _joined(near_out: Array, near_lse: Array, far_out: Array, far_lse: Array) -> Array:
    """Attention to all keys from that to two disjoint sets: each weighs as much as its sum of exponentials."""
    top = jax.lax.stop_gradient(jnp.maximum(near_lse, far_lse))
    near_weight, far_weight = jnp.exp(near_lse - top), jnp.exp(far_lse - top)
    share = near_weight / (near_weight + far_weight)
    return far_out + share[..., None] * (near_out - far_out)
