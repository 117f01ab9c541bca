"""Where the tokens stand: explicit integers, never array indices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np


@no_type_check  # leaves may be whatever JAX puts through a pytree
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
        relative position r = j − i equals the difference of array indices and tables may be sliced. (Without segment ids
        the whole row is one segment.) Where False,
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

    @classmethod
    def on_grid(cls, rows: int, columns: int) -> Positions:
        """The cells of a grid, row after row: `token` is 2 · columns · row + column, so that one r says both offsets."""
        grid = np.stack(np.divmod(np.arange(rows * columns), columns), axis=-1).astype(np.int32)
        return cls(token=jnp.asarray(grid @ np.array([2 * columns, 1], np.int32))[None], grid=jnp.asarray(grid)[None])

    @property
    def length(self) -> int:
        return self.token.shape[-1]


@no_type_check  # leaves may be whatever JAX puts through a pytree
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Placement:
    """Where queries and keys of one call stand, relative to each other.

    Attributes:
      query, key: their positions.
      offset: static. Where set, query i stands at the array index i + offset of the keys, so r = j − i − offset and tables
        may be sliced; None where r is known from the arrays alone.
    """

    query: Positions
    key: Positions
    offset: int | None = field(default=None, metadata={"static": True})

    @classmethod
    def of(cls, positions: Positions | tuple[Positions, Positions] | None, queries: int, keys: int) -> Placement:
        """None: keys 0 … S − 1 with the queries last. One struct: both sides. A pair: the query's, the key's.

        A pair is sliced only where both are the same struct: two contiguous ranges may start anywhere (a cache, an
        encoder's memory), and their distance is not static.
        """
        if positions is None:
            offset = keys - queries
            return cls(Positions.arange(queries, offset), Positions.arange(keys), offset)
        query, key = (positions, positions) if isinstance(positions, Positions) else positions
        for side, given, length in (("queries", query, queries), ("keys", key, keys)):
            if given.token.ndim != 2 or given.length != length:
                raise ValueError(
                    f"positions of the {side} are {given.token.shape}, expected [B or 1, {length}]"
                    + ("; give a pair (the query's, the key's)" if query is key and queries != keys else "")
                )
            if not jnp.issubdtype(given.token.dtype, jnp.integer):
                raise ValueError(f"positions of the {side} are {given.token.dtype}, expected integers")
        aligned = query.token is key.token and query.contiguous and key.contiguous
        return cls(query, key, 0 if aligned else None)
