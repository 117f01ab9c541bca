"""The tokens next to a token, for convolutions: only those of its document, and in their place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.attention import AttentionMask
from zoo.encodings.documents import documents
from zoo.encodings.encoding import Place


class Neighbours(NamedTuple):
    """Tokens in a row: x `[B, W, E]`, their positions and their documents `[B, W]` (0 = padding). Decoding keeps the last."""

    x: jax.Array
    token: jax.Array
    segment: jax.Array

    def before(self, more: Neighbours) -> Neighbours:
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], axis=1), self, more)

    def cut(self, start: int, length: int) -> Neighbours:
        return jax.tree.map(lambda a: a[:, start : start + length], self)

    def padded(self, left: int, right: int) -> Neighbours:
        return jax.tree.map(lambda a: jnp.pad(a, [(0, 0), (left, right)] + [(0, 0)] * (a.ndim - 2)), self)


def neighbours(x: jax.Array, place: Place, mask: AttentionMask) -> Neighbours:
    """The tokens of a call, x `[B, T, E]`."""
    return Neighbours(x, jnp.broadcast_to(place.queries.token, x.shape[:2]), documents(mask, x.shape[:2]))


def taps(here: Neighbours, around: Neighbours, left: int, right: int) -> Iterator[jax.Array]:
    """For each distance d = −left … right the tokens at it, `[B, T, E]`: x_{i+d}, or zero where no neighbour counts.

    One counts where it is of the same document, is not padding, and stands at just the distance d in positions as well as in the
    array. `around` holds the tokens `here` with `left` more before and `right` more behind.
    """
    for tap in range(left + right + 1):
        there = around.cut(tap, here.x.shape[1])
        near = (there.token - here.token == tap - left) & (there.segment == here.segment) & (here.segment > 0)
        yield jnp.where(near[..., None], there.x, 0)
