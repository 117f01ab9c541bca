"""Which document every token of a call is of, for encodings that carry something from token to token."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.attention import AttentionMask


def documents(mask: AttentionMask, shape: tuple[int, int]) -> jax.Array:
    """int32 `[B, T]` of that shape; 0 is padding."""
    segments = jnp.ones(shape, jnp.int32) if mask.query_segments is None else mask.query_segments.astype(jnp.int32)
    valid = mask.key_valid
    return segments if valid is None or valid.shape != shape else jnp.where(valid, segments, 0)
