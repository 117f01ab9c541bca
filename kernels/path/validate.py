"""Refusals of `path_attention`: what does not fit is named before anything is computed, with what would be right."""

from __future__ import annotations

import jax.numpy as jnp

from kernels.attention import AttentionMask, Multiply, Relative, Term


def check_path(q, k, w, beta, log_forget) -> None:
    """w as k, β `[B, S, K]`, log_forget `[B, S, N]`, floating; the queries are the last tokens."""
    if q.shape[1] > k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} tokens and k {k.shape[1]}: the queries are the last tokens of the keys")
    expected = {"w": (w, k.shape), "beta": (beta, k.shape[:3])}
    if log_forget is not None:
        expected["log_forget"] = (log_forget, (*k.shape[:2], q.shape[2]))
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape}, expected {list(shape)}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} is {x.dtype}, expected a floating dtype")


def check_additive(terms: tuple[Term, ...]) -> None:
    """No term that meets q, k or their product: a path has changed those."""
    for term in terms:
        if isinstance(term, Relative | Multiply):
            raise ValueError(
                f"path attention takes terms that are added to the scores, not {type(term).__name__}: it meets queries and "
                "keys, which the tokens between the two have changed"
            )


def check_backwards(mask: AttentionMask) -> None:
    """Only keys at or before the query."""
    if not mask.causal:
        raise ValueError("path attention leads from a query back to a key: the mask must be AttentionMask(causal=True)")
    if mask.prefix_length is not None:
        raise ValueError(
            "path attention leads from a query back to a key, but AttentionMask.prefix_length shows keys after the query: "
            "leave it out"
        )
