"""Which sentence a token is in and where it stands there, found from the ids of the tokens that end a sentence."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sentences(NamedTuple):
    """Per token, int32 `[B, T]`: the index of its sentence in its document, its index within the sentence, and its document.

    Attributes:
      sentence: how many sentences of the document ended before the token; 0 in its first.
      within: tokens of the sentence before it.
      segment: which packed document it is of.
      ends: bool, whether it ends its sentence.
    """

    sentence: jax.Array
    within: jax.Array
    segment: jax.Array
    ends: jax.Array

    def last(self) -> Sentences:
        """Of the last token alone, `[B]`: what the next tokens go on from."""
        return jax.tree.map(lambda a: a[:, -1], self)


def nothing(batch: int) -> Sentences:
    """What a document begins after: `[B]`, of a segment that no token has."""
    zero = jnp.zeros((batch,), jnp.int32)
    return Sentences(zero, zero, zero - 1, zero > 0)


def count(
    input_ids: jax.Array, separators: tuple[int, ...], segments: jax.Array | None, before: Sentences | None = None
) -> Sentences:
    """The sentences of `input_ids` `[B, T]`; a separator ends the sentence that it belongs to.

    Counting begins anew where `segments` `[B, T]` changes, and goes on after `before` `[B]`, the last token of a step earlier.
    """
    batch, length = input_ids.shape
    before = nothing(batch) if before is None else before
    segments = jnp.ones_like(input_ids) if segments is None else segments
    segments = segments.astype(jnp.int32)
    ends = jnp.isin(input_ids, jnp.asarray(separators, input_ids.dtype)) & (segments > 0)
    starts_document = segments != jnp.concatenate([before.segment[:, None], segments[:, :-1]], axis=1)
    after_end = jnp.concatenate([before.ends[:, None], ends[:, :-1]], axis=1)

    # Both counts are differences to the newest start: a running maximum finds it, since what it holds never falls.
    ended = jnp.cumsum(after_end.astype(jnp.int32), axis=1)
    at_document = jnp.where(starts_document, ended, -before.sentence[:, None])
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    at_sentence = jnp.where(starts_document | after_end, index, -before.within[:, None] - 1)
    return Sentences(
        ended - jax.lax.cummax(at_document, axis=1), index - jax.lax.cummax(at_sentence, axis=1), segments, ends
    )
