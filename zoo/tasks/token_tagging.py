"""Token tagging: one tag per word, such as the BIO tags of named entities."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.errors import UserError, near
from zoo.layers.activations import Activation
from zoo.tasks import scores
from zoo.tasks.heads import Heads, LinearHead, TransformedHead
from zoo.tasks.registration import registry
from zoo.tasks.task import Output, Task, check_same_length, cross_entropy, encode, field


@dataclasses.dataclass(frozen=True, slots=True)
class TaggedWords:
    """A tokenized sentence.

    Attributes:
      ids: int32, the pieces that fit.
      first: int32, for each word that fits, the index of its first piece in `ids`.
      tags: int32, an index into the labels for every word, also those that do not fit.
    """

    ids: np.ndarray
    first: np.ndarray
    tags: np.ndarray


@registry.register("token_tagging")
@dataclasses.dataclass(frozen=True)
class TokenTagging(Task):
    """logits_i = dropout(h_i) W + b at the first piece of each word (Devlin et al. 2018, arXiv 1810.04805, section 5.3).

    A row is `[CLS] pieces [SEP]`; the other pieces of a word have no label. A word whose first piece is beyond
    `max_length` counts as O in the scores, and the number of such words is among them (`truncated_words`). Tags are
    O, B-type and I-type (IOB2); an I-type that follows nothing of its type is accepted as data, and read by each
    metric in its own way (`zoo.tasks.scores`).

    Attributes:
      labels: the tags in the order of the logits; empty: those of the train split, sorted.
      transform: dense layer, `activation` and norm stand between the last layer and the tags, as in ModernBERT; without it
        activation, norm_epsilon and transform_bias say nothing.
      activation: "gelu" (by the error function), "gelu_tanh", "relu", "silu" or "tanh".
      norm_epsilon: of the transform's norm.
      transform_bias: of the transform's dense layer and norm.
    """

    labels: tuple[str, ...] = ()
    transform: bool = False
    activation: Activation = "gelu"
    norm_epsilon: float = 1e-12
    transform_bias: bool = True

    def __post_init__(self):
        super().__post_init__()
        for label in self.labels:
            if not is_bio(label):
                raise UserError(f"task {self.name!r}: the label {label!r} is none of O, B-type, I-type")

    @property
    def main_metric(self) -> str:
        return "f1"

    def resolve(self, source: Any) -> TokenTagging:
        if self.labels:
            return self
        found: set[str] = set()
        for record in source.records("train"):
            for word, tag in enumerate(field(record, "tags", self.name)):
                if tag not in found and not is_bio(tag):
                    raise UserError(f"{_place(record, word)} has the tag {tag!r}, which is none of O, B-type, I-type")
                found.add(tag)
        if len(found) < 2:
            raise UserError(f"task {self.name!r}: the train split has {len(found)} different tags; two are needed")
        return dataclasses.replace(self, labels=tuple(sorted(found)))

    def examples(self, source: Any, split: str, tokenizer: Any, directory: Any) -> list[TaggedWords]:
        """Raises UserError for a tag outside the set, with file, line, word and the near tags."""
        index = {label: k for k, label in enumerate(self.labels)}
        return [self._example(record, index, tokenizer) for record in source.records(split)]

    def _example(self, record: Any, index: Mapping[str, int], tokenizer: Any) -> TaggedWords:
        words, tags = field(record, "words", self.name), field(record, "tags", self.name)
        if len(words) != len(tags):
            raise UserError(f"{record.file}:{record.line}: {len(words)} words but {len(tags)} tags")
        for word, tag in enumerate(tags):
            if tag not in index:
                raise UserError(f"{_place(record, word)} has the tag {tag!r}, not in the set; {near(tag, index)}")
        pieces = tokenizer.encode_words(words)
        first = np.flatnonzero(pieces.word_starts)
        if len(first) != len(words):
            raise ValueError(f"{record.file}:{record.line}: the tokenizer made {len(first)} words of {len(words)}")
        room = self.max_length - 2
        return TaggedWords(
            np.array(pieces.ids[:room], np.int32),
            first[first < room].astype(np.int32),
            np.asarray([index[tag] for tag in tags], np.int32),
        )

    def features(self, example: TaggedWords, rng: np.random.Generator, vocabulary: Any) -> dict[str, np.ndarray]:
        """`input_ids`, `segment_ids`, `labels` [T] int32 and `label_weights` [T] float32: 1 at first pieces, else 0."""
        length = len(example.ids) + 2
        row = np.full(self.max_length, vocabulary.pad, np.int32)
        row[:length] = [vocabulary.cls, *example.ids, vocabulary.sep]
        labels = np.zeros(self.max_length, np.int32)
        weights = np.zeros(self.max_length, np.float32)
        labels[example.first + 1] = example.tags[: len(example.first)]
        weights[example.first + 1] = 1.0
        segment_ids = (np.arange(self.max_length) < length).astype(np.int32)
        return {"input_ids": row, "segment_ids": segment_ids, "labels": labels, "label_weights": weights}

    def module(self, model: nn.Module) -> nn.Module:
        """Raises UserError where the labels are not known yet: `resolve` first."""
        if not self.labels:
            raise UserError(f"task {self.name!r} has no labels")
        return TokenTaggingModule(model, self.head(model, len(self.labels), model.dropout))

    def head(self, model: nn.Module, classes: int, dropout: float) -> Callable[..., nn.Module]:
        """The head over every token of a Transformer, still to be named."""
        if not self.transform:
            return functools.partial(LinearHead, classes=classes, dropout=dropout, initializer=model.initializer())
        return functools.partial(
            TransformedHead,
            classes=classes,
            dropout=dropout,
            initializer=model.initializer(),
            activation=self.activation,
            epsilon=self.norm_epsilon,
            dtype=model.dtype,
            transform_bias=self.transform_bias,
        )

    def score(self, predictions: Mapping[str, np.ndarray], examples: Sequence[TaggedWords]) -> dict[str, float]:
        """`scores.tagging`'s and `truncated_words`; `predictions` holds `labels` [B, T]."""
        check_same_length(predictions, examples)
        gold, predicted, truncated = [], [], 0
        for row, example in zip(np.asarray(predictions["labels"]), examples, strict=True):
            lost = len(example.tags) - len(example.first)
            truncated += lost
            gold.append([self.labels[k] for k in example.tags])
            predicted.append([self.labels[k] for k in row[example.first + 1]] + ["O"] * lost)
        return {**scores.tagging(gold, predicted), "truncated_words": float(truncated)}


class TokenTaggingModule(nn.Module):
    """(batch, train) → one loss, Σ over labelled words of −log p(tag), its weight the number of labelled words.

    Predictions: `labels` [B, T] int32, the best tag at every position.
    """

    model: nn.Module
    head: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, batch: dict[str, jax.Array], train: bool = False) -> Output:
        encoded = encode(self.model, batch, train)
        logits = Heads("token_tagging", self.head, name="heads")(encoded.hidden, train)
        weight = batch["label_weights"] * batch["example_weight"].astype(jnp.float32)[:, None]
        loss = (cross_entropy(logits, batch["labels"]) * weight).sum()
        predictions = {"labels": jnp.argmax(logits, axis=-1).astype(jnp.int32)}
        return Output({"token_tagging": (loss, weight.sum())}, predictions)


def is_bio(tag: str) -> bool:
    """Whether a tag is O, B-type or I-type."""
    return tag == "O" or (tag[:2] in ("B-", "I-") and len(tag) > 2)


def _place(record: Any, word: int) -> str:
    # Tagged words stand one per line, and a record's line is that of its first word.
    return f"{record.file}:{record.line + word}: word {word + 1} of the sentence ({record.fields['words'][word]!r})"
