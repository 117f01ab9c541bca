"""T5's bucketed relative bias."""

from __future__ import annotations

import math
from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from kernels.attention import Toeplitz
from zoo.encodings.encoding import AddTerms, Dims, Encoding, EncodingLayer, Facts, Place
from zoo.encodings.registration import registry


@registry.register("t5")
@dataclass(frozen=True)
class T5(Encoding):
    """A learned bias per head and bucket of r: logit = scale · ⟨q_i, k_j⟩ + table[bucket(r), n].

    Buckets are exact near the diagonal, logarithmic up to `max_distance` and constant beyond it. One table serves all
    layers. `scale` 1 is T5's own, whose initial weights make up for it; those of this model do not, so that its logits start
    √H times larger than another encoding's. None gives 1/√H, as MPNet has: the fair choice beside other encodings.
    Source: Raffel et al. 2020 (arXiv:1910.10683), section 2.1, and its released code.
    """

    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True
    scale: float | None = 1.0
    stddev: float = 0.02

    def __post_init__(self):
        sides = 2 if self.bidirectional else 1
        if self.num_buckets % (2 * sides) or self.num_buckets < 2 * sides:
            raise ValueError(f"num_buckets={self.num_buckets} must be a positive multiple of {2 * sides}")
        if self.max_distance <= self.num_buckets // (2 * sides):
            raise ValueError(f"max_distance={self.max_distance} must exceed {self.num_buckets // (2 * sides)}")

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"toeplitz"}), bidirectional=self.bidirectional, scale=self.scale)

    def shared(self, dims: Dims) -> nn.Module:
        return BucketBias(self, dims.num_heads)

    def layer(self, dims: Dims) -> EncodingLayer:
        return AddTerms(scale=self.scale)


class BucketBias(nn.Module):
    encoding: T5
    num_heads: int

    @nn.compact
    def __call__(self, place: Place) -> tuple[Toeplitz]:
        shape = (self.encoding.num_buckets, self.num_heads)
        table = self.param("table", nn.initializers.truncated_normal(self.encoding.stddev), shape, jnp.float32)
        # The last bucket begins at or before max_distance, so the table saturates there. A product with one-hot rows
        # instead of a gather: its transpose sums the gradient of a bucket in a fixed order on every device.
        rows = bucket(np.arange(-self.encoding.max_distance, self.encoding.max_distance + 1), self.encoding)
        one_hot = jnp.asarray(np.eye(self.encoding.num_buckets, dtype=np.float32)[rows])
        return (Toeplitz(jnp.einsum("rk,kn->nr", one_hot, table, precision="highest")),)


def bucket(r: np.ndarray, encoding: T5) -> np.ndarray:
    """The bucket of each relative position, on the host, where the logarithm's boundaries are exact."""
    if encoding.bidirectional:
        count, offset, distance = encoding.num_buckets // 2, encoding.num_buckets // 2 * (r > 0), np.abs(r)
    else:
        count, offset, distance = encoding.num_buckets, 0, np.maximum(-r, 0)
    exact = count // 2
    far = np.maximum(distance, exact) / exact
    logarithmic = exact + np.trunc(np.log(far) / math.log(encoding.max_distance / exact) * (count - exact))
    return (offset + np.where(distance < exact, distance, np.minimum(logarithmic, count - 1))).astype(np.int32)
