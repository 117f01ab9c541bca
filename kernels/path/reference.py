"""PaTH attention as its definition: one token after the other, dense, differentiated by JAX. `xla` is tested against it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.attention import AttentionMask, Dense, Term
from kernels.attention import reference as plain
from kernels.attention.positions import Placement


def path_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K W"],
    w: Float[Array, "B S K H"],
    beta: Float[Array, "B S K"],
    log_forget: Float[Array, "B S N"] | None,
    *,
    terms: tuple[Term, ...],
    mask: AttentionMask,
    scale: float | int | Array,
    placement: Placement,
    dropout: tuple[float, Array] | None,
) -> Float[Array, "B T N W"]:
    """Softmax attention whose scores are those below and nothing else."""
    scores = logits(q, k, w, beta, log_forget, terms=terms, mask=mask, scale=scale, placement=placement)
    nothing = jnp.zeros_like(q), jnp.zeros_like(k)
    call = {"mask": AttentionMask(), "scale": 1.0, "placement": placement, "dropout": dropout}
    return plain.attention(*nothing, v, terms=(Dense(scores),), **call)


def logits(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    w: Float[Array, "B S K H"],
    beta: Float[Array, "B S K"],
    log_forget: Float[Array, "B S N"] | None,
    *,
    terms: tuple[Term, ...],
    mask: AttentionMask,
    scale: float | int | Array,
    placement: Placement,
) -> Float[Array, "B N T S"]:
    """scale · q_iᵀ H_i … H_{j+1} k_j + Σ_{j<t≤i} log_forget_t + terms; −inf where hidden or j > i."""
    products = scale * path_products(q, k, w, beta)
    if log_forget is not None:
        products = products + forgotten(log_forget, q.shape[1])
    nothing = jnp.zeros_like(q), jnp.zeros_like(k)
    added = plain.logits(terms, *nothing, mask=mask, scale=1.0, placement=placement)
    return jnp.where(past(q.shape[1], k.shape[1])[None, None], products + added, -jnp.inf)


def path_products(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], w: Float[Array, "B S K H"], beta: Float[Array, "B S K"]
) -> Float[Array, "B N T S"]:
    """q_iᵀ H_i H_{i−1} … H_{j+1} k_j: a query walks back over the keys, meets each and is then reflected by its H."""
    wide, heads = w.dtype, q.shape[2]
    k, w, beta = (jnp.repeat(x, heads // k.shape[2], axis=2).astype(wide) for x in (k, w, beta))
    reached = past(q.shape[1], k.shape[1])

    def step(x: Array, token: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        k_j, w_j, beta_j, here = token
        met = jnp.einsum("btnh,bnh->bnt", x, k_j)
        along = jnp.einsum("btnh,bnh->btn", x, w_j) * beta_j[:, None]
        return x - jnp.where(here[None, :, None, None], along[..., None] * w_j[:, None], 0), met

    tokens = (*(jnp.moveaxis(x, 1, 0) for x in (k, w, beta)), reached.T)
    return jnp.moveaxis(jax.lax.scan(step, q.astype(wide), tokens, reverse=True)[1], 0, 3)


def forgotten(log_forget: Float[Array, "B S N"], queries: int) -> Float[Array, "B N T S"]:
    """Σ_{j<t≤i} log_forget_t, by differences of one sum."""
    sums = jnp.moveaxis(jnp.cumsum(log_forget, axis=1), 1, 2)
    return sums[:, :, sums.shape[2] - queries :, None] - sums[:, :, None]


def past(queries: int, keys: int) -> Array:
    """Which keys stand at or before a query, by their places in the arrays: bool `[T, S]`."""
    return jnp.arange(keys)[None] <= jnp.arange(keys - queries, keys)[:, None]
