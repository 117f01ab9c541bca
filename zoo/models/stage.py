"""A stage: a pattern of blocks repeated under scan, so that compile time does not grow with depth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import AttentionMask
from zoo.encodings import Dims, Encoding, Place
from zoo.layers.block import Block, BlockSpec
from zoo.mixers import Style
from zoo.mixers.mixer import SCORES
from zoo.models.remat import remat


@dataclass(frozen=True)
class Stage:
    """`repeats` times the pattern of blocks, one after another; `share` uses the same parameters every time (ALBERT)."""

    pattern: tuple[BlockSpec, ...]
    repeats: int = 1
    share: bool = False


@dataclass(frozen=True)
class Fitted:
    """An encoding at the sizes of the attention that uses it; `first` among those of the encoding, whatever its size."""

    encoding: Encoding
    dims: Dims
    first: bool = field(default=True, compare=False)


def fitted_encodings(stages: tuple[Stage, ...], dims: Dims) -> tuple[Fitted, ...]:
    """Every encoding once for each size of attention that uses it, in order of first use.

    Equal encodings in several blocks share their tables where the mixers' attention has one size; what is added at the input
    is added once.

    Raises:
      UserError: a mixer does not fit the model's sizes.
    """
    found: dict[Fitted, None] = {}
    for stage in stages:
        for spec in stage.pattern:
            own = spec.mixer.attention_dims(dims)
            for encoding in spec.encodings:
                first = all(other.encoding != encoding for other in found)
                found.setdefault(Fitted(encoding, own, first))
    return tuple(found)


class Pattern(nn.Module):
    """One turn of the pattern: the body of the scan, with carry (x, side)."""

    pattern: tuple[BlockSpec, ...]
    encodings: tuple[Fitted, ...]
    dims: Dims
    style: Style
    remat_policy: str
    unroll: int

    @nn.compact
    def __call__(
        self,
        carry: Any,
        caches: Any,
        shared: Any,
        mask: AttentionMask,
        place: Place,
        hidden_states: bool,
    ) -> tuple[Any, tuple[Any, jax.Array | None]]:
        x, side = carry
        block = remat(Block, self.remat_policy, looped=self.unroll == 1)
        new_caches, outputs = [], []
        for index, spec in enumerate(self.pattern):
            cache = None if caches is None else caches[index]
            own = spec.mixer.attention_dims(self.dims)
            own_shared = tuple(shared[self.encodings.index(Fitted(e, own))] for e in spec.encodings)
            x, side, cache = block(spec, self.dims, self.style, name=f"block_{index}")(
                x, side, cache, own_shared, mask, place
            )
            new_caches.append(cache)
            outputs.append(x)
        return (x, side), (
            None if caches is None else tuple(new_caches),
            jnp.stack(outputs) if hidden_states else None,
        )


def scanned(
    stage: Stage,
    encodings: tuple[Fitted, ...],
    dims: Dims,
    style: Style,
    remat_policy: str,
    unroll: int | None = None,
) -> nn.Module:
    """The module of a stage, all its parameters with a leading layer axis (of length 1 where they are shared).

    `unroll` repeats at a time are laid out in the compiled program one after another, the rest is its loop; None is all of them on a
    GPU, elsewhere 1.
    """
    if unroll is None:
        # What the backward pass needs XLA's GPU backend copies into an array of all layers, and out of it again.
        unroll = stage.repeats if jax.default_backend() == "gpu" else 1
    unroll = min(unroll, stage.repeats)
    inputs = (0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast)
    rngs = {"params": True, "dropout": True}
    layers = nn.scan(
        Pattern,
        variable_axes={"params": 0, SCORES: 0},
        split_rngs=rngs,
        in_axes=inputs,
        length=1 if stage.share else stage.repeats,
        unroll=1 if stage.share else unroll,
    )
    if stage.share:
        layers = nn.scan(
            layers,
            variable_axes={SCORES: 0},
            variable_broadcast="params",
            split_rngs={"params": False, "dropout": True},
            in_axes=inputs,
            length=stage.repeats,
            unroll=unroll,
        )
    return layers(stage.pattern, encodings, dims, style, remat_policy, unroll)
