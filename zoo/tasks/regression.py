"""Regression: one number for a sentence or a pair of sentences, such as how alike the two are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.errors import UserError
from zoo.tasks import scores
from zoo.tasks.registration import registry
from zoo.tasks.sentence_level import LabelledText, SentenceLevel, head_outputs, truncated_rows
from zoo.tasks.task import Output, check_same_length, field

LARGEST = float(np.finfo(np.float32).max)


@registry.register("regression")
@dataclasses.dataclass(frozen=True)
class Regression(SentenceLevel):
    """value = dropout(pooled) w + b, trained by (value − label)² on the label as it is (STS-B: 0 to 5; arXiv 1804.07461).

    Rows, truncation and `pooling` are those of `SentenceLevel`. Nothing clips the value to the range of the labels.
    """

    label_type = np.float32

    @property
    def main_metric(self) -> str:
        return "pearson_spearman"

    def label(self, record: Any) -> float:
        """Raises UserError for a label that is no finite number of float32, with file and line."""
        spelled = str(field(record, "label", self.name))
        try:
            label = float(spelled)
        except ValueError:
            label = float("nan")
        if not abs(label) <= LARGEST:
            raise UserError(f"{record.file}:{record.line}: label {spelled!r} is no finite number")
        return label

    def module(self, model: nn.Module) -> nn.Module:
        return RegressionModule(model, self.pooling)

    def score(self, predictions: Mapping[str, np.ndarray], examples: Sequence[LabelledText]) -> dict[str, float]:
        """`pearson`, `spearman`, their mean `pearson_spearman`, `mse`, and `truncated_rows`; `predictions` holds `value` [B]."""
        check_same_length(predictions, examples)
        gold = np.asarray([example.label for example in examples])
        return {**scores.regression(gold, np.asarray(predictions["value"])), **truncated_rows(examples)}


class RegressionModule(nn.Module):
    """(batch, train) → one loss, Σ over rows of (value − label)² weighted by `example_weight`; predictions `value` [B]."""

    model: nn.Module
    pooling: str

    @nn.compact
    def __call__(self, batch: dict[str, jax.Array], train: bool = False) -> Output:
        value = head_outputs(self.model, batch, task="regression", outputs=1, pooling=self.pooling, train=train)[:, 0]
        weight = batch["example_weight"].astype(jnp.float32)
        loss = (jnp.square(value - batch["label"]) * weight).sum()
        return Output({"regression": (loss, weight.sum())}, {"value": value})
