"""Who may attend to whom, as structure: kernels skip blocks by it and nothing builds `[T, S]` from it outside them."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax


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
