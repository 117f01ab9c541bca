"""The block: a mixer and a feed-forward, joined to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from kernels.attention import AttentionMask
from zoo.compatibility import require_compatible, require_mask
from zoo.encodings import Dims, Encoding, Place
from zoo.layers.arrangements import Arrangement, PostNorm
from zoo.layers.convolution import Convolution
from zoo.layers.dropout import Dropout
from zoo.layers.feed_forward import FeedForward, Gelu
from zoo.layers.norms import LayerNorm, Norm
from zoo.mixers import Mixer, Style
from zoo.mixers.softmax import Softmax


@dataclass(frozen=True)
class BlockSpec:
    """One block as a value: its parts and how they are arranged."""

    mixer: Mixer = Softmax()
    encodings: tuple[Encoding, ...] = ()
    feed_forward: FeedForward = Gelu()
    norm: Norm = LayerNorm()
    arrangement: Arrangement = PostNorm()
    convolution: Convolution | None = None

    def check(self, dims: Dims, mask: AttentionMask) -> None:
        """Refuses a combination that cannot be honoured.

        Raises:
          UserError: which parts do not go together, and why.
        """
        grouped = dims.num_kv_heads != dims.num_heads
        require_compatible(self.encodings, self.mixer, mask=mask, grouped_heads=grouped)
        self.mixer.attention_dims(dims)
        self.feed_forward.check(dims)
        if self.convolution is not None:
            self.convolution.check(dims, mask)


class Block(nn.Module):
    """`(x, side, cache, …) → (x, side, cache)`; `shared` holds what this block's encodings made once per pass."""

    spec: BlockSpec
    dims: Dims
    style: Style

    def setup(self):
        spec = self.spec
        self.mixer = spec.mixer.module(self.dims, spec.encodings, self.style)
        attention = spec.mixer.attention_dims(self.dims)
        self.after = [e.after_feed_forward(attention) for e in spec.encodings]
        if not spec.mixer.replaces_block:
            self.feed_forward = spec.feed_forward.module(self.dims, self.style)
            for name in spec.arrangement.norms:
                setattr(self, f"norm_{name}", spec.norm.module(self.style.dtype))
            self.dropout = Dropout(self.style.dropout)
        if spec.convolution is not None:
            self.convolution = spec.convolution.module(self.dims, self.style)
            self.norm_convolution = spec.norm.module(self.style.dtype)

    def __call__(
        self,
        x: jax.Array,
        side: dict[str, Any],
        cache: Any,
        shared: Any,
        mask: AttentionMask,
        place: Place,
    ) -> tuple[jax.Array, dict[str, Any], Any]:
        require_mask(self.spec.mixer, mask)
        carried, given = {}, x

        def mix(h: jax.Array) -> jax.Array:
            y, carried["side"], carried["cache"] = self.mixer(
                h, side, mask=mask, shared=shared, place=place, cache=cache
            )
            return y

        def feed(h: jax.Array) -> jax.Array:
            carried["y"] = self.feed_forward(h, place.train)
            return carried["y"]

        if self.spec.mixer.replaces_block:
            x = carried["y"] = mix(x)
        else:
            x = self.spec.arrangement(
                x,
                lambda h: self.dropout(mix(h), deterministic=not place.train),
                lambda h: self.dropout(feed(h), deterministic=not place.train),
                {name: getattr(self, f"norm_{name}") for name in self.spec.arrangement.norms},
            )
        if self.spec.convolution is not None:
            x = self.norm_convolution(x + self.convolution(given, mask, place))
        side = carried["side"]
        for encoding, after in zip(self.spec.encodings, self.after, strict=True):
            if after is not None:
                side = {**side, encoding.name: after(side[encoding.name], carried["y"], place)}
        return x, side, carried["cache"]
