"""A tiny BERT in a directory, as its source library would save it, for tests that need a whole checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from zoo.interop.weights import write_weights

WORDS = ("good", "bad", "fine", "film", "a", "the", "was", "very", "not", "##s", "plot", "acting")
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
WIDTH, LAYERS, INNER, POSITIONS = 16, 2, 24, 160


def config(**changes) -> dict:
    """Its config.json."""
    return {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "vocab_size": len(VOCABULARY),
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": INNER,
        "max_position_embeddings": POSITIONS,
        **changes,
    }


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Its tensors by name."""
    shapes = {
        "embeddings.word_embeddings.weight": (len(VOCABULARY), WIDTH),
        "embeddings.position_embeddings.weight": (POSITIONS, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
        **_norm("embeddings.LayerNorm"),
    }
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes |= _dense(at + name, WIDTH, WIDTH)
        shapes |= _dense(at + "intermediate.dense", INNER, WIDTH) | _dense(at + "output.dense", WIDTH, INNER)
        shapes |= _norm(at + "attention.output.LayerNorm") | _norm(at + "output.LayerNorm")
    shapes = {f"bert.{name}": shape for name, shape in shapes.items()}
    shapes |= _dense("cls.predictions.transform.dense", WIDTH, WIDTH) | _norm("cls.predictions.transform.LayerNorm")
    shapes["cls.predictions.bias"] = (len(VOCABULARY),)
    rng = np.random.default_rng(seed)
    return {
        name: (0.2 * rng.standard_normal(shape) + name.endswith("Norm.weight")).astype(np.float32)
        for name, shape in shapes.items()
    }


def write(directory: Path, tensors: dict[str, np.ndarray] | None = None, **changes) -> Path:
    """The directory with these tensors and changes to config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(**changes)), encoding="utf-8")
    (directory / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCABULARY), encoding="utf-8")
    write_weights(directory, weights() if tensors is None else tensors)
    return directory


def _dense(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
