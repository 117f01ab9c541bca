"""ConvBERT's mixed attention: softmax heads beside heads of span-based dynamic convolution."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import AttentionMask
from zoo.encodings import Dims, Encoding, Place
from zoo.encodings.documents import documents
from zoo.errors import UserError
from zoo.mixers.mixer import Mixer, MixerFacts, Style
from zoo.mixers.registration import registry
from zoo.mixers.softmax import Softmax, SoftmaxAttention


@registry.register("mixed_attention")
@dataclass(frozen=True)
class MixedAttention(Softmax):
    """Half of the width is softmax attention, half a convolution whose filters the tokens around and the query make.

        N' = max(1, ⌊N / head_ratio⌋) heads of width H' = N·H / (2 N') on either side (N' and N·H those of the model)
        q, k, v = x W_q, x W_k, x W_v;   s = depthwise(x) W_s + b;   f_n = softmax over taps of (s ⊙ q) W_f
        convolution_i,n = Σ_t f_i,n[t] (x W_c)_{i+t−left, n};   y = [softmax heads of q, k, v; convolution heads] W_o

    with `width` = w taps in both convolutions, left = (w − 1)/2, and under a causal mask left = w − 1 (the paper has no causal
    form). Positions beyond the ends count as zeros. Encodings act on the softmax heads alone, at N' heads of width H';
    `window`, `implementation` and `biases` are as in `softmax`; the three projections of the convolution have biases as the model.

    By default no window reaches over a document's end or into padding: a neighbour counts where it is of the same document
    and at just the tap's distance also in positions, all else as zeros, so that packing and padding change nothing.
    `pads="tokens"` is what published checkpoints were trained with: padding is convolved like any token, and asks the softmax heads
    like one, though they never attend to it. It then belongs to the document of the row with the highest id, and the answer depends on
    how far a row is padded; packed documents stay apart.

    Windows are never laid side by side: w shifted products are added up, and the backward pass makes them again. Decoding step by
    step is not offered. Source: Jiang et al. 2020 (arXiv:2008.02496), section 3.2, and its released checkpoints.
    """

    head_ratio: int = 2
    width: int = 9
    pads: Literal["tokens"] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.head_ratio < 1:
            raise ValueError(f"head_ratio={self.head_ratio}; it must be at least 1")
        if self.width < 1 or self.width % 2 == 0:
            raise ValueError(f"width={self.width}; it must be odd, so that a window has a middle")

    def facts(self) -> MixerFacts:
        mask_parts = frozenset({"causal", "query_segments", "key_segments", "key_valid"})
        return dataclasses.replace(super().facts(), decodes=False, mask_parts=mask_parts)

    def attention_dims(self, dims: Dims) -> Dims:
        total = dims.num_heads * dims.head_dim
        heads, kv_heads = (max(1, n // self.head_ratio) for n in (dims.num_heads, dims.num_kv_heads))
        if total % (2 * heads) or heads % kv_heads:
            raise UserError(
                f"mixer {self.name!r}: head_ratio={self.head_ratio} makes {heads} heads over {kv_heads} key/value heads of half the "
                f"width {total}, which is not possible in whole numbers; change head_ratio or the model's heads"
            )
        return dataclasses.replace(dims, num_heads=heads, num_kv_heads=kv_heads, head_dim=total // (2 * heads))

    def module(self, dims: Dims, encodings: tuple[Encoding, ...], style: Style) -> nn.Module:
        return MixedAttentionModule(self, self.attention_dims(dims), encodings, style)

    def init_cache(self, dims: Dims, encodings: tuple[Encoding, ...], batch: int, max_length: int, dtype: Any) -> Any:
        return Mixer.init_cache(self, dims, encodings, batch, max_length, dtype)


class MixedAttentionModule(SoftmaxAttention):
    def setup(self):
        super().setup()
        dims, dense = self.dims, self.style.dense
        half = dims.num_heads * dims.head_dim
        self.key_depthwise = Depthwise(self.mixer.width, dims.model_dim, self.style)
        self.key_pointwise = dense(half)
        self.filter = dense(dims.num_heads * self.mixer.width)
        self.convolution_value = dense(half)

    def __call__(
        self,
        x: jax.Array,
        side: dict[str, Any],
        *,
        mask: AttentionMask,
        shared: tuple[Any, ...],
        place: Place,
        context: jax.Array | None = None,
        cache: None = None,
    ) -> tuple[jax.Array, dict[str, Any], None]:
        if context is not None:
            raise UserError(
                f"mixer {self.mixer.name!r} convolves one sequence; it cannot take keys and values from a context"
            )
        segments = documents(mask, x.shape[:2])
        token = None if place.queries.contiguous else place.queries.token
        if self.mixer.pads == "tokens":
            segments, token = jnp.where(segments > 0, segments, segments.max(axis=1, keepdims=True)), None
            if mask.query_segments is not None:
                mask = dataclasses.replace(mask, query_segments=segments)
        left = self.mixer.width - 1 if mask.causal else self.mixer.width // 2
        near = neighbours(segments, token, self.mixer.width, left)

        query = self.query(x)
        heads, side, _ = self._attend(query, x, side, mask=mask, shared=shared, place=place, context=None, cache=None)
        span = self.key_pointwise(self.key_depthwise(x, near, left)) * query
        taps = self.filter(span).reshape(*x.shape[:2], self.dims.num_heads, -1)
        filters = jax.nn.softmax(taps.astype(jnp.float32), axis=-1)
        convolution = dynamic_convolution(self._heads(self.convolution_value(x)), filters, near, left)
        both = jnp.concatenate([heads, convolution], axis=2)
        return self.output(both.reshape(*x.shape[:2], -1)), side, None


class Depthwise(nn.Module):
    """Every channel convolved by itself: `kernel` `[width, D]`, no bias."""

    width: int
    model_dim: int
    style: Style

    @nn.compact
    def __call__(self, x: jax.Array, near: jax.Array, left: int) -> jax.Array:
        initial = nn.initializers.truncated_normal(self.style.stddev)
        kernel = self.param("kernel", initial, (self.width, self.model_dim), jnp.float32)
        return depthwise_convolution(x, kernel, near, left)


def neighbours(segments: jax.Array, token: jax.Array | None, width: int, left: int) -> jax.Array:
    """bool `[width, B, T]`: whether the token at i + t − left counts as the neighbour of token i at tap t.

    It does where it is of the same document and, with positions `token` `[B or 1, T]`, at that distance in them too.

    Args:
      segments: `[B, T]`, the documents; 0 is padding, which has no neighbours unless the whole row is of it.
    """

    def near(tap: int) -> jax.Array:
        same = (_shifted(segments, tap - left, width) == segments) & (segments > 0)
        return same if token is None else same & (_shifted(token, tap - left, width) - token == tap - left)

    return jnp.stack([near(tap) for tap in range(width)])


def depthwise_convolution(x: jax.Array, kernel: jax.Array, near: jax.Array, left: int) -> jax.Array:
    """y_i = Σ_t kernel[t] ⊙ x_{i+t−left} over the neighbours that count: `[B, T, D]`, `[width, D]` → `[B, T, D]`, summed in float32."""

    def total(x: jax.Array, kernel: jax.Array) -> jax.Array:
        there = _windows(x, near, left)
        return sum(kernel[tap] * part for tap, part in enumerate(there)).astype(x.dtype)

    return jax.checkpoint(total, prevent_cse=False)(x, kernel)


def dynamic_convolution(x: jax.Array, filters: jax.Array, near: jax.Array, left: int) -> jax.Array:
    """y_i,n = Σ_t filters[i, n, t] x_{i+t−left, n}: `[B, T, N, H]`, float32 `[B, T, N, width]` → `[B, T, N, H]`, summed in float32."""

    def total(x: jax.Array, filters: jax.Array) -> jax.Array:
        there = _windows(x, near, left)
        return sum(filters[..., tap, None] * part for tap, part in enumerate(there)).astype(x.dtype)

    return jax.checkpoint(total, prevent_cse=False)(x, filters)


def _windows(x: jax.Array, near: jax.Array, left: int) -> Iterator[jax.Array]:
    """Tap by tap, float32: x_{i+t−left} where that counts, else zeros."""
    width = near.shape[0]
    for tap in range(width):
        counts = near[tap].reshape(near.shape[1:] + (1,) * (x.ndim - 2))
        yield jnp.where(counts, _shifted(x, tap - left, width), 0).astype(jnp.float32)


def _shifted(a: jax.Array, distance: int, width: int) -> jax.Array:
    """a_{i + distance} `[B, T, ...]`, zeros beyond the ends; |distance| < width."""
    around = jnp.pad(a, [(0, 0), (width, width)] + [(0, 0)] * (a.ndim - 2))
    return around[:, width + distance : width + distance + a.shape[1]]
