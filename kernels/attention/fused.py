"""What the fused kernels of all platforms are told of a call: its static part, and what masks, terms and dropout say as arrays.

Scores are in base 2: the scale and every bias are multiplied by log2(e), and lse is log2 Σ 2^score.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels.attention.curve import numbers_of
from kernels.attention.dropout import row_words
from kernels.attention.mask import AttentionMask
from kernels.attention.positions import Placement
from kernels.attention.skew import expand
from kernels.attention.terms import Dense, Multiply, PiecewiseLinear, Relative, RowColumn, Term, Toeplitz
from kernels.sharded import by_batch_and_heads

# Axes, as `sharded` names them.
Q, K, V, OUT, ROW, COLUMN, LINE, CURVE = "b t n h", "b s m h", "b s m w", "b t n w", "b n t", "b n s", "n r", "n c"
DENSE = "b n t s"
BAND = {"query": "r n e", "key": "r m e", "value": "r n e"}

# A hidden score, and the least maximum of a row: 2 to the power of their difference is zero, so rows need no second look.
HIDDEN, FLOOR = -1e30, -1e20


@dataclass(frozen=True)
class Call:
    """The static part of a call; `queries` and `keys` are padded to whole tiles, widths to what the matrix units take."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    width: int
    value_width: int
    scale: float  # times log2(e)
    offset: int  # query i stands at the key's index i + offset
    left: int | None  # visible: −left ≤ r ≤ right
    right: int | None
    past_or_prefix: bool  # visible: r ≤ 0 or the key is in the prefix
    rate: float
    interpret: Any  # what the platform's interpreter is told, False on a device

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def slope(self) -> float:
        """The derivative of a score in base e by ⟨q, k⟩: the scale of the call."""
        return self.scale * math.log(2)

    @property
    def least(self) -> int:
        """The smallest relative position of the padded lengths."""
        return 1 - self.queries - self.offset

    @property
    def banded(self) -> bool:
        """Whether distance alone hides keys."""
        return self.left is not None or self.right is not None

    def keys_of(self, first: Any, count: int, block: int) -> tuple[Any, Any]:
        """(the first tile of `block` keys, how many) that the `count` queries from `first` may see; at least one."""
        return _tiles(first + self.offset, count, self.left, self.right, self.keys // block, block)

    def queries_of(self, first: Any, count: int, block: int) -> tuple[Any, Any]:
        """(the first tile of `block` queries, how many) that may see one of the `count` keys from `first`; at least one."""
        return _tiles(first - self.offset, count, self.right, self.left, self.queries // block, block)


def _tiles(first: Any, count: int, left: int | None, right: int | None, tiles: int, block: int) -> tuple[Any, Any]:
    # Nothing below zero is divided, so that both ways of dividing agree; `//` of traced integers asks for signs.
    least, most, over = (min, max, operator.floordiv) if isinstance(first, int) else (lax.min, lax.max, lax.div)
    low = 0 if left is None else least(over(most(first - left, 0), block), tiles - 1)
    if right is None:
        return low, tiles - low
    high = least(over(most(first + count + right + block - 1, 0), block), tiles)
    return low, most(high - low, 1)


class Given(NamedTuple):
    """What masks, terms and dropout say: of each query `[B, T]` or `[B, N, T]`, of each key likewise, of each distance.

    rows: "segments" (−1 sees nothing), "first" and "second" (words of dropout), "reach" (φ's factor of a `PiecewiseLinear`); in the
    backward passes "lse" and "delta".
    columns: "segments" (0 is seen by none), "prefix", "bias". lines: "bias" and "factor", `[N, T + S − 1]`, the sum of `Toeplitz` terms
    and the product of `Multiply` terms from the smallest relative position on. bands: "query", "key", "value", the tables of `Relative`
    terms, `[R, N or K or 1, H]`, where a kernel lays them out. curves: "curve", of a `PiecewiseLinear` its `curve.numbers_of`, whose φ is the
    line "distance". dense: "bias", the sum of `Dense` terms `[1 or B, 1 or N, T, S]`, in the dtype of the one or in float32.
    Biases are multiplied by log2(e), but for a curve and a dense one.
    """

    rows: dict[str, jax.Array]
    columns: dict[str, jax.Array]
    lines: dict[str, jax.Array]
    bands: dict[str, jax.Array]
    curves: dict[str, jax.Array]
    dense: dict[str, jax.Array]

    @classmethod
    def of(
        cls,
        call: Call,
        terms: tuple[Term, ...],
        mask: AttentionMask,
        placement: Placement,
        words: jax.Array | None,
        lengths: tuple[int, int],
    ) -> Given:
        """lengths: of queries and keys before they were padded with keys that nobody sees."""
        queries, keys = lengths
        rows: dict[str, jax.Array] = {}
        columns: dict[str, jax.Array] = {}
        if call.past_or_prefix:
            in_prefix = placement.key.token < mask.prefix_length[:, None]
            columns["prefix"] = padded(in_prefix.astype(jnp.int32), call.keys)
        if mask.query_segments is not None or mask.key_valid is not None or keys != call.keys:
            # A key of segment 0 is seen by no query, a query of segment −1 sees no key.
            ones = functools.partial(jnp.ones, dtype=jnp.int32)
            own = ones((call.batch, queries)) if mask.query_segments is None else mask.query_segments.astype(jnp.int32)
            of_keys = ones((call.batch, keys)) if mask.key_segments is None else mask.key_segments.astype(jnp.int32)
            if mask.key_valid is not None:
                of_keys = jnp.where(mask.key_valid, of_keys, 0)
            own = padded(own, call.queries)
            rows["segments"] = jnp.where(own > 0, own, -1)
            columns["segments"] = padded(of_keys, call.keys)
        if call.rate > 0:
            index = jnp.arange(call.queries, dtype=jnp.int32)
            rows["first"], rows["second"] = row_words(words, call.batch, call.heads, index)
        biases = [term.b for term in terms if isinstance(term, RowColumn)]
        if biases:
            # `a` is the same for all keys of a query: softmax does not see it, and its gradient is zero.
            bias = functools.reduce(jnp.add, (b.astype(jnp.float32) for b in biases)) * math.log2(math.e)
            columns["bias"] = jnp.pad(bias, ((0, 0), (0, 0), (0, call.keys - keys)))
        lines = {}
        added = [_line(term, call) for term in terms if isinstance(term, Toeplitz)]
        if added:
            lines["bias"] = functools.reduce(jnp.add, added) * math.log2(math.e)
        factors = [_line(term, call) for term in terms if isinstance(term, Multiply)]
        if factors:
            lines["factor"] = functools.reduce(jnp.multiply, factors)
        curves = {}
        for term in terms:
            if isinstance(term, PiecewiseLinear):
                shared = jnp.broadcast_to(term.distance, (call.heads, *term.distance.shape))
                lines["distance"] = _line(Toeplitz(shared, term.zero), call)
                # Queries that do not exist meet no knots that the last one does not.
                beyond = (0, 0), (0, call.queries - queries)
                rows["reach"] = jnp.pad(term.row_scale.astype(jnp.float32), beyond, mode="edge")
                curves["curve"] = numbers_of(term)
        dense = {}
        matrices = [term.bias for term in terms if isinstance(term, Dense)]
        if matrices:
            if len(matrices) > 1 or matrices[0].dtype not in (jnp.bfloat16, jnp.float16):
                matrices = [x.astype(jnp.float32) for x in matrices]
            padding = (0, 0), (0, 0), (0, call.queries - queries), (0, call.keys - keys)
            dense["bias"] = jnp.pad(functools.reduce(jnp.add, matrices), padding)
        return cls(rows, columns, lines, {}, curves, dense)

    def with_rows(self, **more: jax.Array) -> Given:
        return self._replace(rows=self.rows | more)

    def gradients(
        self,
        *,
        rows: dict[str, jax.Array] | None = None,
        columns: dict[str, jax.Array] | None = None,
        lines: dict[str, jax.Array] | None = None,
        bands: dict[str, jax.Array] | None = None,
        curves: dict[str, jax.Array] | None = None,
        dense: dict[str, jax.Array] | None = None,
    ) -> Given:
        """The cotangent of what a call was given: of bases 2 from those of scores in base e, None for integers."""
        columns, lines = (
            {name: x * math.log(2) if name == "bias" else x for name, x in (found or {}).items()}
            for found in (columns, lines)
        )
        rows = {name: (rows or {}).get(name) for name in self.rows if name not in ("lse", "delta")}
        return Given(
            rows, {name: columns.get(name) for name in self.columns}, lines, bands or {}, curves or {}, dense or {}
        )


def _line(term: Toeplitz | Multiply, call: Call) -> jax.Array:
    """`[N, T + S − 1]`: the term's values from the smallest relative position of the padded lengths on."""
    size = term.values.shape[1]
    zero = (size - 1) // 2 if term.zero is None else term.zero
    r = np.arange(call.queries + call.keys - 1) + call.least
    return expand(term.values.astype(jnp.float32), np.clip(r + zero, 0, size - 1), axis=1)


def refusals_of_masks(terms: tuple[Term, ...], mask: AttentionMask, placement: Placement) -> list[str]:
    """Why no fused kernel computes this call, whatever its terms."""
    reasons = []
    if mask.block is not None:
        reasons.append("it has no block mask")
    distant = any(isinstance(term, Toeplitz | Multiply | Relative | PiecewiseLinear) for term in terms)
    if placement.offset is None and (mask.causal or mask.window is not None or distant):
        reasons.append("distances need contiguous positions, the same struct for queries and keys")
    return reasons


def divided(call: Call, function: Callable[..., tuple], operands: Sequence, given: Given, results: tuple) -> tuple:
    """function(call, *operands, given), each device with its part of batch and heads and a `Call` for it.

    operands: (arrays, their axes) as trees of one structure; results: axes in a tree like what `function` gives. The axes' letters are
    those of `by_batch_and_heads`.
    """
    kinds = {2: ("b t", "b s"), 3: (ROW, COLUMN)}
    rows = {name: kinds[x.ndim][0] for name, x in given.rows.items()}
    columns = {name: kinds[x.ndim][1] for name, x in given.columns.items()}
    bands = {name: "r o e" if x.shape[1] == 1 else BAND[name] for name, x in given.bands.items()}
    lines, curves = dict.fromkeys(given.lines, LINE), dict.fromkeys(given.curves, CURVE)
    dense = {
        name: f"{'b' if x.shape[0] > 1 else 'o'} {'n' if x.shape[1] > 1 else 'o'} t s"
        for name, x in given.dense.items()
    }
    axes_of_given = Given(rows, columns, lines, bands, curves, dense)
    arrays = (*(x for x, _ in operands), given)
    leaves, tree = jax.tree.flatten(arrays)
    axes = jax.tree.leaves((*(a for _, a in operands), axes_of_given))
    axes_of_results, tree_of_results = jax.tree.flatten(results)

    def local(*parts):
        here = dataclasses.replace(call, batch=parts[0].shape[0], heads=parts[0].shape[2], kv_heads=parts[1].shape[2])
        return tuple(jax.tree.leaves(function(here, *jax.tree.unflatten(tree, parts))))

    return jax.tree.unflatten(tree_of_results, by_batch_and_heads(local, axes, axes_of_results)(*leaves))


def dots(x: jax.Array, y: jax.Array) -> jax.Array:
    """⟨x, y⟩ of each query and head, float32: `[B, T, N, H]` twice to `[B, N, T]`."""
    return jnp.einsum("btnh,btnh->bnt", x.astype(jnp.float32), y.astype(jnp.float32))


def up(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def padded(x: jax.Array, length: int, width: int | None = None) -> jax.Array:
    """Zeros up to `length` along axis 1, and up to `width` along the last."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, length - x.shape[1])
    if width is not None:
        padding[-1] = (0, width - x.shape[-1])
    return jnp.pad(x, padding)
