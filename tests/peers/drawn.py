"""Random weights and inputs for both sides, with nothing at its usual start; needs NumPy only."""

from __future__ import annotations

import numpy as np

LENGTH = 13
REAL_TOKENS = (13, 9, 6)
LABELLED = ((1, 5, 11), (2, 3, 8), (1, 2, 4))


def random_weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The parameter `name` of a torch module: norms' scales around 1, kernels and tables that keep the size of their input."""
    values = rng.standard_normal(shape)
    if "LayerNorm.weight" in name:
        values = 1 + 0.2 * values
    elif name.endswith("bias"):
        values *= 0.2
    else:
        values *= 1.2 / np.sqrt(shape[-1])
    return values.astype(np.float32)


def random_inputs(rng: np.random.Generator, *, vocabulary: int, types: int = 2) -> dict[str, np.ndarray]:
    """Padded rows of sentence pairs as BertForPreTraining takes them; a label of −100 is none."""
    rows = len(REAL_TOKENS)
    real = (np.arange(LENGTH) < np.array(REAL_TOKENS)[:, None]).astype(np.int32)
    ids = rng.integers(5, vocabulary, (rows, LENGTH)).astype(np.int32)
    segments = np.sort(rng.integers(0, types, (rows, LENGTH)), axis=1).astype(np.int32)
    labels = np.full((rows, LENGTH), -100, np.int32)
    for row, positions in enumerate(LABELLED):
        labels[row, list(positions)] = rng.integers(5, vocabulary, len(positions))
    return {
        "input_ids": ids * real,
        "attention_mask": real,
        "token_type_ids": segments * real,
        "labels": labels,
        "next_sentence_label": np.array([0, 1, 1], np.int32),
    }
