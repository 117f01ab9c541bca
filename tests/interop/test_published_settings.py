"""The families that are BERT but for names, heads and tables: config.json as their first checkpoints have it, and what is refused of it."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

import zoo
from tests.interop.test_golden import GOLDEN, part
from zoo.config import completed, difference
from zoo.errors import UserError
from zoo.interop.architectures import architecture
from zoo.interop.weights import write_weights
from zoo.models import preset

BERT = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
}
ROBERTA = BERT | {
    "model_type": "roberta",
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 514,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "type_vocab_size": 1,
    "vocab_size": 50265,
}
ELECTRA = BERT | {
    "model_type": "electra",
    "embedding_size": 768,
    "summary_activation": "gelu",
    "summary_last_dropout": 0.1,
    "summary_type": "first",
    "summary_use_proj": True,
    "vocab_size": 30522,
}
SMALL_ELECTRA = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "embedding_size": 128}
DISTILBERT = {
    "model_type": "distilbert",
    "activation": "gelu",
    "attention_dropout": 0.1,
    "dim": 768,
    "dropout": 0.1,
    "hidden_dim": 3072,
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "n_heads": 12,
    "n_layers": 6,
    "pad_token_id": 0,
    "qa_dropout": 0.1,
    "seq_classif_dropout": 0.2,
    "sinusoidal_pos_embds": False,
    "tie_weights_": True,
    "vocab_size": 30522,
}
ALBERT = BERT | {
    "model_type": "albert",
    "attention_probs_dropout_prob": 0,
    "classifier_dropout_prob": 0.1,
    "down_scale_factor": 1,
    "embedding_size": 128,
    "gap_size": 0,
    "hidden_act": "gelu_new",
    "hidden_dropout_prob": 0,
    "inner_group_num": 1,
    "net_structure_type": 0,
    "num_hidden_groups": 1,
    "num_memory_blocks": 0,
    "vocab_size": 30000,
}
XXLARGE = {"hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 64}
ROFORMER = BERT | {"model_type": "roformer", "rotary_value": False, "vocab_size": 12000}
V2 = {"hidden_act": "relu", "norm_type": "rms_norm", "use_bias": False, "embedding_size": 768}


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("roberta-base", ROBERTA),
        ("xlm-roberta-base", ROBERTA | {"model_type": "xlm-roberta", "vocab_size": 250002}),
        ("electra-base", ELECTRA),
        ("electra-small", ELECTRA | SMALL_ELECTRA),
        ("distilbert", DISTILBERT),
        ("albert-base", ALBERT),
        ("albert-xxlarge", ALBERT | XXLARGE),
        ("roformer-base-zh", ROFORMER | {"embedding_size": 768, "max_position_embeddings": 1536, "vocab_size": 50000}),
        ("roformer-char-base-zh", ROFORMER),
        ("roformer-v2-char-base-zh", ROFORMER | V2),
    ],
)
def test_a_preset_is_what_config_json_says(name, theirs):
    family = architecture(theirs["model_type"], "test")
    made = family.read(theirs, "config.json")
    expected = completed(preset(name))
    lines = [line for line in difference(expected, made) if not line.startswith("model.pooler")]
    assert lines == []
    written = family.write(made)
    assert {key: written[key] for key in written if key in theirs} == {
        key: theirs[key] for key in theirs if key in written
    }
    assert difference(family.read(written, "again"), made) == []


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (ALBERT | {"num_hidden_groups": 2}, "num_hidden_groups=2 is not among"),
        (ALBERT | {"inner_group_num": 3}, "inner_group_num=3 is not among"),
        (ALBERT | {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not among"),
        (ELECTRA | {"summary_type": "mean"}, "summary_type='mean' is not among"),
        (ELECTRA | {"summary_activation": None}, "summary_activation=None is not among"),
        (ELECTRA | {"is_decoder": True}, "is_decoder=True is not among"),
        (DISTILBERT | {"activation": "mish"}, "activation='mish' is not among"),
        (ROBERTA | {"pad_token_id": 513}, "begin at pad_token_id . 1 = 514, which leaves no row of max_position_emb"),
        (ROBERTA | {"pad_token_id": None}, "pad_token_id must be of type int, but is None"),
        (ROBERTA | {"add_cross_attention": True}, "add_cross_attention=True is not among"),
    ],
)
def test_what_is_refused(theirs, said):
    with pytest.raises(UserError, match=said):
        architecture(theirs["model_type"], "test").read(theirs, "config.json")


def test_a_classifier_does_without_the_encoders_pooler(tmp_path, caplog):
    """The first versions of the library saved a RoBERTa's pooler, which no class with a head reads."""
    with np.load(GOLDEN["roberta"], allow_pickle=False) as file:
        arrays = dict(file)
    encoder = {n: t for n, t in part(arrays, "weight/").items() if n.startswith("roberta.")}
    width = encoder["roberta.embeddings.LayerNorm.weight"].size
    square, wide = np.eye(width, dtype=np.float32), np.ones((3, width), np.float32)
    of_head = {"classifier.dense.weight": 2 * square, "classifier.out_proj.weight": wide}
    of_head |= {"classifier.dense.bias": square[0], "classifier.out_proj.bias": wide[:, 0]}
    unused = {"roberta.pooler.dense.weight": 3 * square, "roberta.pooler.dense.bias": square[1]}
    config = json.loads(arrays["config.json"].tobytes()) | {"architectures": ["RobertaForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_weights(tmp_path, encoder | of_head | unused)
    with caplog.at_level(logging.INFO, "zoo.interop.parameters"):
        ours = zoo.load_pretrained(tmp_path)
    np.testing.assert_array_equal(ours.params["model"]["pooler"]["kernel"], 2 * square)
    assert "roberta.pooler.dense.bias and roberta.pooler.dense.weight are not used" in caplog.text
    bare = zoo.load_pretrained(tmp_path, heads=False)
    np.testing.assert_array_equal(bare.params["model"]["pooler"]["kernel"], 3 * square)
