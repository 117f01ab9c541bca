"""Tokens to vectors."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.layers.dropout import Dropout
from zoo.layers.norms import Norm
from zoo.mixers import Style


class Embeddings(nn.Module):
    """x = dropout(norm(position(token[id] + type[type_id]))) W, as BERT has it (arXiv:1810.04805, figure 2).

    `position` is what the encodings add at the input. W `[E, D]` is there where the embedding width E differs from the
    model's (ALBERT, arXiv:1909.11942), or always with `projects` (FNet); `num_types` 0 leaves the type embedding out,
    `output_norm` None the norm.
    """

    vocab_size: int
    width: int
    model_dim: int
    num_types: int
    output_norm: Norm | None
    style: Style
    projects: bool = False

    def setup(self):
        initial = nn.initializers.truncated_normal(self.style.stddev)
        # Rows are taken in float32 and made narrow then, so that the gradient of a row, a sum over all its tokens, is
        # added up in float32: in bfloat16 a sum of equal numbers ends growing after 256 of them.
        self.token = nn.Embed(self.vocab_size, self.width, embedding_init=initial, dtype=jnp.float32)
        if self.num_types:
            self.token_type = nn.Embed(self.num_types, self.width, embedding_init=initial, dtype=jnp.float32)
        if self.output_norm is not None:
            self.norm = self.output_norm.module(self.style.dtype)
        if self.projects or self.width != self.model_dim:
            self.projection = self.style.dense(self.model_dim)
        self.dropout = Dropout(self.style.dropout)

    def __call__(
        self,
        input_ids: jax.Array,
        token_type_ids: jax.Array | None,
        position: Callable[[jax.Array], jax.Array],
        train: bool,
    ) -> jax.Array:
        x = self.token(input_ids).astype(self.style.dtype)
        if self.num_types:
            types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            x = x + self.token_type(types).astype(self.style.dtype)
        elif token_type_ids is not None:
            raise ValueError("the model has no token types (model.token_types = 0), but token_type_ids were given")
        x = position(x)
        if self.output_norm is not None:
            x = self.norm(x)
        x = self.dropout(x, deterministic=not train)
        return self.projection(x) if self.projects or self.width != self.model_dim else x

    def table(self) -> jax.Array:
        """The token table `[V, E]`, for a tied head."""
        return self.token.embedding
