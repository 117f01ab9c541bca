"""What decoding carries from step to step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.attention import Positions
from zoo.errors import UserError
from zoo.models.sentences import Sentences


class DecodingCache(NamedTuple):
    """The state of decoding, of static shapes.

    Attributes:
      layers: per stage and place in the pattern, the mixer's cache with a leading layer axis.
      embedding: per encoding, what it carries at the input.
      token: int32 `[B, S]`, the position of the token in each slot.
      segments: int32 `[B, S]`, its segment; 0 where the slot is empty or holds padding.
      length: int32, slots used.
      sentence, within: int32 `[B, S]`, where an encoding needs sentences, else None.
      counted: where sentences are counted from the input ids, those of the last token.
    """

    layers: tuple[Any, ...]
    embedding: tuple[Any, ...]
    token: jax.Array
    segments: jax.Array
    length: jax.Array
    sentence: jax.Array | None = None
    within: jax.Array | None = None
    counted: Sentences | None = None

    @property
    def capacity(self) -> int:
        return self.token.shape[1]

    def positions(self) -> Positions:
        """The positions of all slots, used or not."""
        return Positions(token=self.token, sentence=self.sentence, within=self.within)

    def append(self, positions: Positions, segments: jax.Array) -> DecodingCache:
        """The cache with T more slots used, `segments` `[B, T]`.

        Raises:
          UserError: positions with indices that the cache does not hold.
        """
        given = {name: getattr(positions, name) for name in ("token", "sentence", "within", "grid")}
        held = {"token": self.token, "sentence": self.sentence, "within": self.within, "grid": None}
        for name, value in given.items():
            if value is not None and held[name] is None:
                raise UserError(f"decoding keeps no {name} positions for this model; leave them out")
        given["segments"], held["segments"] = segments, self.segments

        def write(slots: jax.Array, value: jax.Array) -> jax.Array:
            value = jnp.broadcast_to(value, segments.shape).astype(jnp.int32)
            return jax.lax.dynamic_update_slice(slots, value, (0, self.length))

        written = {name: write(held[name], value) for name, value in given.items() if value is not None}
        return self._replace(**written, length=self.length + segments.shape[1])
