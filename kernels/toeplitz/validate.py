"""Refusals of `toeplitz_matmul`: what does not fit is named before anything is computed, with what would be right."""

from __future__ import annotations

import jax.numpy as jnp


def check_arrays(t, x, causal: bool) -> None:
    """x `[B, T, N, C]` with T ≥ 1, t `[N, 2T − 1]` or, causal, `[N, T]`; both floating."""
    if x.ndim != 4:
        raise ValueError(f"x has shape {x.shape}, expected [B, T, N, C]: batch, tokens, heads, channels")
    for name, array in (("t", t), ("x", x)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} is {array.dtype}, expected a floating dtype")
    length, heads = x.shape[1:3]
    if length == 0:
        raise ValueError(f"x has shape {x.shape}, expected at least one token")
    columns, said = (length, "T, by look-back") if causal else (2 * length - 1, "2T − 1, from j − i = −(T − 1) on")
    if t.shape != (heads, columns):
        rule = f"causal={causal} takes one row per head and {said}"
        raise ValueError(f"t has shape {t.shape}, expected [{heads}, {columns}]: {rule}")
