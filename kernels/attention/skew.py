"""Moving between "one column per relative position" and "one column per key" by reshapes alone.

In a tile of T queries and S keys, entry (y, x) has the relative position of column x − y + T − 1 among T + S − 1. Reading
row y from its own offset is a reshape to rows one shorter, so nothing is gathered and the transpose is a reshape too.
Source: Huang et al. 2018 (arXiv:1809.04281), section 3.4, for both signs of r.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# More pieces than this and one gather is cheaper to compile than a concatenation.
_MOST_PIECES = 8
# Entries of one block of a one-hot matrix per batch row: 4 MiB of float32.
_ONE_HOT_ENTRIES = 1 << 20


def skew(x: Float[Array, "*any T C"], keys: int) -> Float[Array, "*any T S"]:
    """out[y, x] = in[y, x − y + T − 1] for x < keys; C ≥ T + keys − 1. The gradient is `unskew`."""
    return _skew(x, keys, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _skew(x: Array, keys: int, columns: int) -> Array:
    *lead, rows, _ = x.shape
    if rows == 1:
        return x[..., :keys]
    flat = x.reshape(*lead, rows * columns)[..., rows - 1 : rows - 1 + rows * (columns - 1)]
    return flat.reshape(*lead, rows, columns - 1)[..., :keys]


def unskew(x: Float[Array, "*any T S"], columns: int) -> Float[Array, "*any T C"]:
    """The transpose of `skew`: out[y, c] = in[y, c + y − T + 1], zero where that is no key. The gradient is `skew`."""
    return _unskew(x, x.shape[-1], columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _unskew(x: Array, keys: int, columns: int) -> Array:
    # The transpose that JAX derives pads twice, around a reshape; reading rows one longer out of one pad is twice as fast.
    *lead, rows, _ = x.shape
    width = max(keys + 2 * (rows - 1), columns - 1)
    padding = [(0, 0)] * len(lead) + [(0, 1), (rows - 1, width - keys - rows + 1)]
    flat = jnp.pad(x, padding).reshape(*lead, (rows + 1) * width)[..., : rows * (width + 1)]
    return flat.reshape(*lead, rows, width + 1)[..., :columns]


_skew.defvjp(
    lambda x, keys, columns: (_skew(x, keys, columns), None),
    lambda keys, columns, _, gradient: (_unskew(gradient, keys, columns),),
)
_unskew.defvjp(
    lambda x, keys, columns: (_unskew(x, keys, columns), None),
    lambda keys, columns, _, gradient: (_skew(gradient, keys, columns),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def entries(table: Float[Array, "C H"], queries: int, keys: int, columns: int) -> Float[Array, "T S H"]:
    """out[y, x] = table[x − y + T − 1] for a table of C = `columns` rows; the gradient is summed by `unskew`."""
    return table[np.arange(keys)[None, :] - np.arange(queries)[:, None] + queries - 1]


entries.defvjp(
    lambda table, queries, keys, columns: (entries(table, queries, keys, columns), None),
    lambda queries, keys, columns, _, gradient: (
        jnp.sum(_unskew(jnp.moveaxis(gradient, 2, 0), keys, columns), axis=1).T,
    ),
)


def expand(values: Array, index: np.ndarray, axis: int) -> Array:
    """values at the static `index` along `axis`, with a gradient summed in a fixed order (no scatter).

    A clipped range is two constant runs around a slice, and is taken as that; any other map is gathered, and its gradient
    is a product with the map's one-hot matrix.
    """
    pieces = _runs(index)
    if len(pieces) > _MOST_PIECES:
        return _gather_rows(axis, values.shape[axis], values, jnp.asarray(index, jnp.int32))
    return jnp.concatenate([_run(values, axis, *piece) for piece in pieces], axis=axis)


def _runs(index: np.ndarray) -> list[tuple[int, int, int]]:
    """(first, step, length) of the longest runs with step −1, 0 or 1, from left to right."""
    steps = np.diff(index)
    runs, start = [], 0
    while start < len(index):
        step = int(steps[start]) if start < len(steps) and abs(steps[start]) <= 1 else 0
        stop = start + 1
        while stop < len(index) and steps[stop - 1] == step:
            stop += 1
        runs.append((int(index[start]), step, stop - start))
        if len(runs) > _MOST_PIECES:
            break
        start = stop
    return runs


def _run(values: Array, axis: int, first: int, step: int, length: int) -> Array:
    if step == 0:
        row = jax.lax.slice_in_dim(values, first, first + 1, axis=axis)
        shape = list(values.shape)
        shape[axis] = length
        return jnp.broadcast_to(row, shape)
    if step == 1:
        return jax.lax.slice_in_dim(values, first, first + length, axis=axis)
    return jnp.flip(jax.lax.slice_in_dim(values, first - length + 1, first + 1, axis=axis), axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather_rows(axis: int, size: int, values: Array, index: Array) -> Array:
    return jnp.take(values, index, axis=axis, mode="clip")


def _gather_rows_forward(axis, size, values, index):
    return _gather_rows(axis, size, values, index), index


def _gather_rows_backward(axis, size, index, gradient):
    one_hot = (index[:, None] == jnp.arange(size, dtype=index.dtype)[None, :]).astype(gradient.dtype)
    summed = jnp.tensordot(gradient, one_hot, axes=([axis], [0]), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(summed, -1, axis), None


_gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


def pick(x: Float[Array, "B N T R"], index: Array) -> Float[Array, "B N T S"]:
    """out[b, n, y, x] = in[b, n, y, index[b, y, x]], for an int32 index `[B or 1, T, S]`; the gradient is `collect`."""
    return _pick(x, index, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _pick(x: Array, index: Array, size: int) -> Array:
    shape = (*x.shape[:3], index.shape[2])
    return jnp.take_along_axis(x, jnp.broadcast_to(index[:, None], shape), axis=-1, mode="promise_in_bounds")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def collect(x: Float[Array, "B N T S"], index: Array, size: int) -> Float[Array, "B N T R"]:
    """The transpose of `pick`, R = size: sums the entries of equal index, in a fixed order and without atomics.

    Products with one-hot blocks of bounded size.
    """
    batch, heads, rows, keys = x.shape
    block = int(np.clip(_ONE_HOT_ENTRIES // (rows * size), 1, keys))
    blocks = -(-keys // block)
    x = jnp.pad(x, [(0, 0)] * 3 + [(0, blocks * block - keys)]).reshape(batch, heads, rows, blocks, block)
    index = jnp.pad(index, [(0, 0), (0, 0), (0, blocks * block - keys)], constant_values=-1)
    index = index.reshape(index.shape[0], rows, blocks, block)

    def add(total, part):
        entries, columns = part
        one_hot = (columns[..., None] == jnp.arange(size, dtype=columns.dtype)[None, None, None]).astype(x.dtype)
        one_hot = jnp.broadcast_to(one_hot, (batch, *one_hot.shape[1:]))
        return total + jnp.einsum("bnty,btyr->bntr", entries, one_hot, precision=jax.lax.Precision.HIGHEST), None

    total = jnp.zeros((batch, heads, rows, size), x.dtype)
    return jax.lax.scan(add, total, (jnp.moveaxis(x, 3, 0), jnp.moveaxis(index, 2, 0)))[0]


_pick.defvjp(
    lambda x, index, size: (_pick(x, index, size), index),
    lambda size, index, gradient: (collect(gradient, index, size), None),
)
collect.defvjp(
    lambda x, index, size: (collect(x, index, size), index),
    lambda size, index, gradient: (_pick(gradient, index, size), None),
)
