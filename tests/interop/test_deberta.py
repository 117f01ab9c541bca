"""DeBERTa's checkpoints as they were published, and what of their settings is refused."""

from __future__ import annotations

import json

import chex
import numpy as np
import pytest
from scipy.special import erf

import zoo
from tests.interop.test_golden import GOLDEN, part
from zoo.errors import UserError
from zoo.interop.architectures import ARCHITECTURES
from zoo.interop.weights import open_weights, write_weights

V1 = {"relative_attention": True, "position_biased_input": False, "pos_att_type": "c2p|p2c"}
V3 = V1 | {"position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True}
HEAD = "lm_predictions.lm_head."


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(a file of v3 in today's names, the parameters of its discriminator's head, a directory as the hub has it)."""
    with np.load(GOLDEN["deberta-v2"], allow_pickle=False) as file:
        arrays = dict(file)
    weights = part(arrays, "weight/")
    width, rng = weights["deberta.encoder.LayerNorm.weight"].size, np.random.default_rng(0)
    shapes = {
        "dense.weight": (width, width),
        "dense.bias": (width,),
        "classifier.weight": (1, width),
        "classifier.bias": (1,),
    }
    shapes |= {"LayerNorm.weight": (width,), "LayerNorm.bias": (width,)}
    discriminator = {
        f"mask_predictions.{name}": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    old = {
        name.replace("cls.predictions.transform.", HEAD)
        .replace("cls.predictions.", HEAD)
        .replace("Norm.weight", "Norm.gamma"): tensor
        for name, tensor in weights.items()
    }
    positions = {"deberta.embeddings.position_embeddings.weight": np.zeros((512, width), np.float32)}
    config = json.loads(arrays["config.json"].tobytes())
    del config["architectures"]
    config["pos_att_type"] = "p2c|c2p"
    directory = tmp_path_factory.mktemp("hub")
    (directory / "config.json").write_text(json.dumps(config))
    write_weights(directory, old | discriminator | positions)
    return arrays, discriminator, directory


def test_both_heads_of_v3_are_loaded_and_kept(published, tmp_path):
    arrays, discriminator, directory = published
    ours = zoo.load_pretrained(directory)
    assert [head.name for head in ours.heads] == ["masked_lm", "discriminator"]
    inputs = part(arrays, "input/")
    found, real = ours.apply(**inputs), inputs["attention_mask"] > 0
    np.testing.assert_allclose(
        np.asarray(found.logits)[real], part(arrays, "output/")["logits"][real], rtol=0, atol=5e-5
    )
    h, given = np.asarray(found.hidden, np.float64), part(discriminator, "mask_predictions.")
    h = h + h[:, :1]
    centred = h - h.mean(-1, keepdims=True)
    normal = centred / np.sqrt(h.var(-1, keepdims=True) + 1e-7) * given["LayerNorm.weight"] + given["LayerNorm.bias"]
    dense = normal @ given["dense.weight"].T + given["dense.bias"]
    expected = (dense * (1 + erf(dense / 2**0.5)) / 2 @ given["classifier.weight"].T + given["classifier.bias"])[..., 0]
    np.testing.assert_allclose(np.asarray(found.replaced_logits)[real], expected[real], rtol=0, atol=1e-4)

    out = zoo.export(ours, tmp_path / "exported")
    assert json.loads((out / "config.json").read_text())["architectures"] == ["DebertaV2ForMaskedLM"]
    with open_weights(out) as again:
        written = {name: again.read(name) for name in again.names()}
    chex.assert_trees_all_equal(written, part(arrays, "weight/") | discriminator)


def test_the_encoder_with_the_discriminator_alone(published, tmp_path):
    _, discriminator, directory = published
    with open_weights(directory) as weights:
        kept = {name: weights.read(name) for name in weights.names() if not name.startswith("lm_predictions")}
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    write_weights(tmp_path, kept)
    ours = zoo.load_pretrained(tmp_path)
    assert [head.name for head in ours.heads] == ["discriminator"]
    out = zoo.export(ours, tmp_path / "exported")
    assert json.loads((out / "config.json").read_text())["architectures"] == ["DebertaV2Model"]
    with open_weights(out) as again:
        assert set(discriminator) < set(again.names()) and "deberta.encoder.LayerNorm.weight" in again.names()
    chex.assert_trees_all_equal(zoo.load_pretrained(out).params, ours.params)


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("deberta", {"relative_attention": False}, "relative_attention=False"),
        ("deberta", {"position_biased_input": True}, "position_biased_input=True"),
        ("deberta", {"talking_head": True}, "talking_head=True"),
        ("deberta", {"position_buckets": 256}, "position_buckets=256"),
        ("deberta", {"pos_att_type": "c2p|p2p"}, r"pos_att_type='c2p\|p2p'"),
        ("deberta-v2", {"pos_att_type": ["c2p", "c2p"]}, "each once"),
        ("deberta-v2", {"pos_att_type": None}, "pos_att_type=None"),
        ("deberta-v2", {"norm_rel_ebd": "rms_norm"}, "norm_rel_ebd='rms_norm'"),
        ("deberta-v2", {"embedding_size": 128}, "embedding_size=128 is not hidden_size=1536"),
        ("deberta-v2", {"pooler_hidden_size": 128}, "pooler_hidden_size=128"),
        ("deberta-v2", {"attention_head_size": 128}, "attention_head_size=128"),
        ("deberta-v2", {"pooler_hidden_act": "mish"}, "pooler_hidden_act='mish'"),
        ("deberta-v2", {"conv_kernel_size": 3, "conv_act": "mish"}, "conv_act='mish'"),
        ("deberta-v2", {"max_relative_positions": "512"}, "max_relative_positions must be an integer"),
    ],
)
def test_settings_that_are_not_ours(model_type, settings, message):
    given = V1 if model_type == "deberta" else V3
    ARCHITECTURES[model_type].read(given, "here")
    with pytest.raises(UserError, match=message):
        ARCHITECTURES[model_type].read(given | settings, "here")


def test_what_a_config_does_not_say_is_what_the_source_library_takes():
    for model_type in ("deberta", "deberta-v2"):
        for key in V1:
            with pytest.raises(UserError, match=key):
                ARCHITECTURES[model_type].read({name: value for name, value in V1.items() if name != key}, "here")
