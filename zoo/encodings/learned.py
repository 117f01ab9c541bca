"""Learned absolute positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import AttentionMask
from zoo.encodings.encoding import Dims, Encoding, Facts, Place
from zoo.encodings.registration import registry
from zoo.errors import UserError


@registry.register("learned")
@dataclass(frozen=True)
class Learned(Encoding):
    """Learned absolute positions: x_i ← x_i + A[p_i + offset], A `[max_length + offset, E]`.

    A sequence longer than the table is an error; the table's length is the model's `max_length`.
    `interpolate=512` keeps a table of 512 rows, such as one that was trained at that length, and stretches it to `max_length`
    by s = max_length / 512: A'[p] = (1 − f) A[⌊p/s⌋] + f A[⌊p/s⌋ + 1] with f = p/s − ⌊p/s⌋, the last row repeated at the end.
    What stood at p stands at s·p; the ends of the two tables are not aligned.
    Source: Devlin et al. 2018 (arXiv:1810.04805); interpolation Karypis et al. 2023 (arXiv:2310.14633). RoBERTa's tables start at
    offset 2, and rows before the offset are not stretched.
    """

    offset: int = 0
    stddev: float = 0.02
    interpolate: int | None = None

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"embedding"}))

    def embedding(self, dims: Dims) -> nn.Module:
        trained = dims.max_length if self.interpolate is None else self.interpolate
        if not 1 <= trained <= dims.max_length:
            raise UserError(
                f"encoding 'learned' has interpolate={trained}, the rows to stretch to max_length={dims.max_length}; it must be "
                "1 to max_length"
            )
        return LearnedPositions(dims.max_length, trained, dims.model_dim, self.offset, self.stddev)

    def init_embedding_cache(self, dims: Dims, batch: int, max_length: int, dtype: Any) -> None:
        if max_length > dims.max_length:
            raise UserError(_too_long(dims.max_length, max_length))


class LearnedPositions(nn.Module):
    max_length: int
    trained: int
    width: int
    offset: int
    stddev: float

    @nn.compact
    def __call__(self, x: jax.Array, place: Place, mask: AttentionMask, cache: Any) -> tuple[jax.Array, Any]:
        shape = (self.trained + self.offset, self.width)
        table = self.param("table", nn.initializers.truncated_normal(self.stddev), shape, jnp.float32)
        if self.trained < self.max_length:
            table = jnp.concatenate([table[: self.offset], stretched(table[self.offset :], self.max_length)])
        rows = self.max_length + self.offset
        positions = place.queries
        if place.keys is None and positions.contiguous and positions.length > self.max_length:
            raise UserError(_too_long(self.max_length, positions.length))
        # "fill" turns a row outside the table into NaN, which no run survives unseen; clamping would be silent. Negative
        # positions are sent outside, or they would count from the table's end.
        wanted = jnp.where(positions.token < 0, rows, positions.token + self.offset)
        rows_used = jnp.take(table, wanted, axis=0, mode="fill")
        return x + rows_used.astype(x.dtype), cache


def stretched(table: jax.Array, length: int) -> jax.Array:
    """`table` `[R, E]` stretched to `[length, E]` by linear interpolation between rows: A'[p] = A[p · R / length]."""
    # On the host, in integers: a quotient that float32 rounds up to the next row would mix the wrong two.
    low, rest = np.divmod(np.arange(length, dtype=np.int64) * table.shape[0], length)
    fraction = (rest / length).astype(np.float32)[:, None]
    return (1 - fraction) * table[low] + fraction * table[np.minimum(low + 1, table.shape[0] - 1)]


def _too_long(max_length: int, length: int) -> str:
    return (
        f"encoding 'learned' has max_length={max_length} positions, the sequence has {length}; "
        "raise model.max_length, shorten the input, or choose a relative encoding"
    )
