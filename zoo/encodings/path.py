"""PaTH: every token between a query and a key reflects what passes it; with a forget gate, PaTH-FoX."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.attention import AttentionMask, Dense, Multiply, Relative, RowColumn, Term, attention
from kernels.path import carried, logits, path_attention
from zoo.encodings.documents import documents
from zoo.encodings.encoding import Dims, Encoded, Encoding, EncodingLayer, Facts, Site
from zoo.encodings.fox import ForgetCache, ForgetGate, Fox
from zoo.encodings.registration import registry
from zoo.errors import UserError


@registry.register("path")
@dataclass(frozen=True)
class Path(Encoding):
    """Householder-like matrices accumulated from key to query: logit = q_iᵀ H_i … H_{j+1} k_j / √H, H_t = I − β_t w_t w_tᵀ.

    w_t is silu(convolution(W₂ W₁ x)_t) at length 1: W₁ `[D, rank]`, W₂ `[rank, K·H]`, or one matrix with rank=None; the
    convolution runs over the token and the `width` − 1 before it in its document, each channel by itself (width=1: none).
    β_t = 2σ(⟨u_k, x_t⟩ + c_k), so that H_t may leave a direction, erase it (1) or turn it round (2). Both per key/value head, in
    float32. For causal masks; any length. Positions do not matter, only the order of the tokens.
    It takes the place of a rotation: no second transform of q and k, nor terms that meet them (Shaw, DeBERTa). Biases add to it.
    Decoding keeps the keys as the next token meets them, in float32, since every token changes all of them.
    `form="paper"` has no silu. Source: Yang et al. 2025 (arXiv:2505.16381) and its released code, whose norm of q and k is not
    here; it takes rank=None by itself where key/value heads are shared in one version, and in another where told.
    """

    rank: int | None = 32
    width: int = 3
    form: Literal["code", "paper"] = "code"
    stddev: float = 0.02

    def __post_init__(self):
        for name in ("rank", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"encoding {self.name!r} has {name}={value}; it must be at least 1")

    def facts(self) -> Facts:
        return Facts(kinds=frozenset({"core", "transform"}), bidirectional=False, ordered_keys=True)

    def layer(self, dims: Dims) -> EncodingLayer:
        return PathLayer(self, dims)

    def cached_widths(self, dims: Dims, key: int, value: int) -> tuple[int, int]:
        return 0, value  # the keys are in the encoding's own cache

    def init_cache(self, dims: Dims, batch: int, max_length: int, dtype: Any) -> PathCache:
        channels = dims.num_kv_heads * dims.head_dim
        return PathCache(
            keys=jnp.zeros((batch, max_length, dims.num_kv_heads, dims.head_dim), jnp.float32),
            tail=Tail(
                jnp.zeros((batch, self.width - 1, channels), jnp.float32), jnp.zeros((batch, self.width - 1), jnp.int32)
            ),
            forget=None,
            length=jnp.zeros((), jnp.int32),
        )


@registry.register("path_fox")
@dataclass(frozen=True)
class PathFox(Path):
    """PaTH with the forget gate of FoX: logit = ( q_iᵀ H_i … H_{j+1} k_j + Σ_{j<t≤i} ln f_t ) / √H, f_t = σ(w_n · x_t + b_n).

    With `form="paper"` the sum stands outside the scale, as in FoX, and w has no silu. All else as `path` and `fox`.
    Source: Yang et al. 2025 (arXiv:2505.16381), where it is PaTH-FoX, and its released code.
    """

    def facts(self) -> Facts:
        facts = super().facts()
        return dataclasses.replace(facts, kinds=facts.kinds | {"row_column"})

    def layer(self, dims: Dims) -> EncodingLayer:
        return PathLayer(self, dims, forgets=True)

    def init_cache(self, dims: Dims, batch: int, max_length: int, dtype: Any) -> PathCache:
        cache = super().init_cache(dims, batch, max_length, dtype)
        return cache._replace(forget=Fox().init_cache(dims, batch, max_length, dtype))


class Tail(NamedTuple):
    """What the convolution still needs of the last tokens: its inputs `[B, width − 1, K·H]` and their documents `[B, width − 1]`."""

    x: jax.Array
    documents: jax.Array


class PathCache(NamedTuple):
    """While decoding: keys as the next token meets them `[B, S, K, H]`, the convolution's tail, the gate's sums, slots used."""

    keys: jax.Array
    tail: Tail
    forget: ForgetCache | None
    length: jax.Array


class PathLayer(EncodingLayer):
    encoding: Path
    dims: Dims
    forgets: bool = False

    @nn.compact
    def __call__(self, shared: None, q: jax.Array, k: jax.Array, v: jax.Array, site: Site) -> Encoded:
        name, cache = self.encoding.name, site.cache
        if site.place.sources is not None:
            raise UserError(
                f"encoding {name!r} goes through the tokens between a query and a key of one sequence; it cannot be used with "
                "attention to a context; use alibi, t5 or rope there"
            )
        found = documents(site.mask, site.x.shape[:2])
        w, tail = self._directions(site.x, found, None if cache is None else cache.tail)
        strength = self._dense(self.dims.num_kv_heads, "strength", use_bias=True)
        # Padding is on no path. The kernel sees to that too, but not where keys are carried on.
        beta = jnp.where((found > 0)[..., None], 2 * jax.nn.sigmoid(strength(site.x)), 0)
        terms, forget = self._forgotten(q, k, v, site)
        if cache is None:
            return Encoded(q, k, v, terms=terms, core=PathCore(name, w, beta))
        slots = cache.keys.shape[1]
        keys = carried(k, w, beta, cache.keys)
        keys = jax.lax.dynamic_update_slice_in_dim(keys[:, :slots], keys[:, slots:], cache.length, axis=1)
        core = CachedCore(name, k, w, beta, cache.keys, keys, cache.length)
        new = PathCache(keys, tail, forget, cache.length + k.shape[1])
        return Encoded(q, k[..., :0], v, terms=terms, cache=new, core=core)

    def _dense(self, features: int, name: str, use_bias: bool = False) -> nn.Dense:
        start = nn.initializers.truncated_normal(self.encoding.stddev)
        kwargs = {"dtype": jnp.float32, "precision": "highest", "kernel_init": start, "name": name}
        return nn.Dense(features, use_bias=use_bias, **kwargs)

    def _directions(self, x: jax.Array, found: jax.Array, before: Tail | None) -> tuple[jax.Array, Tail]:
        """w `[B, T, K, H]` of length 1, and the tail that the tokens after these need."""
        part, channels = self.encoding, self.dims.num_kv_heads * self.dims.head_dim
        if part.rank is not None:
            x = self._dense(part.rank, "down")(x)
        x = self._dense(channels, "direction")(x)
        if before is None:
            nothing = jnp.zeros((x.shape[0], part.width - 1), jnp.int32)
            before = Tail(jnp.zeros((*nothing.shape, channels), x.dtype), nothing)
        row = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), before, Tail(x, found))
        if part.width > 1:
            start = nn.initializers.truncated_normal(part.stddev)
            kernel = self.param("convolution", start, (part.width, channels), jnp.float32)
            taps = [jax.tree.map(lambda a, tap=tap: a[:, tap : tap + x.shape[1]], row) for tap in range(part.width)]
            same = [((tap.documents == found) & (found > 0))[..., None] for tap in taps]
            x = sum(kernel[i] * jnp.where(same[i], tap.x, 0) for i, tap in enumerate(taps))
        x = jax.nn.silu(x) if part.form == "code" else x
        w = x.reshape(*x.shape[:2], self.dims.num_kv_heads, self.dims.head_dim)
        w = w * jax.lax.rsqrt(jnp.sum(w * w, axis=-1, keepdims=True) + 1e-6)
        return w, jax.tree.map(lambda a: a[:, a.shape[1] - part.width + 1 :], row)

    def _forgotten(
        self, q: jax.Array, k: jax.Array, v: jax.Array, site: Site
    ) -> tuple[tuple[Term, ...], ForgetCache | None]:
        """The forget gate's term and cache, of an encoding that has one."""
        if not self.forgets:
            return (), None
        gate = ForgetGate(self.dims.num_heads, self.encoding.stddev, name="forget")
        made = gate(None, q, k, v, site._replace(cache=None if site.cache is None else site.cache.forget))
        scale = q.shape[3] ** -0.5 if self.encoding.form == "code" else 1.0
        return tuple(RowColumn(scale * term.a, scale * term.b) for term in made.terms), made.cache


