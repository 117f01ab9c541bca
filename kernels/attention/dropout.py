"""Dropout bits by counting: which probabilities are dropped is a pure function of (key, b, n, i, j)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def key_words(key: jax.Array) -> jax.Array:
    """The uint32 `[2]` seed of a JAX random key, typed or raw."""
    words = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    words = words.reshape(-1).astype(jnp.uint32)
    # Keys of four words (rbg) hold the threefry key twice; keys of one word are used for both.
    return jnp.stack([words[0], words[-1] ^ jnp.uint32(0x85EBCA6B)])


def _scramble(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every input bit changes every output bit with probability near one half."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def keep_mask(
    words: jax.Array, rate: float, batch: int, heads: int, query_index: jax.Array, key_index: jax.Array
) -> jax.Array:
    """bool `[B, N, T, S]`, True with probability 1 − rate, for array indices `query_index` `[T]` and `key_index` `[S]`.

    The indices are those of the whole arrays, so that a tile gets the bits of its place whatever the tiling.
    """
    first, second = row_words(words, batch, heads, query_index)
    columns = key_index.astype(jnp.uint32)[None, None, None, :]
    return keep(first[..., None], second[..., None], columns, rate)


def keep(first: jax.Array, second: jax.Array, key_index: jax.Array, rate: float) -> jax.Array:
    """Whether entries stay, elementwise, from the words of their rows and the uint32 index of their keys."""
    # One scramble per entry, with the row's second word put in half way: two rows then never share a shifted sequence.
    x = first ^ (key_index * jnp.uint32(0x9E3779B9))
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D) + second
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    x = x ^ (x >> 16)
    return x >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def row_words(words: jax.Array, batch: int, heads: int, query_index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two uint32 `[B, N, T]`, from which the hash of an entry goes on with its key index."""
    axes = (
        jnp.arange(batch, dtype=jnp.uint32)[:, None, None],
        jnp.arange(heads, dtype=jnp.uint32)[None, :, None],
        query_index.astype(jnp.uint32)[None, None, :],
    )
    first, second = words[0], words[1]
    for axis in axes:
        first = _scramble(first.reshape((1,) * (axis.ndim - first.ndim) + first.shape) ^ axis)
        second = _scramble(second.reshape((1,) * (axis.ndim - second.ndim) + second.shape) + axis)
    return first, second
