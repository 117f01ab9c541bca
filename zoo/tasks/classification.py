"""Classification of a sentence or a pair of sentences."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.data.truncation import longest_first
from zoo.errors import UserError, near
from zoo.tasks import scores
from zoo.tasks.registration import registry
from zoo.tasks.task import Heads, LinearHead, Output, Task, check_same_length, cross_entropy, encode, field


@dataclasses.dataclass(frozen=True, slots=True)
class LabelledText:
    """A tokenized sentence or pair, cut to fit: `first` and `second` are piece ids, `label` an index into the labels."""

    first: np.ndarray
    second: np.ndarray | None
    label: int
    truncated: bool


@registry.register("classification")
@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """logits = dropout(pooled) W + b over `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]` (arXiv 1810.04805, section 4).

    A record with a field `text_pair` is a pair; its second text and the last [SEP] have token type 1. A pair that is
    too long loses pieces from the end of the longer text, at equal lengths of the second; a single text keeps its
    first `max_length` − 2 pieces. The number of rows cut so is among the scores (`truncated_rows`).

    Attributes:
      labels: the classes in the order of the logits; empty: those of the train split, sorted. With two classes the
        second is the positive one of F1.
      pooling: "cls": the model's pooled output, a tanh layer over [CLS]; "mean": the mean of the last layer over all
        real tokens, special ones included.
    """

    labels: tuple[str, ...] = ()
    pooling: Literal["cls", "mean"] = "cls"

    @property
    def main_metric(self) -> str:
        return "accuracy"

    def resolve(self, source: Any) -> Classification:
        if self.labels:
            return self
        found = {str(field(record, "label", self.name)) for record in source.records("train")}
        if len(found) < 2:
            raise UserError(f"task {self.name!r}: the train split has {len(found)} different labels; two are needed")
        return dataclasses.replace(self, labels=tuple(sorted(found)))

    def examples(self, source: Any, split: str, tokenizer: Any, directory: Any) -> list[LabelledText]:
        """Raises UserError for a label outside the set, with file, line and the near labels."""
        index = {label: k for k, label in enumerate(self.labels)}
        examples: list[LabelledText] = []
        for records in _batches(source.records(split)):
            labels = [self._label(record, index) for record in records]
            first = tokenizer.encode_batch([field(record, "text", self.name) for record in records])
            second: list[Any] = [None] * len(records)
            if "text_pair" in records[0].fields:
                second = tokenizer.encode_batch([field(record, "text_pair", self.name) for record in records])
            examples += map(self._example, first, second, labels)
        return examples

    def _label(self, record: Any, index: Mapping[str, int]) -> int:
        label = str(field(record, "label", self.name))
        if label not in index:
            raise UserError(f"{record.file}:{record.line}: label {label!r} is not in the set; {near(label, index)}")
        return index[label]

    def _example(self, first: Any, second: Any, label: int) -> LabelledText:
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
            "label": np.asarray(example.label, np.int32),
        }
        if example.second is not None:
            features["token_type_ids"] = ((at >= start) & (at < len(ids))).astype(np.int32)
        return features

    def module(self, model: nn.Module) -> nn.Module:
        """Raises UserError where the labels are not known yet: `resolve` first."""
        if not self.labels:
            raise UserError(f"task {self.name!r} has no labels")
        return ClassificationModule(model, len(self.labels), self.pooling)

    def score(self, predictions: Mapping[str, np.ndarray], examples: Sequence[LabelledText]) -> dict[str, float]:
        """`accuracy`, `mcc`, with two classes `f1`, and `truncated_rows`; `predictions` holds `label` [B]."""
        check_same_length(predictions, examples)
        gold = np.asarray([example.label for example in examples])
        result = scores.classification(gold, np.asarray(predictions["label"]), len(self.labels))
        return {**result, "truncated_rows": float(sum(example.truncated for example in examples))}


class ClassificationModule(nn.Module):
    """(batch, train) → one loss, Σ over rows of −log p(label) weighted by `example_weight`; predictions `label` [B]."""

    model: nn.Module
    classes: int
    pooling: str

    @nn.compact
    def __call__(self, batch: dict[str, jax.Array], train: bool = False) -> Output:
        encoded = encode(self.model, batch, train)
        pooled = encoded.pooled
        if self.pooling == "mean":
            real = (batch["segment_ids"] > 0)[..., None]
            total = jnp.where(real, encoded.hidden.astype(jnp.float32), 0).sum(1)
            pooled = total / jnp.maximum(real.sum(1), 1)
        elif pooled is None:
            raise UserError("classification with pooling='cls' needs a model with a pooler; or choose pooling='mean'")
        head = functools.partial(
            LinearHead, classes=self.classes, dropout=self.model.dropout, initializer=self.model.initializer()
        )
        logits = Heads("classification", head, name="heads")(pooled, train)
        weight = batch["example_weight"].astype(jnp.float32)
        loss = (cross_entropy(logits, batch["label"]) * weight).sum()
        predictions = {"label": jnp.argmax(logits, axis=-1).astype(jnp.int32)}
        return Output({"classification": (loss, weight.sum())}, predictions)


def _batches(records: Iterator[Any], size: int = 512) -> Iterator[list[Any]]:
    """Lists of records; a source gives pairs or single texts, not both."""
    while batch := list(itertools.islice(records, size)):
        yield batch


def _kept(ids: np.ndarray, count: int) -> np.ndarray:
    return np.array(ids[:count], np.int32)  # a copy: a slice would keep the whole text's pieces alive
