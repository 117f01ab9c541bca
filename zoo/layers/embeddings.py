"""Tokens to vectors."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.layers.norms import Norm
from zoo.mixers import Style


class Embeddings(nn.Module):
    """x = dropout(norm(position(token[id] + type[type_id]))) W, as BERT has it (arXiv:1810.04805, figure 2).

    `position` is what the encodings add at the input. W `[E, D]` is there only where the embedding width E differs
    from the model's (ALBERT, arXiv:1909.11942); `num_types` 0 leaves the type embedding out, `output_norm` None the norm.
    """

    vocab_size: int
    width: int
    model_dim: int
    num_types: int
    output_norm: Norm | None
    style: Style

    def setup(self):
        initial = nn.initializers.truncated_normal(self.style.stddev)
        self.token = nn.Embed(self.vocab_size, self.width, embedding_init=initial, dtype=self.style.dtype)
        if self.num_types:
            self.token_type = nn.Embed(self.num_types, self.width, embedding_init=initial, dtype=self.style.dtype)
        if self.output_norm is not None:
            self.norm = self.output_norm.module(self.style.dtype)
        if self.width != self.model_dim:
            self.projection = self.style.dense(self.model_dim)
        self.dropout = nn.Dropout(self.style.dropout)

    def __call__(
        self,
        input_ids: jax.Array,
        token_type_ids: jax.Array | None,
        position: Callable[[jax.Array], jax.Array],
        train: bool,
    ) -> jax.Array:
        x = self.token(input_ids)
        if self.num_types:
            x = x + self.token_type(jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids)
        elif token_type_ids is not None:
            raise ValueError("the model has no token types (model.token_types = 0), but token_type_ids were given")
        x = position(x)
        if self.output_norm is not None:
            x = self.norm(x)
        x = self.dropout(x, deterministic=not train)
        return x if self.width == self.model_dim else self.projection(x)

    def table(self) -> jax.Array:
        """The token table `[V, E]`, for a tied head."""
        return self.token.embedding
