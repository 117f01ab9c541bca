"""Heads: what stands on the last layer or the pooled output and gives logits, and where their parameters lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.dense import logits
from zoo.layers.activations import Activation, activate
from zoo.layers.norms import LayerNorm


class Heads(nn.Module):
    """The parameters beside the Transformer's, at `heads/<task name>`, so that one task's never pass for another's."""

    task: str
    make: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, *args: Any) -> Any:
        return self.make(name=self.task)(*args)


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
            x = LayerNorm(self.epsilon, bias).module(jnp.float32, "norm")(x)
        if not self.tied:
            table = self.param("table", self.initializer, table.shape, jnp.float32)
        scores = logits(jnp.asarray(x, self.dtype), jnp.asarray(table, self.dtype))
        if not self.output_bias:
            return scores
        return scores + self.param("bias", nn.initializers.zeros, (table.shape[0],), jnp.float32)


class LinearHead(nn.Module):
    """dropout → x W + b in float32, [..., D] → [..., C] (Devlin et al. 2018, arXiv 1810.04805, section 4)."""

    classes: int
    dropout: float
    initializer: Callable

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dropout(self.dropout)(x.astype(jnp.float32), deterministic=not train)
        return nn.Dense(self.classes, kernel_init=self.initializer, name="output")(x)


class TransformedHead(nn.Module):
    """x = LN(act(h W + b)); dropout → x W' + c in float32, [..., D] → [..., C]; without `transform_bias` dense and norm have no bias.

    The first product runs in `dtype`. Source: the released code of Warner et al. 2024 (ModernBERT, arXiv:2412.13663).
    """

    classes: int
    dropout: float
    initializer: Callable
    activation: Activation
    epsilon: float
    dtype: Any
    transform_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        width, bias = x.shape[-1], self.transform_bias
        x = nn.Dense(width, use_bias=bias, dtype=self.dtype, kernel_init=self.initializer, name="dense")(x)
        x = activate(self.activation, x.astype(jnp.float32))
        x = LayerNorm(self.epsilon, bias).module(jnp.float32, "norm")(x)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        return nn.Dense(self.classes, kernel_init=self.initializer, name="output")(x)


class DiscriminatorHead(nn.Module):
    """act(h W + b) · w + c: [B, T, D] → float32 logits [B, T], above zero for a token that was replaced.

    With `norm_epsilon` LN(h_0 + h) stands in the place of h; h_0 is the first token's, so that a row must hold one document.
    The first product runs in `dtype`, sums, norm and logits in float32.
    Source: the released code of Clark et al. 2020 (ELECTRA, arXiv:2003.10555), and with the norm that of He et al. 2021
    (DeBERTa v3, arXiv:2111.09543); the papers have w alone.
    """

    activation: Activation
    dtype: Any
    initializer: Callable
    norm_epsilon: float | None = None

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        x = hidden
        if self.norm_epsilon is not None:
            x = x.astype(jnp.float32)
            x = LayerNorm(self.norm_epsilon).module(jnp.float32, "norm")(x[:, :1] + x)
        x = nn.Dense(hidden.shape[-1], dtype=self.dtype, kernel_init=self.initializer, name="dense")(x)
        x = activate(self.activation, x.astype(jnp.float32))
        return nn.Dense(1, kernel_init=self.initializer, name="output")(x)[..., 0]
