"""Layers that refine what an encoding gives at the input, before it is added to the embeddings."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax

from kernels.attention import AttentionMask
from zoo.encodings import Dims, Place
from zoo.layers.block import BlockSpec
from zoo.mixers import Style
from zoo.models.stage import Stage, scanned


class Refinement(nn.Module):
    """`layers` blocks of the model's first kind, without encodings, at the width of the embeddings: `[B, T, E]` → `[B, T, E]`.

    They end normalised, as the model does.
    """

    spec: BlockSpec
    layers: int
    dims: Dims
    style: Style

    def setup(self):
        spec = dataclasses.replace(self.spec, encodings=())
        self.stage = [scanned(Stage((spec,), self.layers), (), self.dims, self.style, "none")]
        self.ends_normalised = spec.mixer.replaces_block or not spec.arrangement.final_norm
        if not self.ends_normalised:
            self.final_norm = spec.norm.module(self.style.dtype)

    def __call__(self, x: jax.Array, mask: AttentionMask, place: Place) -> jax.Array:
        (x, _), _ = self.stage[0]((x, {}), None, (), mask, place, False)
        return x if self.ends_normalised else self.final_norm(x)
