"""NeoBERT and MosaicBERT, which no library has, against what their published code computes (`published_code.py`)."""

from __future__ import annotations

import json

import numpy as np
import pytest

import zoo
from tests.interop import published_code
from tests.interop.published_code import layer_norm, linear
from zoo.errors import UserError
from zoo.interop.weights import open_weights, write_weights

V, D, F, LAYERS = 31, 24, 16, 2
REAL = (np.arange(9) < np.array([9, 6, 4])[:, None]).astype(np.int32)
HEADS, EPSILON = 3, 1e-3  # three heads: slopes of two kinds
LABELS = {"id2label": {"0": "no", "1": "maybe", "2": "yes"}}

NEOBERT = {
    "model_type": "neobert",
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 23,  # two thirds of it, rounded up to a multiple of 8
    "max_length": 16,
    "norm_eps": EPSILON,
}
MOSAICBERT = {
    "model_type": "mosaicbert",
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": F,
    "max_position_embeddings": 16,
    "hidden_act": "gelu_new",
    "layer_norm_eps": EPSILON,
    "alibi_starting_size": 16,
}


def neobert_shapes():
    shapes = {"model.encoder.weight": (V, D), "model.layer_norm.weight": (D,)}
    for layer in range(LAYERS):
        at = f"model.transformer_encoder.{layer}."
        shapes |= {at + "qkv.weight": (3 * D, D), at + "wo.weight": (D, D), at + "ffn.w12.weight": (2 * F, D)}
        shapes |= {at + "ffn.w3.weight": (D, F), at + "attention_norm.weight": (D,), at + "ffn_norm.weight": (D,)}
    return shapes


def mosaicbert_shapes():
    norms = ["embeddings.LayerNorm"]
    shapes = {"bert.embeddings.word_embeddings.weight": (V, D), "bert.embeddings.token_type_embeddings.weight": (2, D)}
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}."
        norms += [at + "attention.output.LayerNorm", at + "mlp.layernorm"]
        shapes |= dense(f"bert.{at}attention.self.Wqkv", 3 * D, D) | dense(f"bert.{at}attention.output.dense", D, D)
        shapes |= {f"bert.{at}mlp.gated_layers.weight": (2 * F, D)} | dense(f"bert.{at}mlp.wo", D, F)
    return shapes | {f"bert.{name}.{part}": (D,) for name in norms for part in ("weight", "bias")}


