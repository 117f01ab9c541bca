"""Position-wise feed-forward networks."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax

from zoo.encodings import Dims
from zoo.layers.activations import Activation, activate
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

    def inner(self, dims: Dims) -> int:
        """F."""
        return self.width or 4 * dims.model_dim


@registry.register("gelu")
@dataclass(frozen=True)
class Gelu(FeedForward):
    """y = gelu(x W_up + b) W_down + b (Vaswani et al. 2017 with the GELU of arXiv:1606.08415).

    The exact erf form by default, as in BERT's PyTorch ports; `approximate` gives the tanh form of the TensorFlow code.
    """

    approximate: bool = False

    def module(self, dims: Dims, style: Style) -> nn.Module:
        return FeedForwardModule(self.inner(dims), dims.model_dim, _gelu(self.approximate), False, style)


@registry.register("geglu")
@dataclass(frozen=True)
class GeGLU(FeedForward):
    """y = (gelu(x W_gate + b) ⊙ (x W_up + b)) W_down + b (Shazeer 2020, arXiv:2002.05202)."""

    approximate: bool = False

    def module(self, dims: Dims, style: Style) -> nn.Module:
        return FeedForwardModule(self.inner(dims), dims.model_dim, _gelu(self.approximate), True, style)


@registry.register("swiglu")
@dataclass(frozen=True)
class SwiGLU(FeedForward):
    """y = (silu(x W_gate + b) ⊙ (x W_up + b)) W_down + b (Shazeer 2020, arXiv:2002.05202)."""

    def module(self, dims: Dims, style: Style) -> nn.Module:
        return FeedForwardModule(self.inner(dims), dims.model_dim, "silu", True, style)


def _gelu(approximate: bool) -> Activation:
    return "gelu_tanh" if approximate else "gelu"


class FeedForwardModule(nn.Module):
    width: int
    model_dim: int
    activation: Activation
    gated: bool
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        up = self.style.dense(self.width, name="up")(x)
        if self.gated:
            hidden = activate(self.activation, self.style.dense(self.width, name="gate")(x)) * up
        else:
            hidden = activate(self.activation, up)
        return self.style.dense(self.model_dim, name="down")(hidden)
