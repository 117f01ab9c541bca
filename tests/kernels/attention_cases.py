"""What is tested of every implementation of attention: term kinds, masks, and the call itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import (
    AttentionMask,
    Clip,
    Dense,
    LogBuckets,
    Multiply,
    Pairwise,
    PiecewiseLinear,
    Positions,
    Relative,
    Reverse,
    RowColumn,
    Table,
    Toeplitz,
    attention,
    xla,
)
from kernels.attention.dropout import key_words
from kernels.attention.positions import Placement
from kernels.attention.reference import accumulator


@dataclass(frozen=True)
class Sizes:
    B: int = 2
    T: int = 7
    S: int = 7
    N: int = 2
    K: int = 2
    H: int = 4
    W: int = 6


@dataclass(frozen=True)
class Waves:
    """A function of both positions for `Pairwise`."""

    rate: float

    def __call__(self, params, i, j):
        phase = jnp.asarray(i + 2 * j, params["height"].dtype) * self.rate
        return params["height"][:, None, None] * jnp.sin(phase)[None]


@dataclass(frozen=True)
class Implementation:
    """A way to call attention, and the term kinds it supports."""

    name: str
    kinds: frozenset[str]
    chunk: int | None = None

    def __call__(self, q, k, v, *, terms=(), mask=AttentionMask(), scale=None, positions=None, dropout=None):  # noqa: B008
        if self.chunk is None:
            given = {"terms": terms, "mask": mask, "scale": scale, "positions": positions, "dropout": dropout}
            return attention(q, k, v, **given, implementation=self.name)
        return xla.attention(
            q,
            k,
            v,
            terms=terms,
            mask=mask,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            placement=Placement.of(positions, q.shape[1], k.shape[1]),
            dropout=None if dropout is None else (dropout[0], key_words(dropout[1])),
            chunk=self.chunk,
        )


def _piecewise(s: Sizes, draw):
    return PiecewiseLinear(np.abs(draw(9)), np.abs(draw(s.B, s.T)), draw(4), draw(s.N, 4), draw(s.N, 2), zero=6)


KINDS: dict[str, Callable[[Sizes, Callable], tuple]] = {
    "none": lambda s, draw: (),
    "toeplitz": lambda s, draw: (Toeplitz(draw(s.N, 9)), Toeplitz(draw(s.N, 5), zero=4)),
    "multiply": lambda s, draw: (Multiply(1 + draw(s.N, 9)), Multiply(1 + draw(s.N, 3), zero=2)),
    "multiply_channels": lambda s, draw: (Multiply(1 + draw(s.N, 7, s.H)), Multiply(1 + draw(s.N, 5))),
    "query": lambda s, draw: (Relative(query=Table(draw(7, 1, s.H), Clip(3))),),
    "query_per_head": lambda s, draw: (Relative(query=Table(draw(7, s.N, s.H), Reverse(Clip(3)))),),
    "key": lambda s, draw: (Relative(key=Table(draw(7, 1, s.H), Clip(3))),),
    "key_per_kv_head": lambda s, draw: (Relative(key=Table(draw(8, s.K, s.H), LogBuckets(4, 9))),),
    "key_per_head": lambda s, draw: (Relative(key=Table(draw(8, s.N, s.H), Reverse(LogBuckets(4, 9)))),),
    "value": lambda s, draw: (Relative(value=Table(draw(7, 1, s.W), Clip(3))),),
    "value_per_head": lambda s, draw: (Relative(value=Table(draw(8, s.N, s.W), LogBuckets(4, 9))),),
    "query_and_value": lambda s, draw: (
        Relative(query=Table(draw(17, s.N, s.H), Clip(8)), value=Table(draw(17, 1, s.W), Reverse(Clip(8)))),
    ),
    "query_and_key": lambda s, draw: (
        Relative(
            query=Table(draw(8, s.N, s.H), LogBuckets(4, 9)), key=Table(draw(8, s.K, s.H), Reverse(LogBuckets(4, 9)))
        ),
    ),
    "row_column": lambda s, draw: (RowColumn(draw(s.B, s.N, s.T), draw(s.B, s.N, s.S)),),
    "piecewise_linear": lambda s, draw: (_piecewise(s, draw),),
    "pairwise": lambda s, draw: (Pairwise({"height": draw(s.N)}, Waves(0.3)),),
    "dense": lambda s, draw: (Dense(draw(1, s.N, s.T, s.S)), Dense(draw(s.B, 1, s.T, s.S))),
    "several": lambda s, draw: (
        Relative(*(Table(draw(5, 1, width), Clip(2)) for width in (s.H, s.H, s.W))),
        Multiply(1 + draw(s.N, 9)),
        Toeplitz(draw(s.N, 2 * s.T + 1)),
    ),
}
IMPLEMENTATIONS = (
    Implementation("reference", frozenset(KINDS)),
    Implementation("xla", frozenset(KINDS)),
    Implementation("xla", frozenset(KINDS), chunk=5),
)


def packed(*lengths: int) -> np.ndarray:
    """Segment ids of one row: documents of these lengths, 1, 2, …"""
    return np.repeat(np.arange(1, len(lengths) + 1), lengths).astype(np.int32)


def restarting(segments: np.ndarray) -> np.ndarray:
    """Positions that restart in every run of equal segment ids."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(segments)) + 1])
    return np.arange(len(segments), dtype=np.int32) - np.repeat(starts, np.diff([*starts, len(segments)])).astype(
        np.int32
    )


