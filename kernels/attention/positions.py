"""Where the tokens stand: explicit integers, never array indices."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Positions:
    """Integer positions of one sequence axis.

    Attributes:
      token: int32 `[B or 1, T]`, the position of each token in its document; restarts in every packed segment.
      sentence: int32 `[B or 1, T]`, which sentence of the document the token is in, or None.
      within: int32 `[B or 1, T]`, the token's index within its sentence, or None.
      grid: int32 `[B or 1, T, 2]`, row and column on a two-dimensional grid, or None.
      contiguous: static. True promises that inside every segment `token` grows by one per array index, so that the
        relative position r = j − i equals the difference of array indices and tables may be sliced. Where False,
        tables are gathered, and a fused kernel raises.
    """

    token: jax.Array
    sentence: jax.Array | None = None
    within: jax.Array | None = None
    grid: jax.Array | None = None
    contiguous: bool = field(default=False, metadata={"static": True})

    @classmethod
    def arange(cls, length: int, start: int | jax.Array = 0) -> Positions:
        """Positions start … start + length − 1, shared by the whole batch: `token` is `[1, length]`."""
        return cls(token=start + jnp.arange(length, dtype=jnp.int32)[None, :], contiguous=True)

    @property
    def length(self) -> int:
        return self.token.shape[-1]
