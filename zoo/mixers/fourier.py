"""FNet's mixing: the discrete Fourier transform in the place of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import AttentionMask
from kernels.fourier import fourier_mixing
from zoo.encodings import Dims, Encoding, Place
from zoo.errors import UserError
from zoo.mixers.mixer import Mixer, MixerFacts, Style
from zoo.mixers.registration import registry

_SEGMENTS = (
    "a Fourier transform sums over all tokens of a row, padding among them; pads='tokens' mixes padding in, as FNet was trained, "
    "or give rows without padding and no segment ids"
)


@registry.register("fourier")
@dataclass(frozen=True)
class Fourier(Mixer):
    """Token mixing without parameters: y = Re(F_T x F_D), the transform over tokens and channels, computed in float32.

    For encoders only: y[t] is a sum over all tokens of the row, so that no mask can hide one. Segment ids are therefore
    refused. `pads="tokens"` takes them and mixes padding in like any token, as FNet was trained and its checkpoints expect; the
    answer then depends on the length to which a row is padded. Documents packed into one row cannot be kept apart:
    tasks that pack so are refused, and where segment ids are known at run time only, a row of several documents returns NaN.
    (Documents that may see each other, `attend_across` of `masked_lm`, are one.)
    y grows as √(T D) and y[0, 0] is a sum over all of x, which float16 may not hold; bfloat16 does.
    Source: Lee-Thorp et al. 2021 (arXiv:2105.03824), equation 3; positions by an embedding, as there.
    """

    pads: Literal["tokens"] | None = None

    def facts(self) -> MixerFacts:
        segments = ("query_segments", "key_segments", "key_valid")
        return MixerFacts(
            accepts=frozenset({"embedding"}),
            refuses=dict.fromkeys(segments, _SEGMENTS),
            causal=False,
            grouped_heads=True,
            mask_parts=frozenset(segments if self.pads == "tokens" else ()),
            packs=False,
        )

    def module(self, dims: Dims, encodings: tuple[Encoding, ...], style: Style) -> nn.Module:
        return FourierMixing()


class FourierMixing(nn.Module):
    def __call__(
        self,
        x: jax.Array,
        side: dict[str, Any],
        *,
        mask: AttentionMask,
        shared: tuple[Any, ...],
        place: Place,
        context: jax.Array | None = None,
        cache: Any = None,
    ) -> tuple[jax.Array, dict[str, Any], None]:
        if context is not None:
            raise UserError("mixer 'fourier' transforms one sequence; it cannot take keys and values from a context")
        y = fourier_mixing(x)
        if mask.query_segments is not None:
            segments = mask.query_segments
            several = jnp.any((segments > 0) & (segments != segments.max(axis=1, keepdims=True)), axis=1)
            y = jnp.where(several[:, None, None], jnp.nan, y)
        return y, side, None