def dense(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


MASKED_LM = {
    "neobert": dense("decoder", V, D),
    "mosaicbert": dense("cls.predictions.transform.dense", D, D)
    | {f"cls.predictions.transform.LayerNorm.{part}": (D,) for part in ("weight", "bias")}
    | {"cls.predictions.decoder.bias": (V,)},
}
CLASSIFIER = {
    "neobert": dense("dense", D, D) | dense("classifier", 3, D),
    "mosaicbert": dense("bert.pooler.dense", D, D) | dense("classifier", 3, D),
}


def drawn(shapes):
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        values = rng.standard_normal(shape)
        if len(shape) == 1:
            values = 0.2 * values + ("norm" in name.lower() and name.endswith("weight"))
        else:
            values *= 1.2 / np.sqrt(shape[1])
        tensors[name] = values.astype(np.float32)
    return tensors


def written(directory, config, architecture, tensors):
    (directory / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    if tensors:
        write_weights(directory, tensors)
    return directory


@pytest.fixture
def inputs():
    rng = np.random.default_rng(1)
    return {"input_ids": rng.integers(0, V, REAL.shape), "attention_mask": REAL}


def check(found, expected, real=None):
    assert found.shape == expected.shape and np.abs(expected).max() > 0.3
    found = np.asarray(found)
    np.testing.assert_allclose(
        *((found, expected) if real is None else (found[real], expected[real])), rtol=0, atol=2e-5
    )


def check_export(ours, directory, path):
    with open_weights(directory) as before, open_weights(zoo.export(ours, path)) as after:
        assert set(before.names()) == set(after.names())
        for name in before.names():
            np.testing.assert_array_equal(before.read(name), after.read(name), err_msg=name)
    config = json.loads((path / "config.json").read_text())
    given = json.loads((directory / "config.json").read_text())
    differing = {key for key in config if key in given and config[key] != given[key]}
    # The least that gives the width.
    assert differing <= {"intermediate_size"}
    assert "intermediate_size" not in differing or (given["intermediate_size"], config["intermediate_size"]) == (23, 24)


def test_neobert(tmp_path, inputs):
    tensors = drawn(neobert_shapes() | MASKED_LM["neobert"])
    directory = written(tmp_path, NEOBERT, "NeoBERTLMHead", tensors)
    ours = zoo.load_pretrained(directory)
    found = ours.apply(**inputs)
    p = {name: np.float64(tensor) for name, tensor in tensors.items()}
    hidden = published_code.neobert(p, inputs["input_ids"], REAL, layers=LAYERS, heads=HEADS, epsilon=EPSILON)
    check(found.hidden, hidden, REAL > 0)
    check(found.logits, linear(p, "decoder", hidden), REAL > 0)
    check_export(ours, directory, tmp_path / "exported")


def test_neobert_as_a_classifier(tmp_path, inputs):
    tensors = drawn(neobert_shapes() | CLASSIFIER["neobert"])
    directory = written(tmp_path, NEOBERT | LABELS, "NeoBERTForSequenceClassification", tensors)
    ours = zoo.load_pretrained(directory)
    p = {name: np.float64(tensor) for name, tensor in tensors.items()}
    hidden = published_code.neobert(p, inputs["input_ids"], REAL, layers=LAYERS, heads=HEADS, epsilon=EPSILON)
    check(ours.apply(**inputs).logits, linear(p, "classifier", np.tanh(linear(p, "dense", hidden[:, 0]))))
    check_export(ours, directory, tmp_path / "exported")


def test_mosaicbert(tmp_path, inputs):
    tensors = drawn(mosaicbert_shapes() | MASKED_LM["mosaicbert"])
    directory = written(tmp_path, MOSAICBERT, "BertForMaskedLM", tensors)
    ours = zoo.load_pretrained(directory)
    types = np.random.default_rng(2).integers(0, 2, REAL.shape)
    found = ours.apply(**inputs, token_type_ids=types)
    p = {name: np.float64(tensor) for name, tensor in tensors.items()}
    hidden = published_code.mosaicbert(p, inputs["input_ids"], REAL, types, layers=LAYERS, heads=HEADS, epsilon=EPSILON)
    check(found.hidden, hidden, REAL > 0)
    x = linear(p, "cls.predictions.transform.dense", hidden)
    x = x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2
    x = layer_norm(p, "cls.predictions.transform.LayerNorm", x, 1e-12)
    logits = x @ p["bert.embeddings.word_embeddings.weight"].T + p["cls.predictions.decoder.bias"]
    check(found.logits, logits, REAL > 0)
    check_export(ours, directory, tmp_path / "exported")


def test_mosaicbert_as_a_classifier(tmp_path, inputs):
    tensors = drawn(mosaicbert_shapes() | CLASSIFIER["mosaicbert"])
    directory = written(tmp_path, MOSAICBERT | LABELS, "BertForSequenceClassification", tensors)
    ours = zoo.load_pretrained(directory)
    p = {name: np.float64(tensor) for name, tensor in tensors.items()}
    types = np.zeros_like(REAL)
    hidden = published_code.mosaicbert(p, inputs["input_ids"], REAL, types, layers=LAYERS, heads=HEADS, epsilon=EPSILON)
    pooled = np.tanh(linear(p, "bert.pooler.dense", hidden[:, 0]))
    check(ours.apply(**inputs).logits, linear(p, "classifier", pooled))
    check_export(ours, directory, tmp_path / "exported")


def test_the_slopes_of_twelve_heads():
    expected = [*2.0 ** -np.arange(1.0, 9), *2.0 ** -np.array([0.5, 1.5, 2.5, 3.5])]
    np.testing.assert_allclose(published_code.slopes(12), expected)


def test_mosaicbert_under_the_name_of_bert_is_told_its_own(tmp_path):
    config = MOSAICBERT | {"model_type": "bert", "auto_map": {"AutoConfig": "configuration_bert.BertConfig"}}
    directory = written(tmp_path, config, "BertForMaskedLM", {})
    with pytest.raises(UserError, match=r"never run\. .*MosaicBERT.*model_type to 'mosaicbert'"):
        zoo.load_pretrained(directory)
    del config["auto_map"]
    with pytest.raises(UserError, match=r"MosaicBERT.*model_type to 'mosaicbert'"):
        zoo.load_pretrained(written(tmp_path, config, "BertForMaskedLM", {}))
