"""A convolution over the tokens that runs beside a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import AttentionMask
from zoo.encodings import Dims, Place
from zoo.encodings.neighbours import neighbours, taps
from zoo.errors import UserError
from zoo.layers.activations import Activation, activate
from zoo.layers.dropout import Dropout
from zoo.mixers import Style
from zoo.registry import Registry

registry = Registry("convolution")


@registry.register("convolution")
@dataclass(frozen=True)
class Convolution:
    """Beside a block, on the same input x: y_i = norm(block(x)_i + act(dropout(Σ_d x_{i+d} W_d + b))), |d| ≤ (kernel − 1)/2.

    W `[kernel, D / groups, D]`: group g of the output's channels sees group g of the input's alone. Beyond the ends of a document
    and at padding stand zeros, as in the encoding `cpe`. The layer that DeBERTa v2 has beside its first block (kernel 3).
    Source: the released code of He et al. 2020 (arXiv:2006.03654), which also sets y to zero at padding.
    """

    name: ClassVar[str]
    kernel: int = 3
    groups: int = 1
    activation: Activation = "tanh"

    def __post_init__(self):
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} has no middle; it must be odd")
        if self.groups < 1:
            raise ValueError(f"groups={self.groups} must be at least 1")

    def check(self, dims: Dims, mask: AttentionMask) -> None:
        """Refuses a model that it cannot stand in.

        Raises:
          UserError: the model is causal, or its width is no multiple of the groups.
        """
        if mask.causal:
            raise UserError("a convolution beside a block sees the tokens behind it; leave it out of a causal model")
        if dims.model_dim % self.groups:
            raise UserError(f"convolution: model_dim={dims.model_dim} is no multiple of groups={self.groups}")

    def module(self, dims: Dims, style: Style) -> nn.Module:
        """`(x [B,T,D], mask, place) → [B,T,D]`, the second term of the sum."""
        return ConvolutionModule(self, dims.model_dim, style)


class ConvolutionModule(nn.Module):
    convolution: Convolution
    model_dim: int
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array, mask: AttentionMask, place: Place) -> jax.Array:
        part, dtype = self.convolution, self.style.dtype
        width, reach = self.model_dim // part.groups, (part.kernel - 1) // 2
        start = nn.initializers.truncated_normal(self.style.stddev)
        kernel = self.param("kernel", start, (part.kernel, width, self.model_dim), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.model_dim,), jnp.float32)
        here = neighbours(x.astype(dtype), place, mask)
        windows = jnp.stack(list(taps(here, here.padded(reach, reach), reach, reach)), axis=2)
        out = jnp.einsum(
            "btkgi,kigo->btgo",
            windows.reshape(*windows.shape[:3], part.groups, width),
            kernel.astype(dtype).reshape(part.kernel, width, part.groups, width),
            preferred_element_type=jnp.float32,
        )
        out = (out.reshape(x.shape) + bias).astype(dtype)
        return activate(part.activation, Dropout(self.style.dropout)(out, deterministic=not place.train))
