"""Loss by the place in a row."""

from __future__ import annotations

import itertools

import numpy as np


def by_position(loss: np.ndarray, weight: np.ndarray) -> list[dict[str, float]]:
    """Σ loss / Σ weight over all rows, by how many tokens stand before the predicted one.

    Args:
      loss, weight: [rows, T], the sums at index t being those of the token at t + 1, as `CausalLMModule` predicts them.

    Returns:
      Of each bucket `from` … `to` (tokens before, both counted) with any weight: its mean `loss` and its `tokens`. Buckets end at
      powers of two and half-way between: 1, 2, 3, 4, 6, 8, 12, …
    """
    length = loss.shape[1]
    edges = sorted({1, 2, *(b for k in range(length.bit_length()) for b in (1 << k, 3 << k))})
    edges = [edge for edge in edges if edge <= length]
    loss, weight = loss.sum(axis=0, dtype=np.float64), weight.sum(axis=0, dtype=np.float64)
    found = []
    for first, after in itertools.pairwise([*edges, length + 1]):
        tokens = weight[first - 1 : after - 1].sum()
        if tokens:
            mean = float(loss[first - 1 : after - 1].sum() / tokens)
            found.append({"from": first, "to": after - 1, "loss": mean, "tokens": float(tokens)})
    return found
