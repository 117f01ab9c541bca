"""The modules of encodings that stand outside the layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from kernels.attention import AttentionMask
from zoo.encodings import Dims, Place
from zoo.layers.block import BlockSpec
from zoo.mixers import Style
from zoo.models.refinement import Refinement
from zoo.models.stage import Fitted


class Encodings(nn.Module):
    """What the encodings do outside the layers; part k's modules stand under the name k."""

    parts: tuple[Fitted, ...]
    dims: Dims
    embedding_dim: int
    spec: BlockSpec
    style: Style

    def setup(self):
        for index, part in enumerate(self.parts):
            setattr(self, str(index), EncodingModules(part, self.dims, self.embedding_dim, self.spec, self.style))

    def embed(self, x: jax.Array, place: Place, mask: AttentionMask, caches: tuple[Any, ...]) -> Any:
        """x with what the parts add at the input, their caches, and what refinement layers added, or None."""
        new, refined = [], None
        for modules, cache in zip(self._modules(), caches, strict=True):
            if modules.embedding is not None:
                given, cache = modules.embedding(x, place, mask, cache)
                if modules.refinement is None:
                    x = given
                else:
                    refined = modules.refinement(given, mask, place)
                    x = x + refined
            new.append(cache)
        return x, tuple(new), refined

    def share(self, place: Place) -> tuple[Any, ...]:
        """Per part, what its layers share."""
        return tuple(None if m.shared is None else m.shared(place) for m in self._modules())

    def init_side(self, x: jax.Array, place: Place) -> dict[str, Any]:
        """What the parts carry from layer to layer, by name."""
        pairs = zip(self.parts, self._modules(), strict=True)
        return {part.encoding.name: m.side(x, place) for part, m in pairs if m.side is not None}

    def _modules(self) -> list[EncodingModules]:
        return [getattr(self, str(index)) for index in range(len(self.parts))]


class EncodingModules(nn.Module):
    """The modules of one encoding that are not a layer's: at the input at the model's sizes, for the layers at those of attention."""

    part: Fitted
    dims: Dims
    embedding_dim: int
    spec: BlockSpec
    style: Style

    def setup(self):
        encoding, first = self.part.encoding, self.part.first
        at_input = dataclasses.replace(self.dims, model_dim=self.embedding_dim)
        self.embedding = encoding.embedding(at_input) if first else None
        layers = encoding.refinement_layers if first else 0
        self.refinement = Refinement(self.spec, layers, at_input, self.style) if layers else None
        self.shared = encoding.shared(self.part.dims)
        self.side = encoding.init_side(self.part.dims)
