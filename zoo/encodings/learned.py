"""Learned absolute positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import AttentionMask
from zoo.encodings.encoding import Dims, Encoding, Facts, Place
from zoo.encodings.registration import registry
from zoo.errors import UserError


@registry.register("learned")
@dataclass(frozen=True)
class Learned(Encoding):
    """Learned absolute positions: x_i ← x_i + A[p_i + offset], A `[max_length + offset, E]`.

    A sequence longer than the table is an error; the table's length is the model's `max_length`.
    Source: Devlin et al. 2018 (arXiv:1810.04805). RoBERTa's tables start at offset 2.
    """

    offset: int = 0
    stddev: float = 0.02

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"embedding"}))

    def embedding(self, dims: Dims) -> nn.Module:
        return LearnedPositions(dims.max_length, dims.model_dim, self.offset, self.stddev)

    def init_embedding_cache(self, dims: Dims, batch: int, max_length: int, dtype: Any) -> None:
        if max_length > dims.max_length:
            raise UserError(_too_long(dims.max_length, max_length))


class LearnedPositions(nn.Module):
    max_length: int
    width: int
    offset: int
    stddev: float

    @nn.compact
    def __call__(self, x: jax.Array, place: Place, mask: AttentionMask, cache: Any) -> tuple[jax.Array, Any]:
        rows = self.max_length + self.offset
        table = self.param("table", nn.initializers.truncated_normal(self.stddev), (rows, self.width), jnp.float32)
        positions = place.queries
        if place.keys is None and positions.contiguous and positions.length > self.max_length:
            raise UserError(_too_long(self.max_length, positions.length))
        # "fill" turns a row outside the table into NaN, which no run survives unseen; clamping would be silent. Negative
        # positions are sent outside, or they would count from the table's end.
        wanted = jnp.where(positions.token < 0, rows, positions.token + self.offset)
        rows_used = jnp.take(table, wanted, axis=0, mode="fill")
        return x + rows_used.astype(x.dtype), cache


def _too_long(max_length: int, length: int) -> str:
    return (
        f"encoding 'learned' has max_length={max_length} positions, the sequence has {length}; "
        "raise model.max_length, shorten the input, or choose a relative encoding"
    )
