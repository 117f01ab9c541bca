"""The one Transformer: embeddings, stages of blocks under scan, an optional final norm and pooler."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import AttentionMask, Positions
from zoo.encodings import Dims, Place
from zoo.errors import UserError
from zoo.layers.activations import Activation, activate
from zoo.layers.block import BlockSpec
from zoo.layers.embeddings import Embeddings
from zoo.layers.norms import LayerNorm, Norm
from zoo.mixers import Style
from zoo.models.cache import DecodingCache
from zoo.models.encodings import Encodings
from zoo.models.sentences import Sentences, count, nothing
from zoo.models.stage import Fitted, Stage, fitted_encodings, scanned

Pooling = Literal["first", "mean", "late"]


class EncoderOutput(NamedTuple):
    """What the Transformer returns.

    Attributes:
      hidden: `[B, T, D]`, the last layer's output.
      pooled: `[B, D]`, act(W hidden[:, 0] + b), normalised where the model says so and over all tokens where `pooling` does, or
        None without a pooler.
      hidden_states: `[L + 1, B, T, D]` of the embeddings and every layer, where asked for.
      cache: the decoding cache after this call.
      refined: `[B, T, E]`, what refinement layers made of an encoding's positions, or None without such.
    """

    hidden: jax.Array
    pooled: jax.Array | None = None
    hidden_states: jax.Array | None = None
    cache: DecodingCache | None = None
    refined: jax.Array | None = None


class Transformer(nn.Module):
    """An encoder or, with `causal`, a decoder; every variant is a choice of values here.

    Attributes:
      vocab_size: V.
      dims: D, N, K, H, the number of layers and the longest sequence.
      stages: the depth.
      style: dtype, biases, dropout, initial scale.
      embedding_dim: E, None = D.
      embedding_projection: whether a dense layer takes the embeddings from E to D, None = where the two differ.
      token_types: rows of the token-type table, 0 for none.
      embedding_norm: whether the embeddings are normalised.
      norm: of the embeddings and the end of the stream.
      has_pooler: whether to make one vector of a row.
      pooling: of what, as `ModelConfig` has it.
      pooler_activation, pooler_bias: of the pooler; a bias of None is that of the style.
      has_pooler_norm: whether `norm` follows the pooler's activation.
      causal: whether a token sees only those before it.
      remat_policy: what the backward pass recomputes, by name (`zoo.models.remat`).
      unroll: how many repeats of a stage the compiled program lays out one after another, instead of looping over them; None as
        `ModelConfig` has it.
    """

    vocab_size: int
    dims: Dims
    stages: tuple[Stage, ...]
    style: Style = Style()
    embedding_dim: int | None = None
    embedding_projection: bool | None = None
    token_types: int = 2
    embedding_norm: bool = True
    norm: Norm = LayerNorm()
    has_pooler: bool = True
    pooling: Pooling = "first"
    pooler_activation: Activation = "tanh"
    pooler_bias: bool | None = None
    has_pooler_norm: bool = False
    causal: bool = False
    remat_policy: str = "none"
    unroll: int | None = None

    def __post_init__(self):
        if self.embedding_dim is None:
            self.embedding_dim = self.dims.model_dim
        super().__post_init__()

    def setup(self):
        self.check()
        self.embeddings = Embeddings(
            self.vocab_size,
            self.embedding_dim,
            self.dims.model_dim,
            self.token_types,
            self.norm if self.embedding_norm else None,
            self.style,
            bool(self.embedding_projection),
        )
        encodings = self._fitted()
        self.encodings = Encodings(encodings, self.dims, self.embedding_dim, self.block_specs()[0], self.style)
        # The parameters are the same, and a loop's compile sooner.
        unroll = 1 if self.is_initializing() else self.unroll
        self.stage = [
            scanned(stage, encodings, self.dims, self.style, self.remat_policy, unroll) for stage in self.stages
        ]
        last = self.block_specs()[-1]
        self.ends_normalised = last.mixer.replaces_block or not last.arrangement.final_norm
        if not self.ends_normalised:
            self.final_norm = self.norm.module(self.style.dtype)
        if self.has_pooler:
            self.pooler = self.style.dense(self.dims.model_dim, use_bias=self.pooler_bias)
            if self.has_pooler_norm:
                self.pooler_norm = self.norm.module(self.style.dtype)

    def __call__(
        self,
        input_ids: jax.Array,
        *,
        token_type_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | Positions | None = None,
        cache: DecodingCache | None = None,
        train: bool = False,
        hidden_states: bool = False,
    ) -> EncoderOutput:
        """Encodes `input_ids` `[B, T]`.

        Args:
          input_ids: int32 `[B, T]`.
          token_type_ids: `[B, T]`, None = all zero.
          segment_ids: `[B, T]`, which packed document a token is of; 0 is padding. None = one document, all real.
          positions: `[B, T]` or `Positions`, None = 0 … T − 1 (with a cache: from where it stands). A bare array is
            taken to be any integers from 0 up to max_length, and a row with another one returns NaN; where they grow by
            one inside every segment, say so by `Positions(token, contiguous=True)`, which lets attention slice its
            tables, at any length.
          cache: from `init_cache`, for decoding step by step. A step beyond its capacity returns NaN.
          train: dropout is on (needs the rng "dropout").
          hidden_states: return every layer's output.
        """
        queries = self._positions(input_ids, positions, cache)
        counted = self._sentences(input_ids, segment_ids, queries, cache)
        if counted is not None:
            queries = dataclasses.replace(queries, sentence=counted.sentence, within=counted.within)
        place = Place(queries, span=self._span(queries, cache), train=train)
        if cache is None:
            mask = AttentionMask(causal=self.causal, query_segments=segment_ids, key_segments=segment_ids)
            embedding_cache = (None,) * len(self.encodings.parts)
        else:
            segments = jnp.ones_like(input_ids) if segment_ids is None else segment_ids
            cache = cache.append(queries, segments)._replace(counted=None if counted is None else counted.last())
            mask = AttentionMask(causal=True, query_segments=segments, key_segments=cache.segments)
            place = dataclasses.replace(place, keys=cache.positions())
            embedding_cache = cache.embedding

        refined = None

        def add_positions(h: jax.Array) -> jax.Array:
            nonlocal embedding_cache, refined
            h, embedding_cache, refined = self.encodings.embed(h, place, mask, embedding_cache)
            return h

        x = self.embeddings(input_ids, token_type_ids, add_positions, train)
        carry = (x, self.encodings.init_side(x, place))
        shared = self.encodings.share(place)
        states, caches = [x[None]], []
        for index, stage in enumerate(self.stage):
            carry, (layers, outputs) = stage(
                carry,
                None if cache is None else cache.layers[index],
                shared,
                mask,
                place,
                hidden_states,
            )
            caches.append(layers)
            if hidden_states:
                states.append(outputs.reshape(-1, *x.shape))
        x = carry[0] if self.ends_normalised else self.final_norm(carry[0])
        if not queries.contiguous:
            # No table reaches further, and nothing that was clipped to its end may look right.
            outside = jnp.any((queries.token < 0) | (queries.token > place.span), axis=1)
            x = jnp.where(outside[:, None, None], jnp.nan, x)
        if cache is not None:
            # The slots are written by a clamped slice: past the end nothing returned may look right.
            x = jnp.where(cache.length > cache.capacity, jnp.nan, x)
            cache = cache._replace(layers=tuple(caches), embedding=embedding_cache)
        return EncoderOutput(
            hidden=x,
            pooled=self._pool(x, segment_ids) if self.has_pooler else None,
            hidden_states=jnp.concatenate(states) if hidden_states else None,
            cache=cache,
            refined=refined,
        )

    def check(self) -> None:
        """Refuses, before anything is made, a combination of parts that cannot be honoured.

        Raises:
          UserError: which parts do not go together, and why.
        """
        for spec in self.block_specs():
            spec.check(self.dims, AttentionMask(causal=self.causal))
        if self.embedding_projection is False and self.embedding_dim != self.dims.model_dim:
            raise UserError(
                f"model.embedding_projection=False, but the embeddings have width {self.embedding_dim} and the model "
                f"{self.dims.model_dim}; leave it None, or make model.embedding_dim and model.model_dim equal"
            )
        carrying = [part.encoding.name for part in self._fitted() if "side" in part.encoding.facts().kinds]
        if len(set(carrying)) < len(carrying):
            raise UserError(
                "two variants of one encoding carry state from layer to layer, or one does in attention of two sizes: "
                f"{', '.join(carrying)}"
            )
        if len(self._separators()) > 1:
            raise UserError(
                f"the encodings end sentences with different separators, {' and '.join(map(str, self._separators()))}; "
                "make them equal"
            )

    def init_cache(self, batch: int, max_length: int) -> DecodingCache:
        """An empty cache of `max_length` slots for `batch` rows; needs no parameters.

        Raises:
          UserError: the model is not causal, or a part of it cannot decode.
        """
        if not self.causal:
            raise UserError("decoding needs a causal model: set model.causal=True")
        fitted = self._fitted()
        encodings = [part.encoding for part in fitted]
        for part in encodings:
            if not part.facts().decodes:
                raise UserError(f"position encoding {part.name!r} cannot be evaluated step by step")
        layers = []
        for stage in self.stages:
            one = tuple(
                spec.mixer.init_cache(self.dims, spec.encodings, batch, max_length, self.style.dtype)
                for spec in stage.pattern
            )
            lead = (stage.repeats, 1) if stage.share else (stage.repeats,)
            layers.append(jax.tree.map(lambda a, lead=lead: jnp.broadcast_to(a, lead + a.shape), one))
        width = dataclasses.replace(self.dims, model_dim=self.embedding_dim)
        slots = jnp.zeros((batch, max_length), jnp.int32)
        sentences = slots if any(part.facts().sentences for part in encodings) else None
        return DecodingCache(
            layers=tuple(layers),
            embedding=tuple(
                part.encoding.init_embedding_cache(width, batch, max_length, self.style.dtype) if part.first else None
                for part in fitted
            ),
            token=slots,
            segments=slots,
            length=jnp.zeros((), jnp.int32),
            sentence=sentences,
            within=sentences,
            counted=nothing(batch) if self._separators() else None,
        )

    def block_specs(self) -> tuple[BlockSpec, ...]:
        """Every place of every pattern, in order of depth."""
        return tuple(spec for stage in self.stages for spec in stage.pattern)

    def embedding_table(self) -> jax.Array:
        """The token table `[V, E]`, for a tied head."""
        return self.embeddings.table()

    @property
    def model_dim(self) -> int:
        return self.dims.model_dim

    @property
    def dtype(self) -> Any:
        return self.style.dtype

    @property
    def dropout(self) -> float:
        return self.style.dropout

    def initializer(self) -> Any:
        """What kernels start from."""
        return nn.initializers.truncated_normal(self.style.stddev)

    def _pool(self, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        """`[B, T, D]` → `[B, D]`."""
        if self.pooling == "first":
            x = x[:, 0]
        elif self.pooling == "mean":
            x = mean_of_tokens(x, segment_ids)
        pooled = activate(self.pooler_activation, self.pooler(x))
        pooled = self.pooler_norm(pooled) if self.has_pooler_norm else pooled
        return mean_of_tokens(pooled, segment_ids).astype(x.dtype) if self.pooling == "late" else pooled

    def _positions(self, input_ids: jax.Array, given: Any, cache: DecodingCache | None) -> Positions:
        length = input_ids.shape[1]
        if given is None and cache is None:
            given = Positions.arange(length)
        elif given is None:
            given = Positions(cache.length + jnp.arange(length)[None])
        elif not isinstance(given, Positions):
            given = Positions(token=given)
        return given

    def _fitted(self) -> tuple[Fitted, ...]:
        return fitted_encodings(self.stages, self.dims)

    def _separators(self) -> tuple[tuple[int, ...], ...]:
        """What the encodings end sentences with, each once."""
        found = (part.encoding.facts().separators for part in self._fitted())
        return tuple(dict.fromkeys(separators for separators in found if separators))

    def _sentences(
        self, input_ids: jax.Array, segment_ids: jax.Array | None, given: Positions, cache: DecodingCache | None
    ) -> Sentences | None:
        """The sentences that an encoding needs, counted from the ids where the positions do not say."""
        needing = [part.encoding.name for part in self._fitted() if part.first and part.encoding.facts().sentences]
        if cache is not None and cache.counted is not None and given.sentence is not None:
            raise UserError(
                "this cache counts sentences from the input ids: leave sentence indices out of the positions"
            )
        if not needing or given.sentence is not None:
            return None
        if not self._separators():
            raise UserError(
                f"encoding {' and '.join(map(repr, needing))} needs sentence indices: give it separators=(…), the ids of the "
                "tokens that end a sentence, or positions as Positions(token, sentence=…, within=…); rope and alibi need "
                "neither"
            )
        return count(input_ids, self._separators()[0], segment_ids, None if cache is None else cache.counted)

    def _span(self, queries: Positions, cache: DecodingCache | None) -> int:
        length = queries.length if cache is None else cache.capacity
        return max(1, (length if queries.contiguous else max(length, self.dims.max_length)) - 1)


def mean_of_tokens(x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """The mean over each row's real tokens, `[B, T, D]` → float32 `[B, D]`; zeros for a row of padding."""
    real = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids > 0
    total = jnp.where(real[..., None], x.astype(jnp.float32), 0).sum(1)
    return total / jnp.maximum(real.sum(1, keepdims=True), 1)
