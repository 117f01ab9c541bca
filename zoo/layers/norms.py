"""Normalisation of the last axis."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from zoo.registry import Registry

registry = Registry("norm")


@dataclass(frozen=True)
class Norm(abc.ABC):
    """A normalisation; its module computes in float32 and returns `dtype`."""

    name: ClassVar[str]

    @abc.abstractmethod
    def module(self, dtype: Any) -> nn.Module:
        """`x [..., D] → [..., D]`."""


@registry.register("layernorm")
@dataclass(frozen=True)
class LayerNorm(Norm):
    """y = (x − mean) / √(variance + epsilon) · scale + bias, biased variance (Ba et al. 2016, arXiv:1607.06450)."""

    epsilon: float = 1e-12
    use_bias: bool = True

    def module(self, dtype: Any) -> nn.Module:
        # The fast form E[x²] − E[x]² loses all digits where the mean is large against the deviation.
        return nn.LayerNorm(epsilon=self.epsilon, use_bias=self.use_bias, dtype=dtype, use_fast_variance=False)


@registry.register("rmsnorm")
@dataclass(frozen=True)
class RMSNorm(Norm):
    """y = x / √(mean(x²) + epsilon) · scale (Zhang and Sennrich 2019, arXiv:1910.07467); `use_scale=False`: no scale (RoFormer v2)."""

    epsilon: float = 1e-6
    use_scale: bool = True

    def module(self, dtype: Any) -> nn.Module:
        return nn.RMSNorm(epsilon=self.epsilon, use_scale=self.use_scale, dtype=dtype, param_dtype=jnp.float32)
