"""What a checkpoint becomes: a model, its parameters, its tokenizer, and one function that runs them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from kernels.attention import Positions
from zoo.data.tokenizer import Tokenizer
from zoo.errors import UserError
from zoo.interop.sentence_embedding import SentenceEmbedding
from zoo.models import Transformer
from zoo.tasks.heads import DiscriminatorHead, LinearHead
from zoo.tasks.masked_lm import MaskedLM
from zoo.tasks.token_tagging import TokenTagging

# Head → where its linear layer stands: over the pooled output or over every token.
_OVER_POOLED = ("classification", "nsp", "sop")
OVER_TOKENS = ("token_tagging", "question_answering")
SENTENCES = ("nsp", "sop")


class Outputs(NamedTuple):
    """What a pretrained model gives for a batch; float32.

    Attributes:
      hidden: `[B, T, D]`, the last layer's output. What stands at padding is of no use.
      pooled: `[B, D]`, None where the checkpoint has no pooler.
      logits: of the checkpoint's head, None where it has none: `[B, T, V]` of the vocabulary, `[B, C]` of classes, `[B, T, C]`
        of tags, `[B, T, 2]` of an answer's start and end, `[B, T]` of replaced tokens.
      sentence_logits: `[B, 2]` of the next-sentence or sentence-order head beside a masked-LM head.
      replaced_logits: `[B, T]` of a discriminator's head beside another head.
    """

    hidden: jax.Array
    pooled: jax.Array | None
    logits: jax.Array | None
    sentence_logits: jax.Array | None
    replaced_logits: jax.Array | None = None


@dataclass(frozen=True)
class Head:
    """A head of a checkpoint: its name under `heads/`, the fields of its task, and its number of classes."""

    name: str
    settings: tuple[tuple[str, Any], ...] = ()
    classes: int = 0


class EncoderWithHeads(nn.Module):
    """(input ids, attention mask, token types) → `Outputs`, with the parameters of a run: `model` and `heads`."""

    model: Transformer
    kinds: tuple[Head, ...]
    positions_from_mask: bool

    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array, token_type_ids: jax.Array | None) -> Outputs:
        positions = None
        if self.positions_from_mask:
            counted = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
            positions = Positions(counted, contiguous=True)
        encoded = self.model(input_ids, token_type_ids=token_type_ids, segment_ids=attention_mask, positions=positions)
        made = AllHeads(self.model, self.kinds, name="heads")(encoded) if self.kinds else {}
        sentence = next((made.pop(name) for name in SENTENCES if name in made), None)
        if sentence is not None and not made:
            made, sentence = {"sentences": sentence}, None
        replaced = made.pop("discriminator") if len(made) > 1 and "discriminator" in made else None
        logits = next(iter(made.values()), None)
        return Outputs(encoded.hidden, encoded.pooled, logits, sentence, replaced)


class AllHeads(nn.Module):
    """Every head over what the encoder gave, by name."""

    model: Transformer
    kinds: tuple[Head, ...]

    @nn.compact
    def __call__(self, encoded: Any) -> dict[str, jax.Array]:
        return {head.name: self._of(head)(encoded) for head in self.kinds}

    def _of(self, head: Head) -> Callable[[Any], jax.Array]:
        if head.name == "masked_lm":
            module = MaskedLM(**dict(head.settings)).head(self.model)(name=head.name)
            return lambda encoded: module(encoded.hidden, self.model.embedding_table())
        if head.name == "discriminator":
            module = DiscriminatorHead(
                dtype=self.model.dtype, initializer=self.model.initializer(), name=head.name, **dict(head.settings)
            )
            return lambda encoded: module(encoded.hidden)
        if head.name in _OVER_POOLED:
            linear = LinearHead(head.classes, 0.0, self.model.initializer(), name=head.name)
            return lambda encoded: linear(encoded.pooled, train=False)
        over_tokens = TokenTagging(**dict(head.settings)).head(self.model, head.classes, dropout=0.0)(name=head.name)
        return lambda encoded: over_tokens(encoded.hidden, train=False)


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A checkpoint ready to run.

    Attributes:
      model: the encoder.
      params: `{"model": …, "heads": {name: …}}`, float32, as a run of ours has them.
      tokenizer: None where the directory has none.
      config: the entries of a config that make the model: model, encoding, mixer, feed_forward, norm.
      architecture: the family, as config.json calls it; None for a run of ours.
      heads: the heads it has.
      labels: the names of a classifier's classes or tags, in the order of the logits.
      sentence_embedding: how a sentence encoder makes one vector of a text; None where the directory does not say.
    """

    model: Transformer
    params: Mapping[str, Any]
    tokenizer: Tokenizer | None
    config: ConfigDict
    architecture: str | None = None
    heads: tuple[Head, ...] = ()
    labels: tuple[str, ...] = ()
    sentence_embedding: SentenceEmbedding | None = None
    positions_from_mask: bool = False
    pad_token_id: int | None = None
    """What config.json calls padding; a tokenizer's own counts before it."""

    def apply(
        self,
        input_ids: np.ndarray | jax.Array,
        attention_mask: np.ndarray | jax.Array | None = None,
        token_type_ids: np.ndarray | jax.Array | None = None,
    ) -> Outputs:
        """Runs the model on `input_ids` `[B, T]`; `attention_mask` `[B, T]` is 1 at tokens and 0 at padding, None = all tokens.

        Products have full float32 precision on every device, so that the numbers are those of the source library.

        Raises:
          UserError: an id outside the vocabulary, a shape that does not fit, or token types that the model does not have.
        """
        ids = np.asarray(input_ids)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"input_ids must be integers [B, T], not {ids.dtype} {list(ids.shape)}")
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
        types = None if token_type_ids is None else np.asarray(token_type_ids)
        for name, array in (("attention_mask", mask), ("token_type_ids", types)):
            if array is not None and array.shape != ids.shape:
                raise UserError(f"{name} is {list(array.shape)}, input_ids {list(ids.shape)}; they must be alike")
        _check_range("input_ids", ids, self.model.vocab_size)
        _check_range("attention_mask", mask, 2)
        if types is not None:
            _check_range("token_type_ids", types, max(self.model.token_types, 1))
            types = types if self.model.token_types else None
        with jax.default_matmul_precision("highest"):
            return self._run(self.params, ids.astype(np.int32), mask.astype(np.int32), types)

    def embed(self, texts: Sequence[str], max_length: int | None = None) -> np.ndarray:
        """One vector `[D]` per text, as the sentence encoder was trained to give it: float32 `[B, D]`.

        Raises:
          UserError: no tokenizer, or the directory does not say how its vectors are made.
        """
        if self.sentence_embedding is None or self.tokenizer is None:
            missing = (
                "a tokenizer" if self.tokenizer is None else "modules.json, which says how tokens become one vector"
            )
            raise UserError(f"this checkpoint is no sentence encoder: it has not {missing}")
        length = min(max_length or self.sentence_embedding.max_length, self.model.dims.max_length)
        ids, mask = self._rows(texts, length)
        hidden = self.apply(ids, mask).hidden
        return np.asarray(self.sentence_embedding(np.asarray(hidden, np.float32), mask))

    def _rows(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        vocabulary = self.tokenizer.vocabulary
        rows = [
            [vocabulary.cls, *pieces.ids[: length - 2], vocabulary.sep]
            for pieces in self.tokenizer.encode_batch(list(texts))
        ]
        longest = max(map(len, rows))
        ids = np.full((len(rows), longest), vocabulary.pad, np.int32)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        lengths = np.array([len(row) for row in rows])
        return ids, (np.arange(longest) < lengths[:, None]).astype(np.int32)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Path → shape of every parameter."""
        return {path: leaf.shape for path, leaf in flatten_dict(dict(self.params), sep="/").items()}

    @functools.cached_property
    def module(self) -> EncoderWithHeads:
        """The encoder and its heads as one module; `params` are its parameters."""
        return EncoderWithHeads(self.model, self.heads, self.positions_from_mask)

    @functools.cached_property
    def _run(self) -> Callable[..., Outputs]:
        return jax.jit(lambda params, ids, mask, types: self.module.apply({"params": params}, ids, mask, types))


def _check_range(name: str, array: np.ndarray, size: int) -> None:
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < size:
        raise UserError(f"{name} has values from {array.min()} to {array.max()}; they must be 0 to {size - 1}")
