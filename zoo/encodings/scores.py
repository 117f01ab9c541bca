"""What any encoding makes of given queries and keys: the scores before softmax, by the plain twin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kernels import attention
from kernels.attention import AttentionMask, Positions
from zoo.encodings.encoding import Dims, Encoded, Encoding, Place, Project, Site
from zoo.encodings.registration import registry


def logits(
    encoding: Any,
    q: jax.Array,
    k: jax.Array,
    positions: Any = None,
    params: Mapping[str, Any] | None = None,
    *,
    x: jax.Array | None = None,
    mask: AttentionMask | None = None,
) -> jax.Array:
    """Scores `[B, N, T, S]` of q `[B,T,N,H]` and k `[B,S,K,H]` under `encoding`, at least float32, −inf where `mask` hides the key.

    q and k are those before the encoding; what an encoding adds to the embeddings (learned, sinusoidal) is in them already or
    nowhere. Dense and slow: a definition to compare with, not to train with.

    Args:
      encoding: a name, a config mapping or a part.
      positions: `[S]` or `[B, S]` integers or a `Positions`, of the keys; the queries are the last T of them. None = 0 … S − 1.
      params: `{"shared": …, "layer": …}`, the parameters of the encoding's modules, as far as it has such; None = initial ones,
        which are those of `initial_parameters`.
      mask: None = no key is hidden, also from an encoding that is meant for causal masks.
      x: `[B, S, D]`, the mixer's input, for encodings that look at it. Its projections are then the identity cut into heads,
        and D must be N·H and K·H. None = zeros.

    Raises:
      ValueError: the encoding cannot serve these sizes, or `params` names a module that it does not have.
    """
    return _evaluated(encoding, q, k, positions, params, x, mask)[0]


def initial_parameters(
    encoding: Any,
    q: jax.Array,
    k: jax.Array,
    positions: Any = None,
    *,
    x: jax.Array | None = None,
    mask: AttentionMask | None = None,
) -> dict[str, Any]:
    """What `logits` with the same arguments takes as `params`, at its initial values (of `jax.random.key(0)`)."""
    return _evaluated(encoding, q, k, positions, None, x, mask)[1]


def _evaluated(
    encoding: Any,
    q: jax.Array,
    k: jax.Array,
    positions: Any,
    params: Mapping[str, Any] | None,
    x: jax.Array | None,
    mask: AttentionMask | None,
) -> tuple[jax.Array, dict[str, Any]]:
    """The scores, and the parameters that they were made with."""
    part: Encoding = registry.build(encoding)
    place = _place(positions, k.shape[1])
    queries = q.shape[1]
    # An encoding may need all tokens (a forget gate adds up what lies between two), so the missing queries are zeros.
    q = jnp.pad(q, [(0, 0), (k.shape[1] - queries, 0), (0, 0), (0, 0)])
    dims = Dims(
        model_dim=q.shape[2] * q.shape[3] if x is None else x.shape[-1],
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        head_dim=q.shape[3],
        num_layers=1,
        max_length=place.span + 1,
    )
    x = jnp.zeros((q.shape[0], k.shape[1], dims.model_dim), q.dtype) if x is None else x
    modules = {"shared": part.shared(dims), "layer": part.layer(dims)}
    unknown = sorted(set(params or {}) - {name for name, module in modules.items() if module is not None})
    if unknown:
        raise ValueError(f"encoding {part.name!r} has no parameters under {', '.join(unknown)}")

    used = {}

    def call(name: str, *arguments: Any) -> Any:
        module = modules[name]
        if module is None:
            return None
        if params is None:
            made, variables = module.init_with_output(jax.random.key(0), *arguments)
            used[name] = variables.get("params", {})
            return made
        used[name] = params.get(name, {})
        return module.apply({"params": used[name]}, *arguments)

    init_side = part.init_side(dims)
    side = {} if init_side is None else {part.name: init_side.init_with_output(jax.random.key(0), x, place)[0]}
    site = Site(x, x, side, _identity(dims), place, mask or AttentionMask())
    made = call("layer", call("shared", place), q, k, jnp.zeros_like(k), site) or Encoded(q, k, k)
    mask = mask if made.mask is None else made.mask
    scores = attention.logits if made.core is None else made.core.logits
    found = scores(made.terms, made.q, made.k, mask=mask, scale=made.scale, positions=place.attended)
    return found[:, :, k.shape[1] - queries :], used


def _place(positions: Any, keys: int) -> Place:
    if positions is None:
        positions = Positions.arange(keys)
    if not isinstance(positions, Positions):
        positions = Positions(jnp.atleast_2d(jnp.asarray(positions, jnp.int32)))
    return Place(positions, span=_span(positions))


def _span(positions: Positions) -> int:
    """The largest distance, from the values themselves where they are at hand."""
    if positions.contiguous:
        return max(1, positions.length - 1)
    return max(1, int(positions.token.max() - positions.token.min()), int(positions.token.max()))


def _identity(dims: Dims) -> Project:
    def split(heads: int):
        return lambda h: h.reshape(*h.shape[:-1], heads, dims.head_dim)

    return Project(split(dims.num_heads), split(dims.num_kv_heads), split(dims.num_kv_heads))
