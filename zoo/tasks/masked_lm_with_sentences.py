"""Masked language modelling together with a prediction about two segments: does the second follow the first?"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.data.sentence_pairs import SPECIALS, Objective, SentencePairs
from zoo.data.store import prepare
from zoo.errors import UserError
from zoo.tasks.heads import LinearHead
from zoo.tasks.masked_lm import MaskedTokens, at_masks, masked_lm_output
from zoo.tasks.registration import registry
from zoo.tasks.task import Output, cross_entropy, encode


@registry.register("masked_lm_with_sentences")
@dataclasses.dataclass(frozen=True)
class MaskedLMWithSentences(MaskedTokens):
    """Masked LM and next-sentence or sentence-order prediction: c₁ Σ w l / Σ w over masks + c₂ Σ v s / Σ v over rows.

    l is the loss of `masked_lm`; s = −log softmax(pooled W + b)[label], label 0 for two segments in their order.
    "nsp", BERT's and NEZHA's (arXiv 1810.04805, section 3.1; 1909.00204): 1 where the second is from another document.
    "sop", ALBERT's (arXiv 1909.11942, section 3.1): 1 where the two are swapped. Rows are pairs of segments of a
    document, drawn anew for every epoch; `zoo.data.sentence_pairs` has the rules. Needs a model with a pooler.

    Attributes (and those of `MaskedTokens`):
      objective: "nsp" or "sop".
      short_rate: the share of rows that are shorter than they could be, by a random length.
      masked_lm_coefficient, sentence_coefficient: c₁ and c₂; the sources have 1 and 1.
      seed: of all pairs.
    """

    objective: Objective = "nsp"
    short_rate: float = 0.1
    masked_lm_coefficient: float = 1.0
    sentence_coefficient: float = 1.0
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.max_length < SPECIALS + 2:
            raise UserError(f"task {self.name!r}: max_length must be at least {SPECIALS + 2}, not {self.max_length}")
        if not 0 <= self.short_rate <= 1:
            raise UserError(f"task {self.name!r}: short_rate must be between 0 and 1, not {self.short_rate}")
        for name in ("masked_lm_coefficient", "sentence_coefficient"):
            if getattr(self, name) < 0:
                raise UserError(f"task {self.name!r}: {name} must not be negative, but is {getattr(self, name)}")

    @property
    def coefficients(self) -> dict[str, float]:
        return {"masked_lm": self.masked_lm_coefficient, self.objective: self.sentence_coefficient}

    def examples(self, source: Any, split: str, tokenizer: Any, directory: Any) -> SentencePairs:
        """Pairs over the prepared store, which is made in `directory` where it is not there yet."""
        try:
            return SentencePairs(
                prepare(source, split, tokenizer, directory),
                tokenizer.vocabulary,
                row_length=self.max_length,
                objective=self.objective,
                short_rate=self.short_rate,
                seed=self.seed,
            )
        except UserError as error:
            raise UserError(f"task {self.name!r}, split {split!r}: {error}") from error

    def features(
        self, example: Mapping[str, np.ndarray], rng: np.random.Generator, vocabulary: Any
    ) -> dict[str, np.ndarray]:
        """`input_ids`, `segment_ids`, `token_type_ids` [T]; `masked_*` [P]; `sentence_label`, `sentence_weight` []."""
        kept = ("segment_ids", "token_type_ids", "sentence_label", "sentence_weight")
        return {**self.hidden_tokens(example, rng, vocabulary), **{name: example[name] for name in kept}}

    def module(self, model: nn.Module) -> nn.Module:
        """Raises UserError for a model without a pooler or token types, or that the head does not fit."""
        if not model.has_pooler:
            raise UserError(f"task {self.name!r} needs a model with a pooler; set model.pooler, or choose 'masked_lm'")
        if model.token_types < 2:
            raise UserError(
                f"task {self.name!r} tells the two segments apart by token types; model.token_types is "
                f"{model.token_types}, at least 2 are needed"
            )
        return MaskedLMWithSentencesModule(model, self.objective, self.head(model))

    def score(self, predictions: Mapping[str, np.ndarray], examples: Sequence) -> dict[str, float]:
        """`loss`, `perplexity` and `accuracy` of the hidden tokens, and by the objective's name, such as `nsp_loss` and
        `nsp_accuracy`, those of the pairs, all over the whole set."""
        weight = float(np.sum(predictions["sentence_weight"], dtype=np.float64))
        if weight == 0:
            raise UserError(f"task {self.name!r}: no row of the evaluation set has two segments")
        loss, correct = (
            float(np.sum(predictions[name], dtype=np.float64)) / weight
            for name in ("sentence_loss", "sentence_correct")
        )
        return {
            **super().score(predictions, examples),
            f"{self.objective}_loss": loss,
            f"{self.objective}_accuracy": correct,
        }


class MaskedLMWithSentencesModule(nn.Module):
    """(batch, train) → two losses; predictions of the masked LM, and `sentence_loss`, `_weight`, `_correct`, each [B].

    Each head lies under its own objective's name, `heads/masked_lm` and `heads/nsp` or `heads/sop`, so that masked LM
    alone can go on from here, and the other way round.
    """

    model: nn.Module
    objective: str
    masked_lm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, batch: dict[str, jax.Array], train: bool = False) -> Output:
        encoded = encode(self.model, batch, train)
        sentences = functools.partial(LinearHead, classes=2, dropout=0.0, initializer=self.model.initializer())
        token_logits, pair_logits = PretrainingHeads(self.objective, self.masked_lm, sentences, name="heads")(
            at_masks(encoded.hidden, batch), self.model.embedding_table(), encoded.pooled
        )
        output = masked_lm_output(token_logits, batch)
        label = batch["sentence_label"]
        weight = batch["sentence_weight"] * batch["example_weight"].astype(jnp.float32)
        loss = cross_entropy(pair_logits, label) * weight
        correct = (jnp.argmax(pair_logits, axis=-1) == label) * weight
        return Output(
            {**output.losses, self.objective: (loss.sum(), weight.sum())},
            {**output.predictions, "sentence_loss": loss, "sentence_weight": weight, "sentence_correct": correct},
        )


class PretrainingHeads(nn.Module):
    """The two heads side by side: hidden tokens [B, P, D] and table [V, E] → [B, P, V]; pooled [B, D] → [B, 2]."""

    objective: str
    masked_lm: Callable[..., nn.Module]
    sentences: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, hidden: jax.Array, table: jax.Array, pooled: jax.Array) -> tuple[jax.Array, jax.Array]:
        token_logits = self.masked_lm(name="masked_lm")(hidden, table)
        return token_logits, self.sentences(name=self.objective)(pooled, train=False)
