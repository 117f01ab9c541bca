"""Masked language modelling over packed rows, the masks drawn anew each time a row is seen."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.data.masking import mask_tokens
from zoo.errors import UserError
from zoo.layers.activations import Activation
from zoo.tasks.heads import Heads, MaskedLMHead
from zoo.tasks.packed_documents import PackedDocuments
from zoo.tasks.registration import registry
from zoo.tasks.task import Output, Task, check_same_length, cross_entropy, encode


@dataclasses.dataclass(frozen=True)
class MaskedTokens(Task):
    """What every task has that hides tokens of a row and predicts them.

    Attributes:
      rate: the share of a row's tokens to hide.
      max_predictions: P, the slots for hidden tokens in a row; None: what `rate` of a full row needs.
      whole_word: hide all pieces of a word or none.
      replace: shares of hidden tokens that become [MASK], a random token, and stay.
      activation: of the head's transform: "gelu" (by the error function), "gelu_tanh", "relu", "silu" or "tanh".
      norm_epsilon: of the head's layer norm.
      transform: dense layer, activation and norm stand between the last layer and the vocabulary. EuroBERT and NeoBERT have
        none; then activation, norm_epsilon and transform_bias say nothing.
      transform_bias: of the transform's dense layer and norm (ModernBERT has none).
      output_bias: one number for each token of the vocabulary.
      tied: the head multiplies with the input embedding, not with a table of its own, `heads/masked_lm/table` [V, E].
    """

    rate: float = 0.15
    max_predictions: int | None = None
    whole_word: bool = False
    replace: tuple[float, float, float] = (0.8, 0.1, 0.1)
    activation: Activation = "gelu"
    norm_epsilon: float = 1e-12
    transform: bool = True
    transform_bias: bool = True
    output_bias: bool = True
    tied: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.rate < 1:
            raise UserError(f"task {self.name!r}: rate must be between 0 and 1, not {self.rate}")
        if min(self.replace) < 0 or not math.isclose(sum(self.replace), 1.0, abs_tol=1e-6):
            raise UserError(f"task {self.name!r}: replace must be three shares that add up to 1, not {self.replace}")
        if not 1 <= self.slots <= self.max_length:
            raise UserError(f"task {self.name!r}: max_predictions must be 1 to {self.max_length}, not {self.slots}")

    @property
    def slots(self) -> int:
        """P: places for hidden tokens in a row."""
        if self.max_predictions is None:
            return max(1, math.ceil(self.rate * self.max_length))
        return self.max_predictions

    @property
    def main_metric(self) -> str:
        return "accuracy"

    def head(self, model: nn.Module) -> Callable[..., MaskedLMHead]:
        """The head that fits a Transformer, still to be named.

        Raises:
          UserError: without a transform, embeddings of another width than the model's.
        """
        if not self.transform and model.embedding_dim != model.model_dim:
            raise UserError(
                f"task {self.name!r}: transform=False multiplies the last layer with the embeddings, but model.embedding_dim="
                f"{model.embedding_dim} is not model.model_dim={model.model_dim}; leave transform true, or make them equal"
            )
        return functools.partial(
            MaskedLMHead,
            embedding_dim=model.embedding_dim,
            activation=self.activation,
            epsilon=self.norm_epsilon,
            dtype=model.dtype,
            initializer=model.initializer(),
            transform=self.transform,
            transform_bias=self.transform_bias,
            output_bias=self.output_bias,
            tied=self.tied,
        )

    def hidden_tokens(
        self, example: Mapping[str, np.ndarray], rng: np.random.Generator, vocabulary: Any
    ) -> dict[str, np.ndarray]:
        """`input_ids` [T] with tokens hidden, and `masked_*` [P].

        `masked_positions` are indices into the row, `masked_labels` the tokens that stood there, `masked_weights` 1,
        or 0 for an unused slot.
        """
        masked = mask_tokens(
            example["input_ids"],
            example["word_starts"],
            vocabulary=vocabulary,
            rng=rng,
            rate=self.rate,
            count=self.slots,
            whole_word=self.whole_word,
            replace=self.replace,
        )
        return {
            "input_ids": masked.ids,
            "masked_positions": masked.positions,
            "masked_labels": masked.labels,
            "masked_weights": masked.weights,
        }

    def score(self, predictions: Mapping[str, np.ndarray], examples: Sequence) -> dict[str, float]:
        """`loss` in nats per hidden token, `perplexity` exp(loss), `accuracy` over the hidden tokens of the whole set."""
        check_same_length(predictions, examples)
        weight = float(np.sum(predictions["weight"], dtype=np.float64))
        if weight == 0:
            raise UserError(f"task {self.name!r}: no token of the evaluation set was masked")
        loss = float(np.sum(predictions["loss_sum"], dtype=np.float64)) / weight
        return {
            "loss": loss,
            "perplexity": float(np.exp(loss)),
            "accuracy": float(np.sum(predictions["correct"], dtype=np.float64)) / weight,
        }


@registry.register("masked_lm")
@dataclasses.dataclass(frozen=True)
class MaskedLM(PackedDocuments, MaskedTokens):
    """−Σ_k w_k log p(y_k) / Σ_k w_k over the masked positions (Devlin et al. 2018, arXiv 1810.04805, section 3.1).

    p = softmax(LN(gelu(h W + b)) Eᵀ + c) with E the input embedding, or what the fields of the head make of it. Rows are filled with documents, anew for every
    epoch; masks are dynamic (RoBERTa, arXiv 1907.11692, section 4.1): a function of seed, epoch and row. Only the
    masked positions meet the vocabulary.

    Attributes: those of `MaskedTokens` and of `PackedDocuments`.
    """

    def features(
        self, example: Mapping[str, np.ndarray], rng: np.random.Generator, vocabulary: Any
    ) -> dict[str, np.ndarray]:
        """`input_ids`, `segment_ids` [T]; `positions` [T] where documents are apart; `masked_*` [P]."""
        row = self.row(example, rng)
        return self.hidden_tokens(row, rng, vocabulary) | self.placed(row)

    def module(self, model: nn.Module) -> nn.Module:
        """Raises UserError where the head does not fit the model."""
        return MaskedLMModule(model, self.head(model), self.contiguous)


class MaskedLMModule(nn.Module):
    """(batch, train) → one loss over the masked positions; predictions `loss_sum`, `weight`, `correct`, each [B]."""

    model: nn.Module
    head: Callable[..., MaskedLMHead]
    contiguous: bool = True

    @nn.compact
    def __call__(self, batch: dict[str, jax.Array], train: bool = False) -> Output:
        hidden = encode(self.model, batch, train, self.contiguous).hidden
        logits = Heads("masked_lm", self.head, name="heads")(at_masks(hidden, batch), self.model.embedding_table())
        return masked_lm_output(logits, batch)


def at_masks(hidden: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The masked positions of the last layer: [B, T, D] → [B, P, D]."""
    return jnp.take_along_axis(hidden, batch["masked_positions"][..., None], axis=1)


def masked_lm_output(logits: jax.Array, batch: Mapping[str, jax.Array]) -> Output:
    """The loss "masked_lm" and the predictions `loss_sum`, `weight`, `correct` [B] of logits [B, P, V]."""
    labels = batch["masked_labels"]
    weight = batch["masked_weights"] * batch["example_weight"].astype(jnp.float32)[:, None]
    loss = cross_entropy(logits, labels) * weight
    correct = (jnp.argmax(logits, axis=-1) == labels) * weight
    predictions = {"loss_sum": loss.sum(1), "weight": weight.sum(1), "correct": correct.sum(1)}
    return Output({"masked_lm": (loss.sum(), weight.sum())}, predictions)
