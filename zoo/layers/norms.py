"""Normalisation of the last axis."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.norm import normalize
from zoo.registry import Registry

registry = Registry("norm")


@dataclass(frozen=True)
class Norm(abc.ABC):
    """A normalisation; its module computes in float32 and returns `dtype`."""

    name: ClassVar[str]

    @abc.abstractmethod
    def module(self, dtype: Any, name: str | None = None) -> nn.Module:
        """`x [..., D] → [..., D]`."""


@registry.register("layernorm")
@dataclass(frozen=True)
class LayerNorm(Norm):
    """y = (x − mean) / √(variance + epsilon) · scale + bias, biased variance (Ba et al. 2016, arXiv:1607.06450)."""

    epsilon: float = 1e-12
    use_bias: bool = True

    def module(self, dtype: Any, name: str | None = None) -> nn.Module:
        return Normalization(self.epsilon, centered=True, use_bias=self.use_bias, dtype=dtype, name=name)


@registry.register("rmsnorm")
@dataclass(frozen=True)
class RMSNorm(Norm):
    """y = x / √(mean(x²) + epsilon) · scale (Zhang and Sennrich 2019, arXiv:1910.07467); `use_scale=False`: no scale (RoFormer v2)."""

    epsilon: float = 1e-6
    use_scale: bool = True

    def module(self, dtype: Any, name: str | None = None) -> nn.Module:
        scale = self.use_scale
        return Normalization(self.epsilon, centered=False, use_scale=scale, use_bias=False, dtype=dtype, name=name)


class Normalization(nn.Module):
    """`kernels.norm.normalize` with its parameters, float32 `scale` and `bias` `[D]`."""

    epsilon: float
    centered: bool
    use_bias: bool
    dtype: Any
    use_scale: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones, zeros, shape = nn.initializers.ones, nn.initializers.zeros, x.shape[-1:]
        scale = self.param("scale", ones, shape, jnp.float32) if self.use_scale else None
        bias = self.param("bias", zeros, shape, jnp.float32) if self.use_bias else None
        x, scale, bias = (a if a is None else jnp.asarray(a) for a in (x, scale, bias))
        return normalize(x, scale, bias, epsilon=self.epsilon, centered=self.centered, dtype=self.dtype)
