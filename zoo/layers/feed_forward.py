"""Position-wise feed-forward networks."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax

from zoo.encodings import Dims
from zoo.errors import UserError
from zoo.layers.activations import Activation, activate
from zoo.layers.grouped_dense import GroupedDense
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

    def check(self, dims: Dims) -> None:
        """Refuses sizes of the model that do not fit.

        Raises:
          UserError: which, and what would.
        """
        return None


@registry.register("gelu")
@dataclass(frozen=True)
class Gelu(FeedForward):
    """y = gelu(x W_up + b) W_down + b (Vaswani et al. 2017 with the GELU of arXiv:1606.08415).

    The exact erf form by default, as in BERT's PyTorch ports; `approximate` gives the tanh form of the TensorFlow code.
    With `groups` = G > 1 both matrices are block-diagonal (ConvBERT's medium-small has 2; Jiang et al. 2020, arXiv:2008.02496): the
    channels of x, of the inner layer and of y stand in G equal runs, and run g of each comes from run g of the one before.
    `up` and `down` then hold `group_kernels` `[G, D/G, F/G]` and `[G, F/G, D/G]` instead of `kernel`; the published checkpoints lay
    their `weight` out in the same way, not transposed.
    """

    approximate: bool = False
    groups: int = 1

    def __post_init__(self):
        if self.groups < 1:
            raise ValueError(f"groups={self.groups}; it must be at least 1")

    def check(self, dims: Dims) -> None:
        sizes = {"model_dim": dims.model_dim, "width": self.inner(dims)}
        unequal = [f"{name}={size}" for name, size in sizes.items() if size % self.groups]
        if unequal:
            raise UserError(f"feed-forward {self.name!r}: groups={self.groups} does not divide {' and '.join(unequal)}")

    def module(self, dims: Dims, style: Style) -> nn.Module:
        return FeedForwardModule(
            self.inner(dims), dims.model_dim, _gelu(self.approximate), False, style, groups=self.groups
        )


@registry.register("relu")
@dataclass(frozen=True)
class Relu(FeedForward):
    """y = max(0, x W_up + b) W_down + b (Vaswani et al. 2017, arXiv:1706.03762, equation 2)."""

    def module(self, dims: Dims, style: Style) -> nn.Module:
        return FeedForwardModule(self.inner(dims), dims.model_dim, "relu", False, style)


@registry.register("silu")
@dataclass(frozen=True)
class Silu(FeedForward):
    """y = silu(x W_up + b) W_down + b, silu(u) = u σ(u) (Ramachandran et al. 2017, arXiv:1710.05941)."""

    def module(self, dims: Dims, style: Style) -> nn.Module:
        return FeedForwardModule(self.inner(dims), dims.model_dim, "silu", False, style)


@registry.register("geglu")
@dataclass(frozen=True)
class GeGLU(FeedForward):
    """y = (gelu(x W_gate + b) ⊙ (x W_up + b)) W_down + b (Shazeer 2020, arXiv:2002.05202).

    `up_bias` says whether gate and up have a bias, None = as the model; MosaicBERT has one on down alone.
    """

    approximate: bool = False
    up_bias: bool | None = None

    def module(self, dims: Dims, style: Style) -> nn.Module:
        activation = _gelu(self.approximate)
        return FeedForwardModule(self.inner(dims), dims.model_dim, activation, True, style, self.up_bias)


@registry.register("swiglu")
@dataclass(frozen=True)
class SwiGLU(FeedForward):
    """y = (silu(x W_gate + b) ⊙ (x W_up + b)) W_down + b (Shazeer 2020, arXiv:2002.05202).

    `up_bias` says whether gate and up have a bias, None = as the model.
    """

    up_bias: bool | None = None

    def module(self, dims: Dims, style: Style) -> nn.Module:
        return FeedForwardModule(self.inner(dims), dims.model_dim, "silu", True, style, self.up_bias)


@registry.register("reglu")
@dataclass(frozen=True)
class ReGLU(FeedForward):
    """y = (max(0, x W_gate + b) ⊙ (x W_up + b)) W_down + b (Shazeer 2020, arXiv:2002.05202).

    `up_bias` says whether gate and up have a bias, None = as the model.
    """

    up_bias: bool | None = None

    def module(self, dims: Dims, style: Style) -> nn.Module:
        return FeedForwardModule(self.inner(dims), dims.model_dim, "relu", True, style, self.up_bias)


def _gelu(approximate: bool) -> Activation:
    return "gelu_tanh" if approximate else "gelu"


class FeedForwardModule(nn.Module):
    width: int
    model_dim: int
    activation: Activation
    gated: bool
    style: Style
    up_bias: bool | None = None
    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if self.groups > 1:
            hidden = activate(self.activation, GroupedDense(self.width, self.groups, self.style, name="up")(x))
            return GroupedDense(self.model_dim, self.groups, self.style, name="down")(hidden)
        up = self.style.dense(self.width, "up", self.up_bias)(x)
        if self.gated:
            hidden = activate(self.activation, self.style.dense(self.width, "gate", self.up_bias)(x)) * up
        else:
            hidden = activate(self.activation, up)
        return self.style.dense(self.model_dim, "down")(hidden)
