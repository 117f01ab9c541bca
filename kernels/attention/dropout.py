"""Dropout bits by counting: which probabilities are dropped is a pure function of (key, b, n, i, j).

Entries of one key and of two queries eight apart (i and i ^ 8) share a hash of 32 bits, of which each takes half: a thread of a GPU's matrix
unit holds both, and so does a lane of a TPU, and the hash was most of what dropout costs there. So rates are in steps of 2⁻¹⁶.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

APART = 8  # of two queries that share a hash
HALF = 16  # bits


def key_words(key: jax.Array) -> jax.Array:
    """The uint32 `[2]` seed of a JAX random key, typed or raw."""
    words = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    words = words.reshape(-1).astype(jnp.uint32)
    # Keys of four words (rbg) hold the threefry key twice; keys of one word are used for both.
    return jnp.stack([words[0], words[-1] ^ jnp.uint32(0x85EBCA6B)])


def keep_mask(
    words: jax.Array, rate: float, batch: int, heads: int, query_index: jax.Array, key_index: jax.Array
) -> jax.Array:
    """bool `[B, N, T, S]`, True with probability 1 − rate, for array indices `query_index` `[T]` and `key_index` `[S]`.

    The indices are those of the whole arrays, so that a tile gets the bits of its place whatever the tiling.
    """
    first, second = row_words(words, batch, heads, query_index)
    columns = key_index.astype(jnp.uint32)[None, None, None, :]
    bits = shared_hash(first[..., None], second[..., None], columns)
    return kept(bits << lower_half(query_index)[None, None, :, None], rate)


def shared_hash(first: Any, second: Any, key_index: Any) -> Any:
    """What two queries share, elementwise, from the words of their row and the uint32 index of the key.

    Its upper half is the bits of the query without `APART` in its index, its lower half those of the other. One scramble, with the
    second word put in half way: two rows then never share a shifted sequence.
    """
    x = first ^ (key_index * np.uint32(0x9E3779B9))
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D) + second
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def lower_half(query_index: jax.Array) -> jax.Array:
    """By how many bits (uint32) a query shifts the shared hash to have its own uppermost."""
    return ((query_index & APART) * (HALF // APART)).astype(jnp.uint32)


def kept(bits: jax.Array, rate: float) -> jax.Array:
    """Whether entries stay, from bits that stand uppermost."""
    return bits >= np.uint32(min(round(rate * 2**HALF), 2**HALF - 1) << HALF)


def row_words(words: jax.Array, batch: int, heads: int, query_index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two uint32 `[B, N, T]`, from which the hash of an entry goes on with its key index; `APART` in the index changes nothing."""
    axes = (
        jnp.arange(batch, dtype=jnp.uint32)[:, None, None],
        jnp.arange(heads, dtype=jnp.uint32)[None, :, None],
        (query_index & ~APART).astype(jnp.uint32)[None, None, :],
    )
    first, second = words[0], words[1]
    for axis in axes:
        first = _scramble(first.reshape((1,) * (axis.ndim - first.ndim) + first.shape) ^ axis)
        second = _scramble(second.reshape((1,) * (axis.ndim - second.ndim) + second.shape) + axis)
    return first, second


def _scramble(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every input bit changes every output bit with probability near one half."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
