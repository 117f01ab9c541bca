"""xPos: rotary positions with a decay."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import AttentionMask
from zoo.encodings.encoding import Dims, Encoded, Encoding, EncodingLayer, Facts, Place, Site
from zoo.encodings.registration import registry
from zoo.encodings.rope import Rotation, rotary_dim, rotate, rotation
from zoo.encodings.rope_scaling import plain_frequencies
from zoo.errors import UserError

# The largest |exponent| of e on one side: with the published numbers that of a span of 32,768, e^±40, and a product of both
# sides, e^80 at a key that the causal mask hides, is still a float32.
_EXPONENT = 32 * math.log(3.5)
_HALF_EXPONENT = 5.0  # float16 ends at e^11, and q and k have a size of their own.


@registry.register("xpos")
@dataclass(frozen=True)
class Xpos(Encoding):
    """Rotary positions (interleaved) whose pairs decay with distance, the fast ones most; for causal masks.

        q'_i = ζ^((i − c)/scale_base) R_i q_i,   k'_j = ζ^(−(j − c)/scale_base) R_j k_j,   ζ_m = (2m/H + gamma) / (1 + gamma)

    so that pair m of the product has the factor ζ_m^((i − j)/scale_base). The centre c is the middle of the span: keys are
    cached as they are attended to, while the authors' code scales all cached keys anew at each step. The powers bound the
    span: 32,768 positions with the published numbers; beyond it is an error.
    `block` is half the training length, and sets blockwise causal attention outside training: a query sees the keys of its own
    block and of the one before, never further than it was trained to; within twice `block` tokens it changes nothing.
    Source: Sun et al. 2022 (arXiv:2212.10554); torchscale. No parameters.
    """

    theta: float = 10000.0
    scale_base: float = 512.0
    gamma: float = 0.4
    block: int | None = None

    def __post_init__(self):
        if self.gamma <= 0 or self.scale_base <= 0:
            raise ValueError(f"gamma={self.gamma} and scale_base={self.scale_base} must be above 0")
        if self.block is not None and self.block < 1:
            raise ValueError(f"block={self.block} is half the training length; it must be at least 1")

    def facts(self) -> Facts:
        kinds = {"transform"} if self.block is None else {"transform", "mask"}
        return Facts(kinds=frozenset(kinds), bidirectional=False)

    def shared(self, dims: Dims) -> nn.Module:
        return DecayingTables(self, rotary_dim("xpos", 1.0, dims.head_dim))

    def layer(self, dims: Dims) -> EncodingLayer:
        return DecayingLayer(self)

    def max_span(self, exponent: float = _EXPONENT) -> int:
        """The largest distance between two positions for which no power of ζ grows beyond e^exponent."""
        fastest = math.log((1 + self.gamma) / self.gamma)
        return int(2 * self.scale_base * exponent / fastest + 1e-6)


class DecayingTables(nn.Module):
    """The rotations of queries and of the tokens that keys are made from, each with its power of ζ."""

    encoding: Xpos
    rotary_dim: int

    @nn.compact
    def __call__(self, place: Place) -> tuple[Rotation, Rotation]:
        check_span(place.span, self.encoding.max_span(), "")
        return (
            self._scaled(place.queries.token, place.span, 1.0),
            self._scaled(place.source_positions.token, place.span, -1.0),
        )

    def _scaled(self, positions: jax.Array, span: int, sign: float) -> Rotation:
        e = self.encoding
        by = rotation(positions, plain_frequencies(e.theta, self.rotary_dim))
        zeta = (2.0 * np.arange(self.rotary_dim // 2) / self.rotary_dim + e.gamma) / (1.0 + e.gamma)
        steps = (positions - span // 2)[..., None].astype(jnp.float32) * (sign / e.scale_base)
        exponent = steps * jnp.asarray(np.log(zeta), jnp.float32)
        # A position that the span does not hold: NaN, which no run survives unseen, instead of a silent overflow.
        power = jnp.where(jnp.abs(exponent) > 1.01 * _EXPONENT, jnp.nan, jnp.exp(exponent))
        return Rotation(by.cos * power, by.sin * power)


class DecayingLayer(EncodingLayer):
    encoding: Xpos

    @nn.compact
    def __call__(
        self, shared: tuple[Rotation, Rotation], q: jax.Array, k: jax.Array, v: jax.Array, site: Site
    ) -> Encoded:
        if q.dtype == jnp.float16:
            check_span(site.place.span, self.encoding.max_span(_HALF_EXPONENT), " in float16")
        q, k = rotate(q, shared[0], "interleaved"), rotate(k, shared[1], "interleaved")
        if self.encoding.block is None or site.place.train:
            return Encoded(q, k, v)
        return Encoded(q, k, v, mask=narrowed(site.mask, self.encoding.block))


def narrowed(mask: AttentionMask, block: int) -> AttentionMask:
    """The mask with blockwise causal attention by blocks of `block` positions.

    Raises:
      UserError: the mask has blocks of another width.
    """
    if mask.block not in (None, block):
        raise UserError(f"encoding 'xpos' has block={block}, the mask has blocks of {mask.block}: make them equal")
    return dataclasses.replace(mask, block=block)


def check_span(span: int, limit: int, where: str) -> None:
    """Refuses a span whose powers would leave the number format.

    Raises:
      UserError: names the limit and the alternatives.
    """
    if span > limit:
        raise UserError(
            f"encoding 'xpos' reaches over {limit} positions{where}, here {span} lie between the first and the last; "
            "lower model.max_length, raise scale_base, or use alibi, kerple_log or rope with a scaling"
        )
