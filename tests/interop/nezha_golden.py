"""The golden file of NEZHA (tests/peers/make_nezha_golden.py): its cases as directories of transformers 4.57.6.

Used by the tests and by `tests.peers.measure_checkpoints`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from zoo.interop.weights import write_weights

SOURCE = "transformers 4.57.6 (golden file)"
GOLDEN = Path(__file__).parents[1] / "models" / "golden" / "nezha.npz"
# What the script gave the library's config, by the names that it has in config.json.
CASES = {
    "pretraining": dict(
        architectures=["NezhaForPreTraining"], num_attention_heads=2, intermediate_size=24, max_relative_position=4
    ),
    "masked_lm": dict(
        architectures=["NezhaForMaskedLM"],
        num_attention_heads=4,
        intermediate_size=32,
        max_relative_position=3,
        hidden_act="gelu_new",
    ),
}
ALL = dict(
    model_type="nezha",
    vocab_size=37,
    hidden_size=16,
    num_hidden_layers=2,
    max_position_embeddings=13,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def read(case: str) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of a case by kind (input, weight, output, gradient) and name."""
    kinds = {}
    with np.load(GOLDEN, allow_pickle=False) as file:
        for key in file.files:
            own, kind, name = key.split("/", 2)
            if own == case:
                kinds.setdefault(kind, {})[name] = file[key]
    return kinds


def write(case: str, directory: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A directory with the case's config.json and these tensors."""
    (directory / "config.json").write_text(json.dumps(ALL | CASES[case]))
    write_weights(directory, tensors)
