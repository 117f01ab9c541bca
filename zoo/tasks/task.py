"""What every task is: examples in; arrays, heads, losses, predictions and scores out."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import Positions
from zoo.errors import UserError


class Output(NamedTuple):
    """What a task's module returns for one batch.

    Attributes:
      losses: name → (sum, weight), float32 scalars. The loss is Σ coefficient · sum / weight with sums and weights
        added over micro-batches and devices before the division.
      predictions: name → an array [B, ...], small enough to gather for a whole evaluation set.
    """

    losses: dict[str, tuple[jax.Array, jax.Array]]
    predictions: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """A pretraining objective or a downstream task: a part, registered under one name.

    Attributes:
      max_length: T, the length every row is cut or padded to, special tokens included.
    """

    max_length: int = 128

    def __post_init__(self):
        if self.max_length < 4:
            raise UserError(f"task {self.name!r}: max_length must be at least 4, not {self.max_length}")

    def check_fits(self, model_length: int) -> None:
        """Refuses rows that a model with this `max_length` cannot take.

        Raises:
          UserError: begins with the field that is too long.
        """
        if self.max_length > model_length:
            raise UserError(
                f"max_length={self.max_length} is longer than model.max_length={model_length}; lower the one or raise the other"
            )

    def check_model(self, model: Any) -> None:
        """Refuses a Transformer that cannot honour how this task's rows are made.

        Raises:
          UserError: begins with the field that is in the way.
        """
        return None

    @property
    def coefficients(self) -> dict[str, float]:
        """The factor of each of the module's losses; by default the one loss has the task's name and counts once."""
        return {self.name: 1.0}

    @property
    @abc.abstractmethod
    def main_metric(self) -> str:
        """The score that says how good a model is; for every task, higher is better."""

    def resolve(self, source: Any) -> Task:
        """The task with what the data decides (such as the labels) filled in from the source's train split."""
        return self

    @abc.abstractmethod
    def examples(self, source: Any, split: str, tokenizer: Any, directory: Any) -> Sequence:
        """The split's examples, tokenized, in the source's order; `directory` is a folder to keep a store in.

        Raises:
          UserError: a record that is no example of this task; says file and line.
        """

    @abc.abstractmethod
    def features(self, example: Any, rng: np.random.Generator, vocabulary: Any) -> dict[str, np.ndarray]:
        """One example as arrays of fixed shape; pure: everything random comes from `rng`."""

    @abc.abstractmethod
    def module(self, model: nn.Module) -> nn.Module:
        """A module (batch, train) → `Output` with parameters {"model": the Transformer's, "heads": {task name: ...}}.

        `batch` holds the features, stacked, and `example_weight` [B]: a row of weight 0 adds nothing to any loss.
        """

    @abc.abstractmethod
    def score(self, predictions: Mapping[str, np.ndarray], examples: Sequence) -> dict[str, float]:
        """The official metrics over a whole set; row k of each prediction belongs to `examples[k]`."""


def encode(model: nn.Module, batch: Mapping[str, jax.Array], train: bool, contiguous: bool = True) -> Any:
    """The Transformer's output for the part of a batch that is its input.

    Positions, where a batch has them, grow by one inside every segment, which the model is told, unless `contiguous` is false.
    A model with less than two token types tells the texts of a pair apart by the separator alone, as RoBERTa and ModernBERT do.
    """
    taken = ("token_type_ids", "segment_ids") if model.token_types > 1 else ("segment_ids",)
    optional = {name: batch[name] for name in taken if name in batch}
    if "positions" in batch:
        optional["positions"] = Positions(batch["positions"], contiguous=contiguous)
    return model(batch["input_ids"], **optional, train=train)


@jax.custom_vjp
def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """−log softmax(logits)[label] in float32: [..., C], [...] → [...]."""
    return _cross_entropy_forward(logits, labels)[0]


def _cross_entropy_forward(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
    wide = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(wide, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(wide, labels[..., None], axis=-1)
    return (total - chosen)[..., 0], (logits, labels, total)


def _cross_entropy_backward(saved: Any, gradient: jax.Array) -> tuple[jax.Array, None]:
    # Elementwise in one expression. JAX's own is a scatter into zeros, which reads and writes the logits several times over.
    logits, labels, total = saved
    here = jnp.arange(logits.shape[-1]) == labels[..., None]
    probability = jnp.exp(logits.astype(jnp.float32) - total)
    return ((probability - here) * gradient[..., None]).astype(logits.dtype), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def field(record: Any, name: str, task: str) -> Any:
    """A record's field.

    Raises:
      UserError: the record has no such field; says which it has.
    """
    if name not in record.fields:
        given = ", ".join(record.fields)
        raise UserError(f"{record.file}:{record.line}: task {task!r} needs a field {name!r}; this source gives {given}")
    return record.fields[name]


def check_same_length(predictions: Mapping[str, np.ndarray], examples: Sequence) -> None:
    """Raises ValueError where a prediction has not one row per example: a score of part of a set is no score."""
    if len(examples) == 0:
        raise UserError("there are no examples to score")
    for name, values in predictions.items():
        if len(values) != len(examples):
            raise ValueError(f"predictions {name!r} have {len(values)} rows for {len(examples)} examples")
