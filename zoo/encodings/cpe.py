"""CPE: positions from a depthwise convolution over the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import AttentionMask
from zoo.encodings.documents import documents
from zoo.encodings.encoding import Dims, Encoding, Facts, Place
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


class Neighbours(NamedTuple):
    """Tokens in a row: x `[B, W, E]`, their positions and their documents `[B, W]` (0 = padding). Decoding keeps the last."""

    x: jax.Array
    token: jax.Array
    segment: jax.Array

    def before(self, more: Neighbours) -> Neighbours:
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], axis=1), self, more)

    def cut(self, start: int, length: int) -> Neighbours:
        return jax.tree.map(lambda a: a[:, start : start + length], self)


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

        here = Neighbours(x, jnp.broadcast_to(place.queries.token, x.shape[:2]), documents(mask, x.shape[:2]))
        left = width - 1 if mask.causal else (width - 1) // 2
        if cache is None:
            around = jax.tree.map(
                lambda a: jnp.pad(a, [(0, 0), (left, width - 1 - left)] + [(0, 0)] * (a.ndim - 2)), here
            )
        else:
            around = cache.before(here)
        total = jnp.broadcast_to(bias, x.shape)
        for tap in range(width):
            there = around.cut(tap, length)
            near = (there.token - here.token == tap - left) & (there.segment == here.segment) & (here.segment > 0)
            total = total + kernel[tap] * jnp.where(near[..., None], there.x, 0).astype(jnp.float32)
        return x + total.astype(x.dtype), None if cache is None else around.cut(length, width - 1)
