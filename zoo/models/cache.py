"""What decoding carries from step to step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.attention import Positions


class DecodingCache(NamedTuple):
    """The state of decoding, of static shapes.

    Attributes:
      layers: per stage and place in the pattern, the mixer's cache with a leading layer axis.
      embedding: per encoding, what it carries at the input.
      token: int32 `[B, S]`, the position of the token in each slot.
      segments: int32 `[B, S]`, its segment; 0 where the slot is empty or holds padding.
      length: int32, slots used.
    """

    layers: tuple[Any, ...]
    embedding: tuple[Any, ...]
    token: jax.Array
    segments: jax.Array
    length: jax.Array

    @property
    def capacity(self) -> int:
        return self.token.shape[1]

    def positions(self) -> Positions:
        """The positions of all slots, used or not."""
        return Positions(token=self.token)

    def append(self, positions: Positions, segments: jax.Array) -> DecodingCache:
        """The cache with T more slots used, `segments` `[B, T]`.

        Raises:
          ValueError: positions with sentence or grid indices, which the cache does not hold.
        """
        if not (positions.sentence is None and positions.within is None and positions.grid is None):
            raise ValueError("decoding keeps token positions only, not sentence or grid indices")
        token = jnp.broadcast_to(positions.token, segments.shape).astype(jnp.int32)
        start = (0, self.length)
        return self._replace(
            token=jax.lax.dynamic_update_slice(self.token, token, start),
            segments=jax.lax.dynamic_update_slice(self.segments, segments.astype(jnp.int32), start),
            length=self.length + segments.shape[1],
        )
