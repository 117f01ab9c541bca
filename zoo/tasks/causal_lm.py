"""Causal language modelling: every token from those before it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.errors import UserError
from zoo.tasks.heads import Heads
from zoo.tasks.packed_documents import PackedDocuments
from zoo.tasks.registration import registry
from zoo.tasks.task import Output, check_same_length, cross_entropy, encode

# Tokens of a row that meet the vocabulary at a time: of all logits [B, T, V] only a slice is there at once.
_CHUNK = 128


@registry.register("causal_lm")
@dataclasses.dataclass(frozen=True)
class CausalLM(PackedDocuments):
    """−Σ_t w_t log p(x_{t+1} | x_1 … x_t) / Σ_t w_t with p = softmax(h_t Eᵀ), E the input embedding (Radford et al. 2019, GPT-2).

    Rows are filled with documents, anew for every epoch; w_t is 0 where the row, the document, or a run of tokens ends.

    Attributes: those of `PackedDocuments`. Here documents packed into one row see each other by default, and a document's first
    token is then predicted from the one before it.
    """

    attend_across: bool = True

    @property
    def main_metric(self) -> str:
        return "accuracy"

    def module(self, model: nn.Module) -> nn.Module:
        """Raises UserError where the model sees what it is to predict."""
        if not model.causal:
            raise UserError(f"task {self.name!r} predicts the next token, which this model sees; set model.causal=True")
        return CausalLMModule(model, self.contiguous)

    def features(
        self, example: Mapping[str, np.ndarray], rng: np.random.Generator, vocabulary: Any
    ) -> dict[str, np.ndarray]:
        """`input_ids`, `segment_ids`, `labels` and `label_weights` [T]; `positions` [T] where documents are apart."""
        row = self.row(example, rng)
        ids, segments = row["input_ids"], row["segment_ids"]
        follows = (segments[1:] == segments[:-1]) & (segments[1:] > 0) & (np.diff(row["positions"]) == 1)
        return {"input_ids": ids, **self.placed(row)} | {
            "labels": np.append(ids[1:], vocabulary.pad).astype(np.int32),
            "label_weights": np.append(follows, False).astype(np.float32),
        }

    def score(self, predictions: Mapping[str, np.ndarray], examples: Sequence) -> dict[str, float]:
        """`loss` in nats per token, `perplexity` exp(loss), `accuracy` of the likeliest token, over the whole set."""
        check_same_length(predictions, examples)
        weight = float(np.sum(predictions["weight"], dtype=np.float64))
        if weight == 0:
            raise UserError(f"task {self.name!r}: the evaluation set has no token that follows another")
        loss = float(np.sum(predictions["loss"], dtype=np.float64)) / weight
        accuracy = float(np.sum(predictions["correct"], dtype=np.float64)) / weight
        return {"loss": loss, "perplexity": float(np.exp(loss)), "accuracy": accuracy}


class CausalLMModule(nn.Module):
    """(batch, train) → one loss over the labelled tokens; predictions `loss`, `weight`, `correct`, each [B, T].

    All three are zero where a token has no label, so that their sums over any part of a row are that part's.
    """

    model: nn.Module
    contiguous: bool = True

    @nn.compact
    def __call__(self, batch: dict[str, jax.Array], train: bool = False) -> Output:
        hidden = encode(self.model, batch, train, self.contiguous).hidden
        table = self.model.embedding_table()
        if table.shape[1] != hidden.shape[-1]:
            project = functools.partial(
                nn.Dense, table.shape[1], dtype=self.model.dtype, kernel_init=self.model.initializer()
            )
            hidden = Heads("causal_lm", project, name="heads")(hidden)
        weight = batch["label_weights"] * batch["example_weight"].astype(jnp.float32)[:, None]
        loss, correct = next_token_losses(hidden.astype(self.model.dtype), table, batch["labels"])
        # Not a product: a row of padding may hold what is not finite.
        loss = jnp.where(weight > 0, loss * weight, 0)
        return Output(
            {"causal_lm": (loss.sum(), weight.sum())},
            {"loss": loss, "weight": weight, "correct": correct * weight},
        )


def next_token_losses(hidden: jax.Array, table: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """−log softmax(hidden tableᵀ)[label] and whether the label is the likeliest, float32: [B, T, E], [V, E], [B, T] → [B, T].

    The product runs in the dtype of `hidden`, sums and logits in float32. Long rows meet the vocabulary in slices, whose logits
    the backward pass makes again.
    """
    table = table.astype(hidden.dtype)

    def losses(part: jax.Array, its: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = jnp.einsum("bte,ve->btv", part, table, preferred_element_type=jnp.float32)
        return cross_entropy(logits, its), (jnp.argmax(logits, axis=-1) == its).astype(jnp.float32)

    batch, length, width = hidden.shape
    full = length // _CHUNK
    if full < 2:
        return losses(hidden, labels)
    cut = full * _CHUNK
    parts = (
        jnp.moveaxis(hidden[:, :cut].reshape(batch, full, _CHUNK, width), 1, 0),
        jnp.moveaxis(labels[:, :cut].reshape(batch, full, _CHUNK), 1, 0),
    )
    made = jax.lax.map(jax.checkpoint(lambda both: losses(*both)), parts)
    loss, correct = (jnp.moveaxis(array, 0, 1).reshape(batch, cut) for array in made)
    if cut == length:
        return loss, correct
    rest = losses(hidden[:, cut:], labels[:, cut:])
    return jnp.concatenate([loss, rest[0]], axis=1), jnp.concatenate([correct, rest[1]], axis=1)
