"""How a block joins its mixer and feed-forward to the residual stream."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax

from zoo.registry import Registry

registry = Registry("arrangement")

Sublayer = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Arrangement(abc.ABC):
    """Joins `mix` and `feed` (each with its dropout) through two norms.

    `num_norms` norms are made per block; `final_norm` says that the stream must be normalised after the last block.
    """

    name: ClassVar[str]
    num_norms: ClassVar[int] = 2
    final_norm: ClassVar[bool] = True

    @abc.abstractmethod
    def __call__(self, x: jax.Array, mix: Sublayer, feed: Sublayer, norms: tuple[Sublayer, ...]) -> jax.Array:
        """The stream after the block."""


@registry.register("post_norm")
@dataclass(frozen=True)
class PostNorm(Arrangement):
    """x ← norm(x + mix(x)); x ← norm(x + feed(x)) (Vaswani et al. 2017; BERT)."""

    final_norm: ClassVar[bool] = False

    def __call__(self, x: jax.Array, mix: Sublayer, feed: Sublayer, norms: tuple[Sublayer, ...]) -> jax.Array:
        x = norms[0](x + mix(x))
        return norms[1](x + feed(x))


@registry.register("pre_norm")
@dataclass(frozen=True)
class PreNorm(Arrangement):
    """x ← x + mix(norm(x)); x ← x + feed(norm(x)), and one final norm (Xiong et al. 2020, arXiv:2002.04745)."""

    def __call__(self, x: jax.Array, mix: Sublayer, feed: Sublayer, norms: tuple[Sublayer, ...]) -> jax.Array:
        x = x + mix(norms[0](x))
        return x + feed(norms[1](x))


@registry.register("parallel")
@dataclass(frozen=True)
class Parallel(Arrangement):
    """x ← x + mix(h) + feed(h) with one h = norm(x), and one final norm (GPT-J; PaLM, arXiv:2204.02311)."""

    num_norms: ClassVar[int] = 1

    def __call__(self, x: jax.Array, mix: Sublayer, feed: Sublayer, norms: tuple[Sublayer, ...]) -> jax.Array:
        h = norms[0](x)
        return x + mix(h) + feed(h)
