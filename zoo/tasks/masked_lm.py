"""Masked language modelling over packed rows, the masks drawn anew each time a row is seen."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.data.masking import mask_tokens
from zoo.errors import UserError
from zoo.tasks.packed_documents import PackedDocuments
from zoo.tasks.registration import registry
from zoo.tasks.task import Heads, Output, Task, check_same_length, cross_entropy, encode


@dataclasses.dataclass(frozen=True)
class MaskedTokens(Task):
    """What every task has that hides tokens of a row and predicts them.

    Attributes:
      rate: the share of a row's tokens to hide.
      max_predictions: P, the slots for hidden tokens in a row; None: what `rate` of a full row needs.
      whole_word: hide all pieces of a word or none.
      replace: shares of hidden tokens that become [MASK], a random token, and stay.
      activation: gelu by the error function or by tanh.
      norm_epsilon: of the head's layer norm.
    """

    rate: float = 0.15
    max_predictions: int | None = None
    whole_word: bool = False
    replace: tuple[float, float, float] = (0.8, 0.1, 0.1)
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    norm_epsilon: float = 1e-12

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

    p = softmax(LN(gelu(h W + b)) Eᵀ + c) with E the input embedding. Rows are filled with documents, anew for every
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
        return MaskedLMModule(model, self.activation, self.norm_epsilon, self.contiguous)


class MaskedLMModule(nn.Module):
    """(batch, train) → one loss over the masked positions; predictions `loss_sum`, `weight`, `correct`, each [B]."""

    model: nn.Module
    activation: str
    norm_epsilon: float
    contiguous: bool = True

    @nn.compact
    def __call__(self, batch: dict[str, jax.Array], train: bool = False) -> Output:
        hidden = encode(self.model, batch, train, self.contiguous).hidden
        head = masked_lm_head(self.model, self.activation, self.norm_epsilon)
        logits = Heads("masked_lm", head, name="heads")(at_masks(hidden, batch), self.model.embedding_table())
        return masked_lm_output(logits, batch)


def at_masks(hidden: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The masked positions of the last layer: [B, T, D] → [B, P, D]."""
    return jnp.take_along_axis(hidden, batch["masked_positions"][..., None], axis=1)


def masked_lm_head(model: nn.Module, activation: str, norm_epsilon: float) -> Callable[..., MaskedLMHead]:
    """The head that fits a Transformer, still to be named."""
    return functools.partial(
        MaskedLMHead,
        embedding_dim=model.embedding_dim,
        activation=activation,
        epsilon=norm_epsilon,
        dtype=model.dtype,
        initializer=model.initializer(),
    )


def masked_lm_output(logits: jax.Array, batch: Mapping[str, jax.Array]) -> Output:
    """The loss "masked_lm" and the predictions `loss_sum`, `weight`, `correct` [B] of logits [B, P, V]."""
    labels = batch["masked_labels"]
    weight = batch["masked_weights"] * batch["example_weight"].astype(jnp.float32)[:, None]
    loss = cross_entropy(logits, labels) * weight
    correct = (jnp.argmax(logits, axis=-1) == labels) * weight
    predictions = {"loss_sum": loss.sum(1), "weight": weight.sum(1), "correct": correct.sum(1)}
    return Output({"masked_lm": (loss.sum(), weight.sum())}, predictions)


class MaskedLMHead(nn.Module):
    """LN(gelu(h W + b)) Eᵀ + c: [B, P, D] and the table E [V, E] → float32 logits [B, P, V].

    The products run in `dtype`, sums, norm and logits in float32.
    """

    embedding_dim: int
    activation: str
    epsilon: float
    dtype: Any
    initializer: Callable

    @nn.compact
    def __call__(self, hidden: jax.Array, table: jax.Array) -> jax.Array:
        x = nn.Dense(self.embedding_dim, dtype=self.dtype, kernel_init=self.initializer, name="dense")(hidden)
        x = jax.nn.gelu(x.astype(jnp.float32), approximate=self.activation == "gelu_tanh")
        x = nn.LayerNorm(epsilon=self.epsilon, use_fast_variance=False, name="norm")(x)
        product = jnp.einsum(
            "bpe,ve->bpv", x.astype(self.dtype), table.astype(self.dtype), preferred_element_type=jnp.float32
        )
        return product + self.param("bias", nn.initializers.zeros, (table.shape[0],), jnp.float32)
