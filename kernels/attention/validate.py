"""Refusals of `attention`: every shape is checked before anything is computed, and the message says what would be right."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.attention.mask import AttentionMask
from kernels.attention.terms import (
    Dense,
    Multiply,
    Pairwise,
    PiecewiseLinear,
    Relative,
    RowColumn,
    Table,
    Term,
    Toeplitz,
)


def check_arrays(q, k, v=None) -> None:
    """q `[B, T, N, H]`, k `[B, S, K, H]`, v `[B, S, K, Hv]`, one floating dtype, N a multiple of K."""
    arrays = {"q": q, "k": k} | ({} if v is None else {"v": v})
    for name, x in arrays.items():
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {x.shape}, expected four axes [batch, length, heads, width]")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} is {x.dtype}, expected a floating dtype")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype} and q is {q.dtype}: cast them to one dtype")
    batch, _, heads, width = q.shape
    if k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(f"k has shape {k.shape}, expected [{batch}, S, K, {width}] to meet q {q.shape}")
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {v.shape}, expected [{', '.join(map(str, k.shape[:3]))}, any width] to meet k")
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(f"q has {heads} heads and k has {k.shape[2]}: the heads of q must be a multiple of those of k")


def check_mask(mask: AttentionMask, batch: int, queries: int, keys: int) -> None:
    """Segment ids, key padding and prefix length have the shapes of the call; window and block make sense."""
    if not isinstance(mask, AttentionMask):
        raise ValueError(f"mask is {type(mask).__name__}, expected an AttentionMask (a Dense term carries a full bias)")
    if (mask.query_segments is None) != (mask.key_segments is None):
        raise ValueError(
            "AttentionMask has query_segments or key_segments alone: give both, the same array twice if equal"
        )
    expected = {
        "query_segments": ((batch, queries), jnp.integer),
        "key_segments": ((batch, keys), jnp.integer),
        "key_valid": ((batch, keys), jnp.bool_),
        "prefix_length": ((batch,), jnp.integer),
    }
    for name, (shape, kind) in expected.items():
        x = getattr(mask, name)
        if x is None:
            continue
        if x.shape != shape:
            raise ValueError(f"AttentionMask.{name} has shape {x.shape}, expected {list(shape)}")
        if not jnp.issubdtype(x.dtype, kind):
            raise ValueError(
                f"AttentionMask.{name} is {x.dtype}, expected {'bool' if kind is jnp.bool_ else 'integers'}"
            )
    if mask.window is not None and (len(mask.window) != 2 or min(mask.window) < 0):
        raise ValueError(f"AttentionMask.window is {mask.window}, expected (left, right), both 0 or more")
    if mask.block is not None and mask.block < 1:
        raise ValueError(f"AttentionMask.block is {mask.block}, expected a width of 1 or more")
    if mask.prefix_length is not None and not mask.causal:
        raise ValueError("AttentionMask.prefix_length needs causal=True: without it every key is visible already")


def check_terms(terms: tuple[Term, ...], q_shape, k_shape, value_width: int | None) -> None:
    """Every array of every term against the shapes of q and k (and the width of v, where there is one)."""
    if not isinstance(terms, tuple):
        raise ValueError(f"terms is {type(terms).__name__}, expected a tuple of terms")
    batch, queries, heads, width = q_shape
    keys, kv_heads = k_shape[1], k_shape[2]
    for term in terms:
        match term:
            case Relative():
                sides = {"query": width, "key": width, "value": value_width}
                if all(getattr(term, side) is None for side in sides):
                    raise ValueError("Relative has no table: give query, key or value")
                for side, expected_width in sides.items():
                    if getattr(term, side) is not None:
                        _check_table(side, getattr(term, side), heads, kv_heads, expected_width)
            case Toeplitz():
                _check("Toeplitz.values", term.values, (heads, None))
                _check_zero("Toeplitz", term.zero, term.values.shape[1])
            case Multiply():
                _check("Multiply.values", term.values, (heads, None, width)[: max(2, term.values.ndim)])
                _check_zero("Multiply", term.zero, term.values.shape[1])
            case RowColumn():
                _check("RowColumn.a", term.a, (batch, heads, queries))
                _check("RowColumn.b", term.b, (batch, heads, keys))
            case PiecewiseLinear():
                _check("PiecewiseLinear.distance", term.distance, (None,))
                _check("PiecewiseLinear.row_scale", term.row_scale, (batch, queries))
                _check("PiecewiseLinear.knots", term.knots, (None,))
                _check("PiecewiseLinear.slopes", term.slopes, (heads, term.knots.shape[0]))
                _check("PiecewiseLinear.line", term.line, (heads, 2))
                _check_zero("PiecewiseLinear", term.zero, term.distance.shape[0])
            case Pairwise():
                _check_pairwise(term, heads)
            case Dense():
                wrong = term.bias.ndim != 4 or term.bias.shape[2:] != (queries, keys)
                if wrong or term.bias.shape[0] not in (1, batch) or term.bias.shape[1] not in (1, heads):
                    expected = f"[1 or {batch}, 1 or {heads}, {queries}, {keys}]"
                    raise ValueError(f"Dense.bias has shape {term.bias.shape}, expected {expected}")
                _check_floating("Dense.bias", term.bias)
            case _:
                raise ValueError(f"terms holds a {type(term).__name__}, expected a term of kernels.attention")


def _check_table(side: str, table: Table, heads: int, kv_heads: int, width: int | None) -> None:
    name = f"Relative.{side}"
    if not isinstance(table, Table):
        raise ValueError(f"{name} is {type(table).__name__}, expected a Table(values, rows)")
    values, rows = table.values, table.rows
    groups = sorted({1, kv_heads, heads})
    if values.ndim != 3 or values.shape[1] not in groups or (width is not None and values.shape[2] != width):
        expected = f"[{rows.num_rows}, {' or '.join(map(str, groups))}, {'width' if width is None else width}]"
        raise ValueError(f"{name} has a table of shape {values.shape}, expected {expected}")
    if values.shape[0] != rows.num_rows:
        raise ValueError(f"{name} has a table of {values.shape[0]} rows, but {rows} points into {rows.num_rows}")
    _check_floating(name, values)


def _check_pairwise(term: Pairwise, heads: int) -> None:
    position = jax.ShapeDtypeStruct
    shape = jax.eval_shape(term.fn, term.params, position((2, 1), jnp.int32), position((1, 3), jnp.int32)).shape
    if shape != (heads, 2, 3):
        raise ValueError(f"Pairwise.fn gives shape {shape} for 2 queries and 3 keys, expected [{heads}, 2, 3]")


def _check(name: str, x, shape: tuple[int | None, ...]) -> None:
    right = x.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, x.shape, strict=True))
    if not right or 0 in x.shape:
        expected = ", ".join("any size" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {x.shape}, expected [{expected}]")
    _check_floating(name, x)


def _check_floating(name: str, x) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} is {x.dtype}, expected a floating dtype")


def _check_zero(name: str, zero: int | None, size: int) -> None:
    if zero is not None and not isinstance(zero, int):
        raise ValueError(f"{name}.zero is {zero!r}, expected an int, the column of r = 0 among {size} columns")
