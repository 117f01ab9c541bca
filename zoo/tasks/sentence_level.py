"""What tasks on a sentence or a pair of sentences share: one label a row, the row itself, and a head on one vector."""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import numpy as np

from zoo.data.truncation import longest_first
from zoo.errors import UserError
from zoo.models.transformer import mean_of_tokens
from zoo.tasks.heads import Heads, LinearHead
from zoo.tasks.task import Task, encode, field


@dataclasses.dataclass(frozen=True, slots=True)
class LabelledText:
    """A tokenized sentence or pair, cut to fit: `first` and `second` are piece ids; the task says what `label` is."""

    first: np.ndarray
    second: np.ndarray | None
    label: int | float
    truncated: bool


@dataclasses.dataclass(frozen=True)
class SentenceLevel(Task):
    """Rows `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]`, one label each (Devlin et al. 2018, arXiv 1810.04805, section 4).

    A record with a field `text_pair` is a pair; its second text and the last [SEP] have token type 1. A pair that is
    too long loses pieces from the end of the longer text, at equal lengths of the second; a single text keeps its
    first `max_length` − 2 pieces. The number of rows cut so is among the scores (`truncated_rows`).

    Attributes:
      pooling: "cls": the model's pooled output, for BERT a tanh layer over [CLS]; "mean": the mean of the last layer over all
        real tokens, special ones included.
    """

    label_type: ClassVar[type[np.generic]]

    pooling: Literal["cls", "mean"] = "cls"

    @abc.abstractmethod
    def label(self, record: Any) -> int | float:
        """The label of a record.

        Raises:
          UserError: it has none, or one that is none of this task's; says file and line.
        """

    def examples(self, source: Any, split: str, tokenizer: Any, directory: Any) -> list[LabelledText]:
        """Raises UserError for a record without its texts, or whose label is none, with file and line."""
        examples: list[LabelledText] = []
        for records in _batches(source.records(split)):
            labels = [self.label(record) for record in records]
            first = tokenizer.encode_batch([field(record, "text", self.name) for record in records])
            second: list[Any] = [None] * len(records)
            if "text_pair" in records[0].fields:
                second = tokenizer.encode_batch([field(record, "text_pair", self.name) for record in records])
            examples += map(self._example, first, second, labels)
        return examples

    def _example(self, first: Any, second: Any, label: int | float) -> LabelledText:
        if second is None:
            room = self.max_length - 2
            return LabelledText(_kept(first.ids, room), None, label, len(first.ids) > room)
        lengths = len(first.ids), len(second.ids)
        kept = longest_first(*lengths, self.max_length - 3)
        return LabelledText(_kept(first.ids, kept[0]), _kept(second.ids, kept[1]), label, kept != lengths)

    def features(self, example: LabelledText, rng: np.random.Generator, vocabulary: Any) -> dict[str, np.ndarray]:
        """`input_ids`, `segment_ids` [T] and `label` []; for a pair `token_type_ids` [T] too."""
        ids = [vocabulary.cls, *example.first, vocabulary.sep]
        start = len(ids)
        if example.second is not None:
            ids += [*example.second, vocabulary.sep]
        row = np.full(self.max_length, vocabulary.pad, np.int32)
        row[: len(ids)] = ids
        at = np.arange(self.max_length)
        features = {
            "input_ids": row,
            "segment_ids": (at < len(ids)).astype(np.int32),
            "label": np.asarray(example.label, self.label_type),
        }
        if example.second is not None:
            features["token_type_ids"] = ((at >= start) & (at < len(ids))).astype(np.int32)
        return features


def truncated_rows(examples: Sequence[LabelledText]) -> dict[str, float]:
    """The score that says how many rows were cut to fit."""
    return {"truncated_rows": float(sum(example.truncated for example in examples))}


def head_outputs(
    model: nn.Module, batch: Mapping[str, jax.Array], *, task: str, outputs: int, pooling: str, train: bool
) -> jax.Array:
    """dropout(pooled) W + b in float32, [B, C] with C = `outputs`; the head's parameters are at `heads/<task>`.

    Called inside the compact method of a task's module.

    Raises:
      UserError: `pooling` is "cls" and the model has no pooler.
    """
    encoded = encode(model, batch, train)
    pooled = encoded.pooled
    if pooling == "mean":
        pooled = mean_of_tokens(encoded.hidden, batch["segment_ids"])
    elif pooled is None:
        raise UserError(f"{task} with pooling='cls' needs a model with a pooler; or choose pooling='mean'")
    head = functools.partial(LinearHead, classes=outputs, dropout=model.dropout, initializer=model.initializer())
    return Heads(task, head, name="heads")(pooled, train)


def _batches(records: Iterator[Any], size: int = 512) -> Iterator[list[Any]]:
    """Lists of records; a source gives pairs or single texts, not both."""
    while batch := list(itertools.islice(records, size)):
        yield batch


def _kept(ids: np.ndarray, count: int) -> np.ndarray:
    return np.array(ids[:count], np.int32)  # a copy: a slice would keep the whole text's pieces alive
