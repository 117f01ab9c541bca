"""Classification of a sentence or a pair of sentences."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.errors import UserError, near
from zoo.tasks import scores
from zoo.tasks.registration import registry
from zoo.tasks.sentence_level import LabelledText, SentenceLevel, head_outputs, truncated_rows
from zoo.tasks.task import Output, check_same_length, cross_entropy, field


@registry.register("classification")
@dataclasses.dataclass(frozen=True)
class Classification(SentenceLevel):
    """logits = dropout(pooled) W + b over `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]` (arXiv 1810.04805, section 4).

    Rows, truncation and `pooling` are those of `SentenceLevel`.

    Attributes:
      labels: the classes in the order of the logits; empty: those of the train split, sorted. With two classes the
        second is the positive one of F1.
    """

    label_type = np.int32

    labels: tuple[str, ...] = ()

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

    def label(self, record: Any) -> int:
        """Raises UserError for a label outside the set, with file, line and the near labels."""
        label = str(field(record, "label", self.name))
        if label not in self._index:
            raise UserError(
                f"{record.file}:{record.line}: label {label!r} is not in the set; {near(label, self._index)}"
            )
        return self._index[label]

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        return {label: k for k, label in enumerate(self.labels)}

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
        return {**result, **truncated_rows(examples)}


class ClassificationModule(nn.Module):
    """(batch, train) → one loss, Σ over rows of −log p(label) weighted by `example_weight`; predictions `label` [B]."""

    model: nn.Module
    classes: int
    pooling: str

    @nn.compact
    def __call__(self, batch: dict[str, jax.Array], train: bool = False) -> Output:
        head = dict(task="classification", outputs=self.classes, pooling=self.pooling, train=train)
        logits = head_outputs(self.model, batch, **head)
        weight = batch["example_weight"].astype(jnp.float32)
        loss = (cross_entropy(logits, batch["label"]) * weight).sum()
        predictions = {"label": jnp.argmax(logits, axis=-1).astype(jnp.int32)}
        return Output({"classification": (loss, weight.sum())}, predictions)
