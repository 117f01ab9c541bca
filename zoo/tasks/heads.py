"""Heads: what stands on the last layer and gives logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.layers.activations import Activation, activate


class MaskedLMHead(nn.Module):
    """LN(act(h W + b)) Eᵀ + c: [B, P, D] and the input embedding E [V, E] → float32 logits [B, P, V].

    Without `transform` it is h Eᵀ + c (EuroBERT, NeoBERT); without `transform_bias` dense and norm have no bias (ModernBERT),
    without `output_bias` there is no c. `tied=False` has a table [V, E] of its own in the embedding's place.
    The products run in `dtype`, sums, norm and logits in float32.
    """

    embedding_dim: int
    activation: Activation
    epsilon: float
    dtype: Any
    initializer: Callable
    transform: bool = True
    transform_bias: bool = True
    output_bias: bool = True
    tied: bool = True

    @nn.compact
    def __call__(self, hidden: jax.Array, table: jax.Array) -> jax.Array:
        x, bias = hidden, self.transform_bias
        if self.transform:
            x = nn.Dense(
                self.embedding_dim, use_bias=bias, dtype=self.dtype, kernel_init=self.initializer, name="dense"
            )(x)
            x = activate(self.activation, x.astype(jnp.float32))
            x = nn.LayerNorm(epsilon=self.epsilon, use_bias=bias, use_fast_variance=False, name="norm")(x)
        if not self.tied:
            table = self.param("table", self.initializer, table.shape, jnp.float32)
        logits = jnp.einsum(
            "bpe,ve->bpv", x.astype(self.dtype), table.astype(self.dtype), preferred_element_type=jnp.float32
        )
        if not self.output_bias:
            return logits
        return logits + self.param("bias", nn.initializers.zeros, (table.shape[0],), jnp.float32)
