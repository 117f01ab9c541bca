"""RoFormer v2 against its computation stated in NumPy, and what of both versions' files is refused.

No library computes v2 but the authors' port (JunnYu/RoFormer_pytorch, src/roformer/modeling_roformer.py, `norm_type="rms_norm"`), which
this file restates: names of tensors as the published files have them, [out, in] kernels without biases, norms without scales.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import zoo
from zoo.errors import UserError
from zoo.interop.architectures.roformer import sinusoids
from zoo.interop.weights import open_weights, write_weights

V, D, LAYERS, HEADS, F, EPSILON = 23, 16, 2, 2, 24, 0.01
V1 = {
    "architectures": ["RoFormerForMaskedLM"],
    "model_type": "roformer",
    "vocab_size": V,
    "embedding_size": D,
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": F,
    "max_position_embeddings": 32,
}
V2 = {**V1, "hidden_act": "relu", "layer_norm_eps": EPSILON, "norm_type": "rms_norm", "use_bias": False}


def write(directory: Path, weights: dict[str, np.ndarray], config: dict) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_weights(directory, weights)
    return directory


def weights_of_v2(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {"embeddings.word_embeddings": (V, D), "embeddings.token_type_embeddings": (2, D)}
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes[at + name] = (D, D)
        shapes |= {at + "intermediate.dense": (F, D), at + "output.dense": (D, F)}
    return {f"roformer.{n}.weight": rng.standard_normal(s).astype(np.float32) / s[1] ** 0.5 for n, s in shapes.items()}


def computed(weights: dict[str, np.ndarray], ids: np.ndarray, mask: np.ndarray, types: np.ndarray) -> tuple:
    """(hidden, logits), float64."""
    w = {name.removeprefix("roformer.").removesuffix(".weight"): array.astype(float) for name, array in weights.items()}

    def norm(x):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPSILON)

    def heads(x):
        return x.reshape(*x.shape[:2], HEADS, D // HEADS).swapaxes(1, 2)

    angle = np.arange(ids.shape[1])[:, None] * 10000.0 ** (-2 * np.arange(D // HEADS // 2) / (D // HEADS))

    def turned(x):
        a, b = x[..., 0::2], x[..., 1::2]
        return np.stack([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1).reshape(
            x.shape
        )

    table = w["embeddings.word_embeddings"]
    x = norm(table[ids] + w["embeddings.token_type_embeddings"][types])
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}."
        q, k, v = (heads(x @ w[f"{at}attention.self.{name}"].T) for name in ("query", "key", "value"))
        scores = turned(q) @ turned(k).swapaxes(-1, -2) / np.sqrt(D // HEADS)
        scores = np.where(mask[:, None, None, :] > 0, scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (shares / shares.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(x.shape)
        x = norm(x + mixed @ w[at + "attention.output.dense"].T)
        x = norm(x + np.maximum(x @ w[at + "intermediate.dense"].T, 0) @ w[at + "output.dense"].T)
    return x, x @ table.T


def test_version_2(tmp_path, caplog):
    rng = np.random.default_rng(0)
    weights = weights_of_v2(rng)
    # The port keeps the tied table and does not write the sinusoids; older files have both.
    stored = weights | {"cls.predictions.decoder.weight": weights["roformer.embeddings.word_embeddings.weight"]}
    ours = zoo.load_pretrained(write(tmp_path / "v2", stored, V2))
    mask = (np.arange(11) < np.array([[11], [7]])).astype(int)
    ids, types = rng.integers(5, V, mask.shape) * mask, np.sort(rng.integers(0, 2, mask.shape)) * mask
    found, (hidden, logits) = ours.apply(ids, mask, types), computed(weights, ids, mask, types)
    for got, expected in ((found.hidden, hidden), (found.logits, logits)):
        # Values of size one after two layers in float32.
        np.testing.assert_allclose(np.asarray(got)[mask > 0], expected[mask > 0], rtol=0, atol=1e-5)
    exported = zoo.export(ours, tmp_path / "exported")
    assert "transformers would load it as version 1" in caplog.text
    said = json.loads((exported / "config.json").read_text("utf-8"))
    assert {key: said[key] for key in V2} == V2
    with open_weights(exported) as again:
        assert set(again.names()) == {*weights, "roformer.encoder.embed_positions.weight"}
        for name, tensor in weights.items():
            np.testing.assert_array_equal(again.read(name), tensor)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"rotary_value": True}, "rotary_value=True is not among what this zoo computes"),
        ({"norm_type": "batch_norm"}, "norm_type='batch_norm' is not among"),
        ({"embedding_size": 8}, "embedding_size=8 with use_bias=false has a projection with a bias"),
    ],
)
def test_what_is_refused_of_config_json(config, said, tmp_path):
    with pytest.raises(UserError, match=said):
        zoo.load_pretrained(write(tmp_path / "v2", weights_of_v2(np.random.default_rng(0)), V2 | config))


def test_positions_that_are_not_the_sinusoids_are_refused(tmp_path):
    weights = weights_of_v2(np.random.default_rng(0))
    name = "encoder.embed_positions.weight"
    table = sinusoids({"model": {"model_dim": D, "num_heads": HEADS, "max_length": 32}})[name]
    # Sines of all frequencies, then cosines; a file in float16 has them rounded.
    np.testing.assert_allclose(table[3, 5], np.cos(3 * 10000**-0.25), atol=1e-6)
    zoo.load_pretrained(write(tmp_path / "half", weights | {f"roformer.{name}": table.astype(np.float16)}, V2))
    with pytest.raises(UserError, match=r"embed_positions\.weight \[32, 8\] is not the fixed table \[32, 8\]"):
        zoo.load_pretrained(write(tmp_path / "other", weights | {f"roformer.{name}": table + 0.01}, V2))
