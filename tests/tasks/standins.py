"""A tiny encoder, tokenizer and source that keep the contracts of `zoo.models` and `zoo.data`, for tests of tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

PAD, UNK, CLS, SEP, MASK = range(5)


class Encoded(NamedTuple):
    hidden: jax.Array
    pooled: jax.Array | None


class TinyEncoder(nn.Module):
    """Embeds, projects E → D, adds the mean of its segment and a function of position: enough to notice each input."""

    vocab_size: int = 40
    model_dim: int = 8
    embedding_dim: int = 6
    dropout: float = 0.0
    dtype: Any = jnp.float32
    has_pooler: bool = True
    token_types: int = 2

    def setup(self):
        self.table = self.param("table", self.initializer(), (self.vocab_size, self.embedding_dim))
        self.project = nn.Dense(self.model_dim)
        self.types = self.param("types", nn.initializers.normal(1.0), (2, self.model_dim))
        if self.has_pooler:
            self.pooler = nn.Dense(self.model_dim)

    def initializer(self):
        return nn.initializers.truncated_normal(0.5)

    def embedding_table(self) -> jax.Array:
        return self.table

    def __call__(
        self, input_ids, *, token_type_ids=None, segment_ids=None, positions=None, train=False, **kwargs
    ) -> Encoded:
        shape = input_ids.shape
        segment_ids = jnp.ones(shape, jnp.int32) if segment_ids is None else segment_ids
        token = jnp.broadcast_to(jnp.arange(shape[1]), shape) if positions is None else positions.token
        x = self.project(self.table[input_ids]) + jnp.sin(token)[..., None]
        if token_type_ids is not None:
            x = x + self.types[token_type_ids]
        same = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids > 0)[:, None, :]
        x = x + same @ x / jnp.maximum(same.sum(-1, keepdims=True), 1)
        return Encoded(x, jnp.tanh(self.pooler(x[:, 0])) if self.has_pooler else None)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    size: int = 40
    pad: int = PAD
    unk: int = UNK
    cls: int = CLS
    sep: int = SEP
    mask: int = MASK
    special: tuple[int, ...] = (PAD, UNK, CLS, SEP, MASK)


@dataclasses.dataclass(frozen=True)
class Pieces:
    ids: np.ndarray
    word_starts: np.ndarray


class LetterTokenizer:
    """A piece is two letters; its id depends on the letters alone. Words are separated by blanks."""

    vocabulary = Vocabulary()
    fingerprint = "letters"

    def encode_batch(self, texts: Sequence[str]) -> list[Pieces]:
        return [self.encode_words(text.split()) for text in texts]

    def encode_words(self, words: Sequence[str]) -> Pieces:
        ids, starts = [], []
        for word in words:
            for k in range(0, max(len(word), 1), 2):
                ids.append(5 + sum(map(ord, word[k : k + 2])) % 35 if word.isalnum() else UNK)
                starts.append(k == 0)
        return Pieces(np.asarray(ids, np.int32), np.asarray(starts, bool))


@dataclasses.dataclass(frozen=True)
class Record:
    fields: dict[str, object]
    file: str
    line: int


class ListSource:
    """Records from lists of fields; record k of a split is said to stand in `<split>.txt`, line 10·(k + 1)."""

    def __init__(self, **splits: list[dict[str, object]]):
        self._splits = splits

    def splits(self) -> tuple[str, ...]:
        return tuple(self._splits)

    def records(self, split: str) -> Iterator[Record]:
        for k, fields in enumerate(self._splits[split]):
            yield Record(fields, f"{split}.txt", 10 * (k + 1))

    def fingerprint(self) -> str:
        return str(hash(repr(self._splits)))


def stack(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """A batch of features, every row of weight 1."""
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return {**batch, "example_weight": np.ones(len(rows), np.float32)}
