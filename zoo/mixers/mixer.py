"""What a sequence mixer is: a frozen value that makes the module which lets tokens see each other."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.dense import product
from zoo.encodings import Dims, Encoding

# The collection in which a mixer keeps its attention scores for a caller that makes it mutable (`zoo.models.attention_scores`).
SCORES = "attention_scores"


@dataclass(frozen=True)
class Style:
    """How all layers of a model compute and start.

    Attributes:
      dtype: of activations and matrix products; parameters are float32.
      use_bias: of the projections and feed-forwards.
      dropout, attention_dropout: rates, of hidden states and of attention probabilities.
      stddev: of the truncated normal that kernels start from.
    """

    dtype: Any = jnp.float32
    use_bias: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    stddev: float = 0.02

    def dense(self, features: int, name: str | None = None, use_bias: bool | None = None) -> nn.Dense:
        """A projection to `features` in this style; `use_bias` None is the style's."""
        return nn.Dense(
            features,
            use_bias=self.use_bias if use_bias is None else use_bias,
            dtype=self.dtype,
            kernel_init=nn.initializers.truncated_normal(self.stddev),
            dot_general=_dense_product,
            name=name,
        )


def _dense_product(x: jax.Array, w: jax.Array, numbers: Any, precision: Any = None) -> jax.Array:
    """`kernels.dense.product` under the signature of `lax.dot_general`; a Dense contracts the last axis with the first."""
    if numbers != (((x.ndim - 1,), (0,)), ((), ())):
        raise ValueError(f"a Dense asked for a product over the axes {numbers}")
    return product(x, w, precision)


@dataclass(frozen=True)
class MixerFacts:
    """What `zoo.compatible` must know about a mixer, without building it.

    Attributes:
      accepts: the kinds of `zoo.encodings.Facts` it can honour.
      refuses: kind, or part of the mask → why it cannot, for those that deserve a reason of their own.
      causal, bidirectional: the directions it can run in.
      grouped_heads: it takes fewer key/value heads than query heads.
      ordered_keys: it visits keys in order.
      decodes: it can run step by step with a cache.
      mask_parts: the parts of `AttentionMask` it honours.
      packs: documents packed into one row stay apart. False: segment ids tell it of padding at most, and a row of several
        documents returns NaN.
    """

    accepts: frozenset[str]
    refuses: Mapping[str, str] = field(default_factory=dict)
    causal: bool = True
    bidirectional: bool = True
    grouped_heads: bool = False
    ordered_keys: bool = False
    decodes: bool = False
    mask_parts: frozenset[str] = frozenset()
    packs: bool = True


@dataclass(frozen=True)
class Mixer(abc.ABC):
    """A sequence mixer.

    Its module is called `(x [B,T,D], side, *, mask, shared, place, context=None, cache=None) → (y [B,T,D], side, cache)`.
    `shared` holds, per encoding, what the encoding's `shared` made at the same `place`. `context` `[B,S,D]` is what keys and
    values come from when it is not x; then `place.sources` are its positions.
    """

    name: ClassVar[str]
    replaces_block: ClassVar[bool] = False
    """True: takes the raw residual stream and returns it, with its own norms and no separate feed-forward."""

    @abc.abstractmethod
    def facts(self) -> MixerFacts:
        """What `zoo.compatible` must know."""

    @abc.abstractmethod
    def module(self, dims: Dims, encodings: tuple[Encoding, ...], style: Style) -> nn.Module:
        """The module of one layer."""

    def attention_dims(self, dims: Dims) -> Dims:
        """The sizes of its attention in a model of `dims`: those that encodings get which meet its queries and keys.

        Raises:
          UserError: the mixer cannot be made at these sizes.
        """
        return dims

    def init_cache(self, dims: Dims, encodings: tuple[Encoding, ...], batch: int, max_length: int, dtype: Any) -> Any:
        """What one layer carries while decoding.

        Raises:
          ValueError: the mixer cannot decode.
        """
        raise ValueError(f"mixer {self.name!r} cannot decode step by step")
