"""What the TPU kernels of PaTH share: the sizes of a call, products on the matrix unit, and which keys a query sees."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels.mosaic_tpu import Interpret
from kernels.sharded import by_batch_and_heads

# A hidden score is far below the least running maximum, so that a row which has seen nothing needs no second look: exp gives 0.
# Beside them stands what a row without keys has for its log-sum-exp.
HIDDEN, FLOOR, EMPTY = -1e30, -1e20, -1e30


@dataclass(frozen=True)
class Plan:
    """The static part of a call.

    Queries and keys are cut into blocks of `block` tokens, each of several pieces of `piece`. The first queries stand in block
    `first` of the keys. A query sees no key more than `reach` blocks before its own, and, where `left` is set, none more than so
    many positions before it.
    """

    block: int
    piece: int
    first: int
    reach: int
    left: int | None
    dtype: Any
    interpret: Interpret

    @property
    def digits(self) -> Digits:
        """Of what meets keys and values."""
        return 8 if self.dtype == jnp.bfloat16 else 24

    @property
    def fine(self) -> Digits:
        """Of products along the path."""
        return 16 if self.dtype == jnp.bfloat16 else 24

    @property
    def pieces(self) -> int:
        return self.block // self.piece


Form = Literal["nn", "nt", "tn"]
_CONTRACTED = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}
Digits = Literal[8, 16, 24]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: jax.Array, y: jax.Array, form: Form, digits: Digits) -> jax.Array:
    """x y ("nn"), x yᵀ ("nt") or xᵀ y ("tn") of matrices; so many binary digits of theirs are multiplied, sums are float32.

    The matrix unit multiplies bfloat16, 8 digits. 16 are three of its products, the high and the low halves by each other; 24,
    which is float32, are six. The gradients are products of these forms too, so that none needs a transpose.
    """
    if digits == 16:
        (x_high, x_low), (y_high, y_low) = _halves(x), _halves(y)
        small = _times(x_high, y_low, form) + _times(x_low, y_high, form)
        return small + _times(x_high, y_high, form)
    dtype = jnp.bfloat16 if digits == 8 else jnp.float32
    return _times(x.astype(dtype), y.astype(dtype), form)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _times(x: jax.Array, y: jax.Array, form: Form) -> jax.Array:
    left, right = _CONTRACTED[form]
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    contracted = (((left,), (right,)), ((), ()))
    return lax.dot_general(x, y, contracted, precision=precision, preferred_element_type=jnp.float32)


def _product_forward(x, y, form, digits):
    return product(x, y, form, digits), (x, y)


def _product_backward(form, digits, saved, d):
    x, y = saved
    first, second = {
        "nn": ((d, y, "nt"), (x, d, "tn")),
        "nt": ((d, y, "nn"), (d, x, "tn")),
        "tn": ((y, d, "nt"), (x, d, "nn")),
    }[form]
    return product(*first, digits).astype(x.dtype), product(*second, digits).astype(y.dtype)


product.defvjp(_product_forward, _product_backward)


def identity(size: int) -> jax.Array:
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return (row == column).astype(jnp.float32)


def below(x: jax.Array, diagonal: int = -1) -> jax.Array:
    """The part of a square matrix below its diagonal, with it for `diagonal` = 0."""
    row, column = (lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
    return jnp.where(column - row <= diagonal, x, 0)


def rows(plan: Plan, number: int) -> slice:
    """Those of a piece in its block."""
    return slice(number * plan.piece, (number + 1) * plan.piece)


def masked(
    plan: Plan,
    scores: jax.Array,
    queries: dict[str, jax.Array],
    keys: dict[str, jax.Array],
    ahead: int | jax.Array,
    *,
    causal: bool,
    query_axis: int = 0,
) -> jax.Array:
    """The scores of one tile with the biases of its queries and keys, `HIDDEN` where the query may not see the key.

    queries, keys: of each token "bias", "segments" (equal ones meet) and "positions", where a call has them, as a column or a row.
    ahead: how many tokens the first query stands after the first key.
    """
    if "bias" in queries:
        scores = scores + (queries["bias"] + keys["bias"])
    parts = []
    if "positions" in queries:
        back = queries["positions"] - keys["positions"]
        parts += [back >= 0] + ([] if plan.left is None else [back <= plan.left])
    if causal or (plan.left is not None and "positions" not in queries):
        query, key = (lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (query_axis, 1 - query_axis))
        back = query - key + ahead
        parts += [back >= 0] if causal else []
        parts += [] if plan.left is None or "positions" in queries else [back <= plan.left]
    if "segments" in queries:
        parts.append(queries["segments"] == keys["segments"])
    return jnp.where(functools.reduce(jnp.logical_and, parts), scores, HIDDEN) if parts else scores


def tokens(size: int, width: int, index: Any) -> pl.BlockSpec:
    """`size` rows of `[B, heads, length, width]`; `index` gives (b, head, number of the block)."""
    return pl.BlockSpec((None, None, size, width), lambda *at: (*index(*at), 0))


def line(size: int, index: Any) -> pl.BlockSpec:
    """`size` columns of `[B, heads, 1, length]`."""

    def place(*at):
        b, head, number = index(*at)
        return b, head, 0, number

    return pl.BlockSpec((None, None, 1, size), place)


def values(tree: Any) -> Any:
    """What a tree of references holds."""
    return jax.tree.map(lambda ref: ref[...], tree)


def over_devices(function: Callable[..., Any], heads: int, kv_heads: int) -> Callable[..., Any]:
    """`function` of trees of arrays `[B, heads, …]`, to such a tree, where each device has its part of batch and heads.

    Axis 1 of every array is `heads`, `kv_heads` or 1 long.
    """
    letters = {1: "o", heads: "n", kv_heads: "m"}

    def axes(x: Any) -> str:
        return " ".join(["b", letters[x.shape[1]], *("o" * (x.ndim - 2))])

    def call(*given: Any) -> Any:
        leaves, tree = jax.tree.flatten(given)
        made, made_tree = jax.tree.flatten(jax.eval_shape(function, *given))

        def local(*parts: jax.Array) -> tuple[jax.Array, ...]:
            return tuple(jax.tree.leaves(function(*jax.tree.unflatten(tree, parts))))

        divided = by_batch_and_heads(local, list(map(axes, leaves)), list(map(axes, made)))
        return jax.tree.unflatten(made_tree, divided(*leaves))

    return call