@dataclass(frozen=True)
class PathCore:
    """Attention along the path of `w` `[B, S, K, H]` and `beta` `[B, S, K]`."""

    name: str
    w: jax.Array
    beta: jax.Array

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        terms: tuple[Term, ...] = (),
        implementation: str | None = None,
        **options: Any,
    ) -> jax.Array:
        """As `kernels.attention.attention`.

        Raises:
          UserError: an implementation other than "reference", "xla" and "pallas_tpu", or a term that meets queries or keys.
        """
        _check(self.name, terms, implementation, "pallas_tpu")
        return path_attention(q, k, v, self.w, self.beta, terms=terms, implementation=implementation, **options)

    def logits(
        self,
        terms: tuple[Term, ...],
        q: jax.Array,
        k: jax.Array,
        *,
        mask: AttentionMask | None = None,
        **options: Any,
    ) -> jax.Array:
        """The scores `[B, N, T, S]`, as `kernels.attention.logits`, but −inf also for all keys after the query."""
        _check(self.name, terms, None)
        causal = dataclasses.replace(mask or AttentionMask(), causal=True)
        return logits(q, k, self.w, self.beta, terms=terms, mask=causal, **options)


@dataclass(frozen=True)
class CachedCore:
    """Attention of the newest tokens, whose own `k`, `w` and `beta` these are, after `length` earlier ones.

    `before` and `after` `[B, S, K, H]` hold keys in the slots that the values and the mask of a call have: those of the earlier
    tokens as the first of the newest meets them, and all as the token after the last meets them.
    """

    name: str
    k: jax.Array
    w: jax.Array
    beta: jax.Array
    before: jax.Array
    after: jax.Array
    length: jax.Array

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        terms: tuple[Term, ...] = (),
        mask: AttentionMask = AttentionMask(),  # noqa: B008 (frozen, without arrays)
        positions: Any = None,
        implementation: str | None = None,
        **options: Any,
    ) -> jax.Array:
        """As `kernels.attention.attention`; the keys of the call are not looked at."""
        _check(self.name, terms, implementation)
        options["implementation"] = implementation
        if q.shape[1] == 1:
            return attention(q, self.after.astype(q.dtype), v, terms=terms, mask=mask, positions=positions, **options)
        # The tokens stand once in their slots, where only those before them are seen, and once more behind all slots.
        slots, queries = self.before.shape[1], q.shape[1]

        def again(x: jax.Array, axis: int) -> jax.Array:
            return jnp.concatenate([x, jax.lax.dynamic_slice_in_dim(x, self.length, queries, axis)], axis)

        def term_again(term: Term) -> Term:
            match term:
                case RowColumn():
                    return RowColumn(term.a, again(term.b, 2))
                case Dense():
                    return Dense(again(term.bias, 3))
            return term

        earlier = jnp.arange(slots)[None] < self.length
        valid = jnp.broadcast_to(earlier if mask.key_valid is None else earlier & mask.key_valid, v.shape[:2])
        own = jnp.ones((v.shape[0], queries), bool) if mask.key_valid is None else again(mask.key_valid, 1)[:, slots:]
        mask = dataclasses.replace(
            mask,
            key_segments=None if mask.key_segments is None else again(mask.key_segments, 1),
            key_valid=jnp.concatenate([valid, own], axis=1),
        )
        query_positions, key_positions = positions
        keys = jnp.concatenate([self.before.astype(q.dtype), self.k], axis=1)
        still = [(0, 0), (slots, 0)]
        return path_attention(
            q,
            keys,
            again(v, 1),
            jnp.pad(self.w, [*still, (0, 0), (0, 0)]),
            jnp.pad(self.beta, [*still, (0, 0)]),
            terms=tuple(map(term_again, terms)),
            mask=mask,
            positions=(query_positions, jax.tree.map(lambda x: again(x, 1), key_positions)),
            **options,
        )


def _check(name: str, terms: tuple[Term, ...], implementation: str | None, *fused: str) -> None:
    exist = ("xla", "reference", *fused)
    if implementation is not None and implementation not in exist:
        raise UserError(
            f"encoding {name!r} has its own attention, which has no implementation {implementation!r} here; leave it out, or "
            f"take one of {', '.join(exist)}"
        )
    for term in terms:
        if isinstance(term, Relative | Multiply):
            raise UserError(
                f"encoding {name!r} changes queries and keys by the tokens between them; it cannot be used with an encoding "
                f"whose terms meet them ({type(term).__name__}); use alibi, t5, kerple_log or fox beside it"
            )
