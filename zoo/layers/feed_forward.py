"""Position-wise feed-forward networks."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from zoo.encodings import Dims
from zoo.mixers import Style
from zoo.registry import Registry

registry = Registry("feed-forward")


@dataclass(frozen=True)
class FeedForward(abc.ABC):
    """A feed-forward network of inner width F = `width`, by default 4·D."""

    name: ClassVar[str]
    width: int | None = None

    @abc.abstractmethod
    def module(self, dims: Dims, style: Style) -> nn.Module:
        """`(x [B,T,D], train) → [B,T,D]`."""


@registry.register("gelu")
@dataclass(frozen=True)
class Gelu(FeedForward):
    """y = gelu(x W_up + b) W_down + b (Vaswani et al. 2017 with the GELU of arXiv:1606.08415).

    The exact erf form by default, as in BERT's PyTorch ports; `approximate` gives the tanh form of the TensorFlow code.
    """

    approximate: bool = False

    def module(self, dims: Dims, style: Style) -> nn.Module:
        return FeedForwardModule(
            self.width or 4 * dims.model_dim, dims.model_dim, _gelu(self.approximate), False, style
        )


@registry.register("geglu")
@dataclass(frozen=True)
class GeGLU(FeedForward):
    """y = (gelu(x W_gate + b) ⊙ (x W_up + b)) W_down + b (Shazeer 2020, arXiv:2002.05202)."""

    approximate: bool = False

    def module(self, dims: Dims, style: Style) -> nn.Module:
        return FeedForwardModule(self.width or 4 * dims.model_dim, dims.model_dim, _gelu(self.approximate), True, style)


@registry.register("swiglu")
@dataclass(frozen=True)
class SwiGLU(FeedForward):
    """y = (silu(x W_gate + b) ⊙ (x W_up + b)) W_down + b (Shazeer 2020, arXiv:2002.05202)."""

    def module(self, dims: Dims, style: Style) -> nn.Module:
        return FeedForwardModule(self.width or 4 * dims.model_dim, dims.model_dim, jax.nn.silu, True, style)


def _exact_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _tanh_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _gelu(approximate: bool) -> Callable[[jax.Array], jax.Array]:
    return _tanh_gelu if approximate else _exact_gelu


def _in_float32(activation: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """activation(x), computed in float32 where x is narrower; the backward pass keeps the narrow x alone.

    The cube in the tanh form of GELU leaves float16 at |x| = 41, the square in its derivative at 256: then 0 · ∞ is NaN.
    """
    if x.dtype == jnp.float32:
        return activation(x)

    def narrow(x: jax.Array) -> jax.Array:
        return activation(x.astype(jnp.float32)).astype(x.dtype)

    return jax.checkpoint(narrow, prevent_cse=False)(x)


class FeedForwardModule(nn.Module):
    width: int
    model_dim: int
    activation: Callable[[jax.Array], jax.Array]
    gated: bool
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        up = self.style.dense(self.width, name="up")(x)
        if self.gated:
            hidden = _in_float32(self.activation, self.style.dense(self.width, name="gate")(x)) * up
        else:
            hidden = _in_float32(self.activation, up)
        return self.style.dense(self.model_dim, name="down")(hidden)