def segments_of(s: Sizes) -> np.ndarray:
    rows = [packed(3, s.T - 5, 2), packed(s.T - 2, 2)]
    rows[1][-1] = 0
    return np.stack(rows[: s.B])


def _segments(s: Sizes):
    ids = segments_of(s)
    positions = Positions(np.stack([restarting(row) for row in ids]), contiguous=True)
    return AttentionMask(query_segments=ids, key_segments=ids), positions


def _valid(s: Sizes):
    return np.arange(s.S)[None, :] < np.array([s.S - 2, s.S])[:, None]


MASKS: dict[str, Callable[[Sizes], tuple[AttentionMask, object]]] = {
    "causal": lambda s: (AttentionMask(causal=True), None),
    "window": lambda s: (AttentionMask(window=(2, 1)), None),
    "causal_window": lambda s: (AttentionMask(causal=True, window=(3, 5)), None),
    "block": lambda s: (AttentionMask(block=3), None),
    "causal_block": lambda s: (AttentionMask(causal=True, block=2), None),
    "prefix": lambda s: (AttentionMask(causal=True, prefix_length=np.array([3, 0], np.int32)), None),
    "prefix_window": lambda s: (
        AttentionMask(causal=True, window=(1, 2), prefix_length=np.array([4, 1], np.int32)),
        None,
    ),
    "key_valid": lambda s: (AttentionMask(key_valid=_valid(s)), None),
    "segments": _segments,
    "segments_window": lambda s: (
        AttentionMask(causal=True, window=(2, 0), query_segments=segments_of(s), key_segments=segments_of(s)),
        _segments(s)[1],
    ),
    # Positions with gaps, alike for both sides and as a pair: tables are gathered.
    "gaps": lambda s: (
        AttentionMask(window=(7, 6)),
        Positions(np.cumsum(np.arange(s.B * s.T).reshape(s.B, s.T) % 3, 1, np.int32)),
    ),
    "shifted_pair": lambda s: (AttentionMask(causal=True), (Positions.arange(s.T, 2), Positions.arange(s.S))),
}


def inputs(s: Sizes, kind: str, seed: int = 0):
    """((q, k, v, terms), cotangent) as float32 NumPy arrays."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return (rng.standard_normal(shape) * 0.5).astype(np.float32)

    q, k, v = draw(s.B, s.T, s.N, s.H), draw(s.B, s.S, s.K, s.H), draw(s.B, s.S, s.K, s.W)
    return (q, k, v, KINDS[kind](s, draw)), draw(s.B, s.T, s.N, s.W)


def value_and_gradients(implementation, arguments, cotangent, dtype=np.float32, **call):
    """(out, gradients of ⟨out, cotangent⟩ to q, k, v and every array of the terms), in `dtype`, by one compilation."""

    def cast(x):
        return jnp.asarray(x, dtype) if np.issubdtype(x.dtype, np.floating) else jnp.asarray(x)

    def loss(arguments):
        q, k, v, terms = arguments
        out = implementation(q, k, v, terms=terms, **call)
        wide = accumulator(out.dtype)
        return jnp.sum(out.astype(wide) * jnp.asarray(cotangent, wide)), out

    call = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, call)
    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(jax.tree.map(cast, arguments))
    return jax.device_get((out, gradients))


def truth(arguments, cotangent, **call):
    """The reference in float64, on the CPU whatever the device under test."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        found = value_and_gradients(IMPLEMENTATIONS[0], arguments, cotangent, np.float64, **call)
    return jax.tree.map(lambda x: np.asarray(x, np.float32), found)
