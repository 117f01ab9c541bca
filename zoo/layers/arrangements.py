"""How a block joins its mixer and feed-forward to the residual stream."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax

from zoo.registry import Registry

registry = Registry("arrangement")

Sublayer = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Arrangement(abc.ABC):
    """Joins `mix` and `feed` (each with its dropout) through the norms that it names.

    `final_norm` says that the stream must be normalised after the last block.
    """

    name: ClassVar[str]
    final_norm: ClassVar[bool] = True

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms that a block makes, of "mixer" and "feed_forward"; their parameters lie under `norm_mixer` and so on."""
        return ("mixer", "feed_forward")

    @abc.abstractmethod
    def __call__(self, x: jax.Array, mix: Sublayer, feed: Sublayer, norms: Mapping[str, Sublayer]) -> jax.Array:
        """The stream after the block."""


@registry.register("post_norm")
@dataclass(frozen=True)
class PostNorm(Arrangement):
    """x ← norm(x + mix(x)); x ← norm(x + feed(x)) (Vaswani et al. 2017; BERT)."""

    final_norm: ClassVar[bool] = False

    def __call__(self, x: jax.Array, mix: Sublayer, feed: Sublayer, norms: Mapping[str, Sublayer]) -> jax.Array:
        x = norms["mixer"](x + mix(x))
        return norms["feed_forward"](x + feed(x))


@registry.register("pre_norm")
@dataclass(frozen=True)
class PreNorm(Arrangement):
    """x ← x + mix(norm(x)); x ← x + feed(norm(x)), and one final norm (Xiong et al. 2020, arXiv:2002.04745).

    `mixer_norm=False` is x ← x + mix(x) in the first step: the first layer of ModernBERT (arXiv:2412.13663), whose input the
    embeddings have normalised.
    """

    mixer_norm: bool = True

    @property
    def norms(self) -> tuple[str, ...]:
        return ("mixer", "feed_forward") if self.mixer_norm else ("feed_forward",)

    def __call__(self, x: jax.Array, mix: Sublayer, feed: Sublayer, norms: Mapping[str, Sublayer]) -> jax.Array:
        x = x + mix(norms["mixer"](x) if self.mixer_norm else x)
        return x + feed(norms["feed_forward"](x))


@registry.register("parallel")
@dataclass(frozen=True)
class Parallel(Arrangement):
    """x ← x + mix(h) + feed(h) with one h = norm(x), and one final norm (GPT-J; PaLM, arXiv:2204.02311)."""

    @property
    def norms(self) -> tuple[str, ...]:
        return ("mixer",)

    def __call__(self, x: jax.Array, mix: Sublayer, feed: Sublayer, norms: Mapping[str, Sublayer]) -> jax.Array:
        h = norms["mixer"](x)
        return x + mix(h) + feed(h)
