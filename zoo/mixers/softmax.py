"""Softmax attention: multi-head, grouped-query, multi-query, sliding-window."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import AttentionMask, attention, logits
from zoo.encodings import Dims, Encoded, Encoding, Place, Project, Site
from zoo.mixers.encoded import bring_back, encode
from zoo.mixers.mixer import SCORES, Mixer, MixerFacts, Style
from zoo.mixers.registration import registry


@registry.register("softmax")
@dataclass(frozen=True)
class Softmax(Mixer):
    """Softmax attention over N query and K key/value heads: out = softmax(logits) V, then the output projection.

    K = N is multi-head (Vaswani et al. 2017, arXiv:1706.03762), K = 1 multi-query (arXiv:1911.02150), between them
    grouped-query attention (arXiv:2305.13245). `window=(left, right)` keeps −left ≤ r ≤ right (Longformer, ModernBERT).
    `implementation` names a kernel that then runs or raises; None lets the kernels choose. `biases` names the projections that
    have one, whatever the model's use_bias says (DeBERTa v1: query, value, output); None = all of them or none, as it says.
    """

    window: tuple[int, int] | None = None
    implementation: Literal["reference", "xla", "pallas_tpu", "pallas_gpu"] | None = None
    biases: tuple[Literal["query", "key", "value", "output"], ...] | None = None

    def __post_init__(self):
        if len(set(self.biases or ())) < len(self.biases or ()):
            raise ValueError(f"biases={self.biases} names a projection twice; name each once")

    def facts(self) -> MixerFacts:
        return MixerFacts(
            accepts=frozenset(
                {"embedding", "transform", "values", "toeplitz", "multiply", "relative", "row_column"}
                | {"piecewise_linear", "pairwise", "dense", "core", "mask", "side"}
            ),
            grouped_heads=True,
            ordered_keys=True,
            decodes=True,
            mask_parts=frozenset(f.name for f in dataclasses.fields(AttentionMask)),
        )

    def module(self, dims: Dims, encodings: tuple[Encoding, ...], style: Style) -> nn.Module:
        return SoftmaxAttention(self, dims, encodings, style)

    def init_cache(
        self, dims: Dims, encodings: tuple[Encoding, ...], batch: int, max_length: int, dtype: Any
    ) -> KeyValueCache:
        widths = (dims.head_dim, dims.head_dim)
        for encoding in encodings:
            widths = encoding.cached_widths(dims, *widths)
        keys, values = (jnp.zeros((batch, max_length, dims.num_kv_heads, width), dtype) for width in widths)
        own = tuple(e.init_cache(dims, batch, max_length, dtype) for e in encodings)
        return KeyValueCache(keys, values, jnp.zeros((), jnp.int32), own)


class KeyValueCache(NamedTuple):
    """Keys and values so far, as attention takes them: `[B, S, K, H]`; how many; and the encodings' own caches."""

    keys: jax.Array
    values: jax.Array
    length: jax.Array
    encodings: tuple[Any, ...]

    def append(self, k: jax.Array, v: jax.Array) -> KeyValueCache:
        start = (0, self.length, 0, 0)
        return self._replace(
            keys=jax.lax.dynamic_update_slice(self.keys, k.astype(self.keys.dtype), start),
            values=jax.lax.dynamic_update_slice(self.values, v.astype(self.values.dtype), start),
            length=self.length + k.shape[1],
        )


class SoftmaxAttention(nn.Module):
    mixer: Softmax
    dims: Dims
    encodings: tuple[Encoding, ...]
    style: Style

    def setup(self):
        dims = self.dims
        self.query = self._projection("query", dims.num_heads * dims.head_dim)
        self.key = self._projection("key", dims.num_kv_heads * dims.head_dim)
        self.value = self._projection("value", dims.num_kv_heads * dims.head_dim)
        self.output = self._projection("output", dims.model_dim)
        self.encoding = [e.layer(dims) for e in self.encodings]

    def __call__(
        self,
        x: jax.Array,
        side: dict[str, Any],
        *,
        mask: AttentionMask,
        shared: tuple[Any, ...],
        place: Place,
        context: jax.Array | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[jax.Array, dict[str, Any], KeyValueCache | None]:
        out, side, cache = self._attend(
            self.query(x), x, side, mask=mask, shared=shared, place=place, context=context, cache=cache
        )
        return self.output(out.reshape(*out.shape[:-2], -1)), side, cache

    def _attend(
        self,
        query: jax.Array,
        x: jax.Array,
        side: dict[str, Any],
        *,
        mask: AttentionMask,
        shared: tuple[Any, ...],
        place: Place,
        context: jax.Array | None,
        cache: KeyValueCache | None,
    ) -> tuple[jax.Array, dict[str, Any], KeyValueCache | None]:
        """The heads before the output projection, `[B, T, N, H]`, for projected queries `[B, T, N·H]` of x."""
        if (context is None) != (place.sources is None):
            raise ValueError("a context comes with its positions in place.sources, and those with a context")
        project = Project(self._split(self.query), self._split(self.key), self._split(self.value))
        source = x if context is None else context
        site = Site(x=x, source=source, side=side, project=project, place=place, mask=mask)
        made = Encoded(self._heads(query), project.key(source), project.value(source))
        own_caches = (None,) * len(self.encodings) if cache is None else cache.encodings
        encoded, sites = encode(self.encoding, made, shared, site, own_caches)
        k, v = encoded.k, encoded.v
        if cache is not None:
            cache = cache.append(k, v)._replace(encodings=encoded.cache)
            k, v = cache.keys.astype(k.dtype), cache.values.astype(v.dtype)
        placed = dict(mask=self._narrowed(encoded.mask), scale=encoded.scale, positions=place.attended)
        if self.is_mutable_collection(SCORES) and not self.is_initializing():
            scores = logits if encoded.core is None else encoded.core.logits
            self.sow(SCORES, "scores", scores(encoded.terms, encoded.q, k, **placed))
        out = (encoded.core or attention)(
            encoded.q,
            k,
            v,
            terms=encoded.terms,
            **placed,
            dropout=self._dropout(place.train),
            implementation=self.mixer.implementation,
        )
        return *bring_back(self.encoding, out, shared, side, sites), cache

    def _projection(self, name: str, features: int) -> nn.Dense:
        biases = self.mixer.biases
        return self.style.dense(features, use_bias=None if biases is None else name in biases)

    def _split(self, dense: nn.Dense):
        return lambda h: self._heads(dense(h))

    def _heads(self, h: jax.Array) -> jax.Array:
        return h.reshape(*h.shape[:-1], -1, self.dims.head_dim)

    def _narrowed(self, mask: AttentionMask) -> AttentionMask:
        """The caller's mask and the mixer's own window: what both allow."""
        window = self.mixer.window
        if window is not None and mask.window is not None:
            window = (min(window[0], mask.window[0]), min(window[1], mask.window[1]))
        return mask if window is None else dataclasses.replace(mask, window=window)

    def _dropout(self, train: bool) -> tuple[float, jax.Array] | None:
        rate = self.style.attention_dropout
        return (rate, self.make_rng("dropout")) if train and rate > 0 else None
