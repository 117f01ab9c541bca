"""Softmax attention: multi-head, grouped-query, multi-query, sliding-window."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import AttentionMask, Positions, attention
from zoo.encodings import Dims, Encoded, Encoding, Project, Site
from zoo.mixers.mixer import Context, Mixer, MixerFacts, Style
from zoo.mixers.registration import registry


@registry.register("softmax")
@dataclass(frozen=True)
class Softmax(Mixer):
    """Softmax attention over N query and K key/value heads: out = softmax(logits) V, then the output projection.

    K = N is multi-head (Vaswani et al. 2017, arXiv:1706.03762), K = 1 multi-query (arXiv:1911.02150), between them
    grouped-query attention (arXiv:2305.13245). `window=(left, right)` keeps −left ≤ r ≤ right (Longformer, ModernBERT).
    `implementation` names a kernel that then runs or raises; None lets the kernels choose.
    """

    window: tuple[int, int] | None = None
    implementation: Literal["reference", "xla", "pallas_tpu", "pallas_gpu"] | None = None

    def facts(self) -> MixerFacts:
        return MixerFacts(
            accepts=frozenset(
                {"embedding", "transform", "values", "toeplitz", "multiply", "relative", "row_column"}
                | {"piecewise_linear", "pairwise", "dense", "core", "side"}
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
        empty = jnp.zeros((batch, max_length, dims.num_kv_heads, dims.head_dim), dtype)
        own = tuple(e.init_cache(dims, batch, max_length, dtype) for e in encodings)
        return KeyValueCache(empty, empty, jnp.zeros((), jnp.int32), own)


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
        dims, dense = self.dims, self.style.dense
        self.query = dense(dims.num_heads * dims.head_dim)
        self.key = dense(dims.num_kv_heads * dims.head_dim)
        self.value = dense(dims.num_kv_heads * dims.head_dim)
        self.output = dense(dims.model_dim)
        self.encoding = [e.layer(dims) for e in self.encodings]

    def __call__(
        self,
        x: jax.Array,
        side: dict[str, Any],
        *,
        mask: AttentionMask,
        shared: tuple[Any, ...],
        positions: Positions | tuple[Positions, Positions],
        context: Context | None = None,
        cache: KeyValueCache | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, Any], KeyValueCache | None]:
        project = Project(self._split(self.query), self._split(self.key), self._split(self.value))
        source = x if context is None else context.x
        query_positions = positions if isinstance(positions, Positions) else positions[0]
        site = Site(
            x=x,
            side=side,
            project=project,
            positions=query_positions,
            key_positions=query_positions if context is None else context.positions,
            mask=mask,
        )
        encoded, sites = self._encode(
            Encoded(project.query(x), project.key(source), project.value(source)), shared, site, cache
        )
        k, v = encoded.k, encoded.v
        if cache is not None:
            cache = cache.append(k, v)._replace(encodings=encoded.cache)
            k, v = cache.keys.astype(k.dtype), cache.values.astype(v.dtype)
        if context is not None:
            positions = (query_positions, context.positions)
        if self.mixer.window is not None:
            mask = dataclasses.replace(mask, window=self.mixer.window)
        core = encoded.core or functools.partial(attention, implementation=self.mixer.implementation)
        out = core(
            encoded.q,
            k,
            v,
            terms=encoded.terms,
            mask=mask,
            scale=encoded.scale,
            positions=positions,
            dropout=self._dropout(train),
        )
        for layer, its_site in reversed(sites):
            out, side = layer.back(out, side, its_site)
        return self.output(out.reshape(*out.shape[:-2], -1)), side, cache

    def _split(self, dense: nn.Dense):
        return lambda h: dense(h).reshape(*h.shape[:-1], -1, self.dims.head_dim)

    def _encode(self, encoded: Encoded, shared: tuple[Any, ...], site: Site, cache: KeyValueCache | None):
        """q, k, v through every encoding in turn; terms join, and at most one sets the scale and one the core."""
        sites, caches = [], []
        for index, layer in enumerate(self.encoding):
            own = None if cache is None else cache.encodings[index]
            if layer is None:
                caches.append(own)
                continue
            its_site = site._replace(cache=own)
            new = layer(shared[index], encoded.q, encoded.k, encoded.v, its_site)
            if None not in (encoded.scale, new.scale) and encoded.scale != new.scale:
                raise ValueError(f"two encodings set the scale of the logits, to {encoded.scale} and {new.scale}")
            encoded = new._replace(
                terms=encoded.terms + tuple(new.terms),
                scale=encoded.scale if new.scale is None else new.scale,
                core=new.core or encoded.core,
            )
            sites.append((layer, its_site))
            caches.append(new.cache)
        return encoded._replace(cache=tuple(caches)), sites

    def _dropout(self, train: bool) -> tuple[float, jax.Array] | None:
        rate = self.style.attention_dropout
        return (rate, self.make_rng("dropout")) if train and rate > 0 else None
