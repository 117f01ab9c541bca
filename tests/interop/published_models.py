"""Small models of NeoBERT and MosaicBERT at random weights, as their published code would save them, and what it computes of them.

Used by the tests and by `tests.peers.measure_checkpoints`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.interop.published_code import layer_norm, linear, mosaicbert, neobert
from zoo.interop.weights import write_weights

V, D, F, LAYERS, HEADS, EPSILON = 31, 24, 16, 2, 3, 1e-3  # three heads: slopes of two kinds
REAL = (np.arange(9) < np.array([9, 6, 4])[:, None]).astype(np.int32)
SOURCE = "NumPy, float64, of the published code"

SIZES = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
CONFIGS = {
    # Two thirds of the inner width, rounded up to a multiple of 8.
    "neobert": SIZES | {"intermediate_size": 24, "max_length": 16, "norm_eps": EPSILON},
    "mosaicbert": SIZES
    | {"intermediate_size": F, "max_position_embeddings": 16, "hidden_act": "gelu_new", "layer_norm_eps": EPSILON}
    | {"alibi_starting_size": 16},
}
LABELS = {"id2label": {"0": "no", "1": "maybe", "2": "yes"}}

Tensors = Mapping[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]


class Published(NamedTuple):
    """A directory's config.json and tensors, inputs, and what the published code computes of tensors for them."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    compute: Callable[[Tensors], dict[str, np.ndarray]]

    def write(self, directory: Path) -> None:
        (directory / "config.json").write_text(json.dumps(self.config))
        write_weights(directory, self.tensors)


def dense(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str) -> Shapes:
    return {f"{name}.weight": (D,), f"{name}.bias": (D,)}


def neobert_shapes() -> Shapes:
    shapes: Shapes = {"model.encoder.weight": (V, D), "model.layer_norm.weight": (D,)}
    for layer in range(LAYERS):
        at = f"model.transformer_encoder.{layer}."
        shapes |= {at + "qkv.weight": (3 * D, D), at + "wo.weight": (D, D), at + "ffn.w12.weight": (2 * F, D)}
        shapes |= {at + "ffn.w3.weight": (D, F), at + "attention_norm.weight": (D,), at + "ffn_norm.weight": (D,)}
    return shapes


def mosaicbert_shapes() -> Shapes:
    tables = {"word_embeddings.weight": (V, D), "token_type_embeddings.weight": (2, D)}
    shapes = {f"bert.embeddings.{name}": shape for name, shape in tables.items()} | norm("bert.embeddings.LayerNorm")
    for layer in range(LAYERS):
        at = f"bert.encoder.layer.{layer}."
        shapes |= dense(f"{at}attention.self.Wqkv", 3 * D, D) | dense(f"{at}attention.output.dense", D, D)
        shapes |= {f"{at}mlp.gated_layers.weight": (2 * F, D)} | dense(f"{at}mlp.wo", D, F)
        shapes |= norm(f"{at}attention.output.LayerNorm") | norm(f"{at}mlp.layernorm")
    return shapes


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def mosaicbert_vocabulary(p: Tensors, hidden: np.ndarray) -> np.ndarray:
    x = gelu_tanh(linear(p, "cls.predictions.transform.dense", hidden))
    x = layer_norm(p, "cls.predictions.transform.LayerNorm", x, 1e-12)
    return x @ p["bert.embeddings.word_embeddings.weight"].T + p["cls.predictions.decoder.bias"]


TRANSFORM = "cls.predictions.transform."
# Name → its class, the shapes of its tensors, and its logits as a function of tensors and the last layer.
MODELS = {
    "neobert": ("NeoBERTLMHead", neobert_shapes() | dense("decoder", V, D), lambda p, h: linear(p, "decoder", h)),
    "neobert, classes": (
        "NeoBERTForSequenceClassification",
        neobert_shapes() | dense("dense", D, D) | dense("classifier", 3, D),
        lambda p, h: linear(p, "classifier", np.tanh(linear(p, "dense", h[:, 0]))),
    ),
    "mosaicbert": (
        "BertForMaskedLM",
        mosaicbert_shapes()
        | (dense(TRANSFORM + "dense", D, D) | norm(TRANSFORM + "LayerNorm") | {"cls.predictions.decoder.bias": (V,)}),
        mosaicbert_vocabulary,
    ),
    "mosaicbert, classes": (
        "BertForSequenceClassification",
        mosaicbert_shapes() | dense("bert.pooler.dense", D, D) | dense("classifier", 3, D),
        lambda p, h: linear(p, "classifier", np.tanh(linear(p, "bert.pooler.dense", h[:, 0]))),
    ),
}


def published(name: str) -> Published:
    """One of `MODELS` at random weights."""
    family = name.split(",")[0]
    class_name, shapes, logits = MODELS[name]
    config = CONFIGS[family] | {"model_type": family, "architectures": [class_name]}
    rng = np.random.default_rng(1)
    inputs = {"input_ids": rng.integers(0, V, REAL.shape), "attention_mask": REAL}
    if family == "mosaicbert":
        inputs["token_type_ids"] = rng.integers(0, 2, REAL.shape)

    def compute(tensors: Tensors) -> dict[str, np.ndarray]:
        p = {name: np.float64(tensor) for name, tensor in tensors.items()}
        sizes = {"layers": LAYERS, "heads": HEADS, "epsilon": EPSILON}
        hidden = (neobert if family == "neobert" else mosaicbert)(p, *inputs.values(), **sizes)
        return {"hidden": hidden, "logits": logits(p, hidden)}

    labels = LABELS if "classes" in name else {}
    return Published(config | labels, _drawn(shapes), inputs, compute)


def _drawn(shapes: Shapes) -> dict[str, np.ndarray]:
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in sorted(shapes.items()):
        values = rng.standard_normal(shape)
        if len(shape) == 1:
            values = 0.2 * values + ("norm" in name.lower() and name.endswith("weight"))
        else:
            values *= 1.2 / np.sqrt(shape[1])
        tensors[name] = values.astype(np.float32)
    return tensors
