"""Attention resolution: how well attention tells near from far."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo.errors import UserError
from zoo.models import Transformer
from zoo.models.attention_scores import attention_scores

_MOST_SCORES = 1 << 27  # [L, N, T, T] at once, a few float32 arrays of which fit a small machine


def attention_resolution(expected: np.ndarray) -> np.ndarray:
    """R(s) = Σ_n e^{s[n]} (e^{s[n]} − e^{s[n+1]}) / (Σ_n e^{s[n]})², n = 0 … N − 1 of s `[..., N + 1]` → `[...]`.

    The larger, the better attention tells positions apart; where s does not fall with n, terms are negative. A constant added to s
    changes nothing. Source: Sun et al. 2022 (arXiv:2212.10554), section 3.
    """
    powers = np.exp(np.asarray(expected, np.float64) - np.max(expected, axis=-1, keepdims=True))
    here, next_ = powers[..., :-1], powers[..., 1:]
    return (here * (here - next_)).sum(axis=-1) / here.sum(axis=-1) ** 2


def expected_scores(
    model: Transformer, params: Mapping[str, Any], rows: Iterable[Mapping[str, np.ndarray]]
) -> np.ndarray:
    """s[n], the mean attention score before softmax at look-back n = i − j ≤ T/2, of every layer and head: float64 `[L, N, T//2 + 1]`.

    The mean is over the queries of the second half of all rows, which have that many tokens before them, so that no n is a matter of a
    few; of those that see the key, −inf where none does. The paper takes s from the encoding
    alone; here the scores are those of the trained model on real text, of whatever encoding (by the plain twin, `[L, N, T, T]` at once).

    Args:
      rows: features of a task, each [T]: `input_ids`, and what else the model takes.

    Raises:
      UserError: a bidirectional model, which looks both ways; a mixer without such scores; or more scores than may be there at once.
    """
    if not model.causal:
        raise UserError("attention resolution is that of looking back, which is all of a causal model alone")
    total: Any = 0.0
    count: Any = 0.0
    for row in rows:
        length = len(row["input_ids"])
        if (scores := model.dims.num_layers * model.dims.num_heads * length**2) > _MOST_SCORES:
            raise UserError(f"attention resolution needs all {scores:,} scores of a row of {length} tokens at once")
        inputs = {name: row[name][None] for name in ("input_ids", "segment_ids", "positions") if name in row}
        sums, seen = _by_look_back(model, params, inputs)
        total, count = total + np.asarray(sums, np.float64), count + np.asarray(seen, np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), -np.inf)


@functools.partial(jax.jit, static_argnums=0)
def _by_look_back(model: Transformer, params: Any, inputs: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Sums and counts of the visible scores by look-back, over the rows and queries: twice `[L, N, T//2 + 1]`."""
    scores = attention_scores(model, params, **inputs)
    length = scores.shape[-1]
    half = length // 2
    key = jnp.arange(half, length)[:, None] - jnp.arange(half + 1)  # of query i (rows) at look-back n (columns)
    skewed = jnp.take_along_axis(scores[..., half:, :], key[None, None, None], axis=-1)
    seen = skewed > -jnp.inf
    return jnp.where(seen, skewed, 0).sum(axis=(1, 3)), seen.sum(axis=(1, 3))
