"""CPE: positions from a depthwise convolution over the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import AttentionMask
from zoo.encodings.encoding import Dims, Encoding, Facts, Place
from zoo.encodings.neighbours import Neighbours, neighbours, taps
from zoo.encodings.registration import registry
from zoo.errors import UserError


@registry.register("cpe")
@dataclass(frozen=True)
class Cpe(Encoding):
    """A convolution of every channel with its neighbours, at the input: x_i ← x_i + Σ_d w_d ⊙ x_{i+d} + b.

    d runs over −(width − 1)/2 … (width − 1)/2, under a causal mask over −(width − 1) … 0; w `[width, E]` and b `[E]` are
    learned. Beyond the ends of a document stand zeros, and these are what tells a token where it is: a model sees order, and
    absolute position near an end only. A neighbour counts where it is of the same document, is not padding, and stands at
    just the distance d in positions as well as in the array. Any length. `start="zero"` begins as no encoding at all,
    "fan_out" with a normal of deviation √(2/width) as in the released code.
    Source: Chu et al. 2021 (arXiv:2102.10882). There it is two-dimensional and stands behind the first block; here it is
    one-dimensional and stands at the input.
    """

    width: int = 3
    start: Literal["fan_out", "zero"] = "fan_out"

    def __post_init__(self):
        if self.width < 2:
            raise ValueError(f"encoding 'cpe' has width={self.width}; it must be at least 2, or no token sees another")

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"embedding"}))

    def embedding(self, dims: Dims) -> nn.Module:
        return Convolution(self, dims.model_dim)

    def init_embedding_cache(self, dims: Dims, batch: int, max_length: int, dtype: Any) -> Neighbours:
        before = self.width - 1
        nothing = jnp.zeros((batch, before), jnp.int32)
        return Neighbours(jnp.zeros((batch, before, dims.model_dim), dtype), nothing, nothing)


class Convolution(nn.Module):
    encoding: Cpe
    model_dim: int

    @nn.compact
    def __call__(self, x: jax.Array, place: Place, mask: AttentionMask, cache: Any) -> tuple[jax.Array, Any]:
        width, length = self.encoding.width, x.shape[1]
        if not mask.causal and width % 2 == 0:
            raise UserError(f"encoding 'cpe' has width={width}, which has no middle; make it odd, or the model causal")
        zero = self.encoding.start == "zero"
        start = nn.initializers.zeros if zero else nn.initializers.normal((2 / width) ** 0.5)
        kernel = self.param("kernel", start, (width, self.model_dim), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.model_dim,), jnp.float32)

        here = neighbours(x, place, mask)
        left = width - 1 if mask.causal else (width - 1) // 2
        right = width - 1 - left
        around = here.padded(left, right) if cache is None else cache.before(here)
        total = jnp.broadcast_to(bias, x.shape)
        for tap, there in enumerate(taps(here, around, left, right)):
            total = total + kernel[tap] * there.astype(jnp.float32)
        return x + total.astype(x.dtype), None if cache is None else around.cut(length, width - 1)
