"""What a position encoding is: a frozen value that makes up to three thin modules."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

import flax.linen as nn
import jax

from kernels.attention import AttentionMask, Positions, Term


@dataclass(frozen=True)
class Dims:
    """The sizes a part may need: D, N, K, H, L and the longest sequence."""

    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    max_length: int


@dataclass(frozen=True)
class Facts:
    """What `zoo.compatible` must know about an encoding, without building it.

    Attributes:
      kinds: what it brings, of: "embedding" (added at the input), "transform" (of q and k before the product),
        "values" (values transformed there and back), the term kinds "toeplitz", "multiply", "relative", "row_column",
        "piecewise_linear", "pairwise", "dense", "core" (its own attention), "mask" (it narrows the mask) and "side" (state
        from layer to layer).
      causal, bidirectional: the directions it is defined for.
      ordered_keys: keys must be visited in a fixed order.
      decodes: it can be evaluated step by step with a cache.
      sentences: it needs sentence indices in the positions.
      separators: ids of the tokens that end a sentence, from which the model counts them where positions do not say.
      scale: of the product ⟨q, k⟩ if the encoding sets it, None = 1/√H.
    """

    kinds: frozenset[str]
    causal: bool = True
    bidirectional: bool = True
    ordered_keys: bool = False
    decodes: bool = True
    sentences: bool = False
    separators: tuple[int, ...] = ()
    scale: float | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Place:
    """Where a forward pass stands: what every part may need to know of it.

    Attributes:
      queries: the positions of the tokens of this call.
      sources: the positions of the tokens that keys and values are made from in this call; None = queries.
      keys: the positions of all keys that attention sees, with a cache all of its slots; None = sources.
      span: static; |r| ≤ span for every pair of positions that can meet, so that a table over r need reach no further.
      train: static; dropout is on.
    """

    queries: Positions
    sources: Positions | None = None
    keys: Positions | None = None
    span: int = field(default=1, metadata={"static": True})
    train: bool = field(default=False, metadata={"static": True})

    @property
    def source_positions(self) -> Positions:
        return self.queries if self.sources is None else self.sources

    @property
    def attended(self) -> Positions | tuple[Positions, Positions]:
        """The positions as `kernels.attention` takes them: one struct, or (the queries', the keys')."""
        if self.sources is None and self.keys is None:
            return self.queries
        return self.queries, self.source_positions if self.keys is None else self.keys


class Project(NamedTuple):
    """This layer's own projections, `[..., D] → [..., N or K, H]`."""

    query: Callable[[jax.Array], jax.Array]
    key: Callable[[jax.Array], jax.Array]
    value: Callable[[jax.Array], jax.Array]


class Site(NamedTuple):
    """Where in the model a layer's encoding is called.

    Attributes:
      x: `[B, T, D]`, the mixer's input.
      source: `[B, S, D]`, what keys and values are made from; x itself but for attention to a context.
      side: what layers hand to the next layer beside x, by part name.
      project: this layer's projections.
      place: positions, span, and whether this is training.
      mask: the structural mask.
      cache: what this encoding's `init_cache` made, or None outside decoding.
    """

    x: jax.Array
    source: jax.Array
    side: dict[str, Any]
    project: Project
    place: Place
    mask: AttentionMask
    cache: Any = None


class Core(Protocol):
    """Attention that an encoding computes itself: the signature of `kernels.attention.attention`, arrays of this layer bound.

    `logits` is its plain twin's scores `[B, N, T, S]` before softmax, with the signature of `kernels.attention.logits`.
    """

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array: ...

    def logits(self, terms: tuple[Term, ...], q: jax.Array, k: jax.Array, **options: Any) -> jax.Array: ...


class Encoded(NamedTuple):
    """What attention needs: q `[B,T,N,H]`, k and v `[B,S,K,H]`, the terms, and what replaces the defaults.

    Attributes:
      scale: of the product, None = 1/√H.
      cache: the encoding's cache after this call.
      core: what replaces `kernels.attention.attention`, None for nothing.
      mask: what replaces the mask of the site, a narrower one; None for nothing.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    terms: tuple[Term, ...] = ()
    scale: float | None = None
    cache: Any = None
    core: Core | None = None
    mask: AttentionMask | None = None


class EncodingLayer(nn.Module):
    """A layer's part of an encoding, made inside the mixer: `(shared, q, k, v, site) → Encoded`."""

    def back(self, out: jax.Array, shared: Any, side: dict[str, Any], site: Site) -> tuple[jax.Array, dict[str, Any]]:
        """The way back for values: `[B,T,N,H]` after attention, before the output projection."""
        return out, side


class AddTerms(EncodingLayer):
    """Hands the terms made by `shared` to attention, q, k and v untouched."""

    scale: float | None = None

    @nn.compact
    def __call__(self, shared: tuple[Term, ...], q: jax.Array, k: jax.Array, v: jax.Array, site: Site) -> Encoded:
        return Encoded(q, k, v, terms=shared, scale=self.scale)


@dataclass(frozen=True)
class Encoding(abc.ABC):
    """A position encoding: static facts and up to three modules, each None where it has no business.

    Subclasses are frozen dataclasses of plain scalars, registered under the encoding's name.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def facts(self) -> Facts:
        """What `zoo.compatible` must know."""

    def embedding(self, dims: Dims) -> nn.Module | None:
        """`(x [B,T,E], place, mask, cache) → (x, cache)`, once, at the input; `dims.model_dim` is E there."""
        return None

    @property
    def refinement_layers(self) -> int:
        """How many layers, which the model makes, turn what `embedding` gives into what is added to x; 0: x becomes that itself."""
        return 0

    def shared(self, dims: Dims) -> nn.Module | None:
        """`(place) → pytree`, once per forward pass, outside the layer scan.

        Holds parameters shared over layers and makes all tables.
        """
        return None

    def layer(self, dims: Dims) -> EncodingLayer | None:
        """`(shared, q, k, v, site) → Encoded`, inside each mixer, with this layer's own parameters."""
        return None

    def init_side(self, dims: Dims) -> nn.Module | None:
        """`(x, place) → pytree`: the first carry under this part's name in `side`."""
        return None

    def after_feed_forward(self, dims: Dims) -> nn.Module | None:
        """`(side, y, place) → side`, at the end of every block; y is what its feed-forward gave, before the residual sum."""
        return None

    def cached_widths(self, dims: Dims, key: int, value: int) -> tuple[int, int]:
        """The widths of keys and values behind this encoding, given those before it: more where it concatenates."""
        return key, value

    def init_cache(self, dims: Dims, batch: int, max_length: int, dtype: Any) -> Any:
        """What one layer of this encoding carries while decoding, None for nothing."""
        return None

    def init_embedding_cache(self, dims: Dims, batch: int, max_length: int, dtype: Any) -> Any:
        """What `embedding` carries while decoding, None for nothing."""
        return None
