"""EuroBERT's, Nomic BERT's, NeoBERT's and MosaicBERT's config.json: old and new words, and what is refused."""

from __future__ import annotations

import pytest

from zoo.errors import UserError
from zoo.interop.architectures import ARCHITECTURES

SMALL = {"vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def read(family, **changes):
    return ARCHITECTURES[family].read(SMALL | changes, "config.json")


@pytest.mark.parametrize(("family", "default"), [("eurobert", 1e4), ("nomic_bert", 1e3)])
def test_the_base_in_old_and_new_words(family, default):
    assert read(family)["encoding"]["theta"] == default
    old = read(family, rope_theta=250000, rope_scaling=None)
    assert old == read(family, rope_parameters={"rope_type": "default", "rope_theta": 250000.0})
    assert old["encoding"]["theta"] == 250000.0
    again = ARCHITECTURES[family].write(old)
    assert ARCHITECTURES[family].read(again, "again") == old


@pytest.mark.parametrize(("given", "width", "least"), [(3072, 2048, 3072), (23, 16, 24), (100, 72, 108)])
def test_neoberts_inner_width(given, width, least):
    family = ARCHITECTURES["neobert"]
    tree = read("neobert", intermediate_size=given)
    assert tree["feed_forward"]["width"] == width
    assert family.write(tree)["intermediate_size"] == least
    assert read("neobert", intermediate_size=least) == tree


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("eurobert", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not among"),
        ("eurobert", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling=.*'linear'.*not among"),
        ("eurobert", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters=.*partial.*not among"),
        ("eurobert", {"rope_parameters": 3}, "rope_parameters must be a mapping, but is 3"),
        ("eurobert", {"classifier_pooling": "max"}, "classifier_pooling='max' is not among"),
        ("nomic_bert", {"n_embd": 768}, "keys of nomic's own code.*hidden_size"),
        ("nomic_bert", {"rope_theta": "1e4"}, "rope_theta must be a number above 0, but is '1e4'"),
        ("neobert", {"hidden_act": "GELU"}, "hidden_act='GELU' is not among"),
        ("neobert", {"ngpt": True}, "ngpt=True is not among"),
        ("neobert", {"intermediate_size": None}, "intermediate_size must be of type int, but is None"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(family, changes, message):
    with pytest.raises(UserError, match=message):
        read(family, **changes)


def test_heads_say_what_config_json_does():
    euro, nomic, mosaic = (ARCHITECTURES[name].head("masked_lm") for name in ("eurobert", "nomic_bert", "mosaicbert"))
    expected = {"transform": False, "output_bias": False, "tied": False}
    assert euro.read(read("eurobert"), {}, "config.json") == expected
    expected = {"transform": False, "output_bias": True, "tied": True}
    assert euro.read(read("eurobert", mlp_bias=True), {"tie_word_embeddings": True}, "config.json") == expected
    assert nomic.read(read("nomic_bert"), {}, "config.json")["activation"] == "silu"
    with pytest.raises(UserError, match="tie_word_embeddings=False is not among"):
        nomic.read(read("nomic_bert"), {"tie_word_embeddings": False}, "config.json")
    assert mosaic.read(read("mosaicbert"), {"hidden_act": "relu"}, "config.json") == {"activation": "relu"}
    assert mosaic.write({"activation": "gelu_tanh"}) == {"hidden_act": "gelu_new"}
