"""Recall: a causal language model that is asked only for what the words before tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from zoo.errors import UserError
from zoo.tasks.causal_lm import CausalLMModule
from zoo.tasks.registration import registry
from zoo.tasks.task import Task, check_same_length, field


@dataclasses.dataclass(frozen=True, slots=True)
class MarkedRow:
    """A tokenized row: `ids` int32 [n], and `answers` bool [n], which of them are to be predicted from those before."""

    ids: np.ndarray
    answers: np.ndarray


@registry.register("recall")
@dataclasses.dataclass(frozen=True)
class Recall(Task):
    """−Σ_t w_t log p(x_{t+1} | x_1 … x_t) / Σ_t w_t, with w_t = 1 where x_{t+1} is of a word to be recalled, else 0.

    Records have the fields `words` and `answers`, the indices of those words. A row is one record's pieces alone, without [CLS] and
    [SEP], and padding. Module and parameters are those of `causal_lm`, so that either is scored on runs of the other.
    """

    @property
    def coefficients(self) -> dict[str, float]:
        return {"causal_lm": 1.0}

    @property
    def main_metric(self) -> str:
        return "accuracy"

    def module(self, model: nn.Module) -> nn.Module:
        """Raises UserError where the model sees what it is to predict."""
        if not model.causal:
            raise UserError(f"task {self.name!r} predicts words from those before them; set model.causal=True")
        return CausalLMModule(model)

    def examples(self, source: Any, split: str, tokenizer: Any, directory: Any) -> list[MarkedRow]:
        """Raises UserError for a row that does not fit, has nothing to recall, or an answer that the tokenizer does not know."""
        return [self.example(record, tokenizer) for record in source.records(split)]

    def example(self, record: Any, tokenizer: Any) -> MarkedRow:
        """One record, tokenized; raises as `examples`."""
        words, answers = field(record, "words", self.name), field(record, "answers", self.name)
        where = f"{record.file}:{record.line}"
        wrong = [answer for answer in answers if not 0 < answer < len(words)]
        if wrong or not answers:
            what = f"answer {wrong[0]} is not" if wrong else "there is no answer"
            raise UserError(f"{where}: {what} among words 1 to {len(words) - 1}, which have others before them")
        pieces = tokenizer.encode_words(words)
        if len(pieces.ids) > self.max_length:
            raise UserError(
                f"{where}: the row has {len(pieces.ids)} pieces, task.max_length is {self.max_length}; raise it, or shorten the "
                "source's length"
            )
        marked = np.isin(np.cumsum(pieces.word_starts) - 1, answers)
        ids = np.asarray(pieces.ids, np.int32)
        if (unknown := ids[marked] == tokenizer.vocabulary.unk).any():
            at = np.cumsum(pieces.word_starts)[np.flatnonzero(marked)[unknown][0]] - 1
            raise UserError(
                f"{where}: the tokenizer does not know the answer {words[at]!r}, which nobody could then recall"
            )
        return MarkedRow(ids, marked)

    def features(self, example: MarkedRow, rng: np.random.Generator, vocabulary: Any) -> dict[str, np.ndarray]:
        """`input_ids`, `segment_ids`, `labels` [T] int32 and `label_weights` [T] float32: 1 before a piece to recall, else 0."""
        length = len(example.ids)
        row = np.full(self.max_length + 1, vocabulary.pad, np.int32)
        row[:length] = example.ids
        weights = np.zeros(self.max_length, np.float32)
        weights[: length - 1] = example.answers[1:]
        return {
            "input_ids": row[:-1],
            "segment_ids": (np.arange(self.max_length) < length).astype(np.int32),
            "labels": row[1:],
            "label_weights": weights,
        }

    def score(self, predictions: Mapping[str, np.ndarray], examples: Sequence) -> dict[str, float]:
        """Over the pieces to be recalled: `loss` in nats, `accuracy` of the likeliest piece; `exact`, the rows wholly right."""
        check_same_length(predictions, examples)
        weight, correct = (np.sum(predictions[name], axis=1, dtype=np.float64) for name in ("weight", "correct"))
        return {
            "loss": float(np.sum(predictions["loss"], dtype=np.float64) / weight.sum()),
            "accuracy": float(correct.sum() / weight.sum()),
            "exact": float(np.mean(correct == weight)),
        }
