"""Who may attend to whom, as structure: kernels skip blocks by it and nothing builds `[T, S]` from it outside them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import no_type_check

import jax
import jax.numpy as jnp


@no_type_check  # leaves may be whatever JAX puts through a pytree
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionMask:
    """A structural attention mask: key j is visible to query i when every part that is set allows it.

    With r = j − i the difference of *positions* (not of array indices):

    Attributes:
      causal: static; allows r ≤ 0, and everything within the prefix where `prefix_length` is set.
      window: static (left, right); allows −left ≤ r ≤ right.
      block: static block width w; allows ⌊i/w⌋ = ⌊j/w⌋, or, with causal, also the block before (blockwise causal
        attention, Sun et al. 2022, arXiv:2212.10554).
      query_segments, key_segments: int32 `[B, T]` and `[B, S]`; equal ids may interact, id 0 is padding and sees nothing.
      key_valid: bool `[B, S]`, False where the key is padding.
      prefix_length: int32 `[B]`; keys at positions below it are visible to all queries of a causal mask.

    A row that sees no key gives zeros and zero gradients.
    """

    causal: bool = field(default=False, metadata={"static": True})
    window: tuple[int, int] | None = field(default=None, metadata={"static": True})
    block: int | None = field(default=None, metadata={"static": True})
    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None
    key_valid: jax.Array | None = None
    prefix_length: jax.Array | None = None

    @property
    def band(self) -> tuple[int | None, int | None]:
        """(left, right): visible keys have −left ≤ r ≤ right, whatever the arrays say; None where nothing bounds that side."""
        lefts, rights = [], []
        if self.window is not None:
            lefts.append(self.window[0])
            rights.append(self.window[1])
        if self.block is not None:
            lefts.append(2 * self.block - 1 if self.causal else self.block - 1)
            rights.append(self.block - 1)
        if self.causal and self.prefix_length is None:
            rights.append(0)
        return min(lefts, default=None), min(rights, default=None)

    def visible(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array | None:
        """Which keys of one tile its queries see.

        The array leaves are those of the tile: `query_segments` `[B, T]`, `key_segments` and `key_valid` `[B, S]` for the
        tile's T queries and S keys.

        Args:
          query_positions: int32 `[B or 1, T]`.
          key_positions: int32 `[B or 1, S]`.

        Returns:
          bool `[B or 1, T, S]`, or None where every key is visible.
        """
        i = query_positions[:, :, None]
        j = key_positions[:, None, :]
        parts = []
        if self.causal:
            past = j <= i
            if self.prefix_length is not None:
                past = past | (j < self.prefix_length[:, None, None])
            parts.append(past)
        if self.window is not None:
            left, right = self.window
            parts += [j - i >= -left, j - i <= right]
        if self.block is not None:
            ahead = i // self.block - j // self.block
            parts.append((ahead == 0) | (ahead == 1) if self.causal else ahead == 0)
        if self.query_segments is not None:
            own = self.query_segments[:, :, None]
            parts.append((own == self.key_segments[:, None, :]) & (own > 0))
        if self.key_valid is not None:
            parts.append(self.key_valid[:, None, :])
        return functools.reduce(jnp.logical_and, parts) if parts else None
