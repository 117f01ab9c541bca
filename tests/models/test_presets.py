"""Presets: published parameter counts, golden trees, and what a wrong model config says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zoo.errors import UserError
from zoo.models import build, preset, presets
from zoo.models.parameters import count_parameters, parameter_shapes

GOLDEN = Path(__file__).parent / "golden"

# With a pooler where the published encoder has one; bert: google-research/bert, Turc et al. 2019; nezha: Wei et al. 2019 over the 21,128 Chinese pieces.
PUBLISHED = {
    "bert-base": 109_482_240,
    "bert-large": 335_141_888,
    "bert-base-zh": 102_267_648,
    "bert-tiny": 4_385_920,
    "bert-mini": 11_170_560,
    "bert-small": 28_763_648,
    "bert-medium": 41_373_184,
    "nezha-base": 101_874_432,
    "nezha-large": 324_998_144,
    "roberta-base": 124_055_040,
    "roberta-large": 354_310_144,
    "xlm-roberta-base": 277_453_056,
    "electra-small": 13_483_008,
    "electra-base": 108_891_648,
    "electra-large": 334_092_288,
    "distilbert": 66_362_880,
    "albert-base": 11_683_584,
    "albert-large": 17_683_968,
    "albert-xlarge": 58_724_864,
    "albert-xxlarge": 222_595_584,
    # Their files hold 98,304 numbers more, the sinusoids.
    "roformer-base-zh": 123_555_840 - 98_304,
    "roformer-char-base-zh": 94_371_840 - 98_304,
    "roformer-v2-char-base-zh": 94_152_192,
    "deberta-base": 138_601_728,
    "deberta-large": 405_163_008,
    "deberta-v2-xlarge": 884_593_152,
    "deberta-v2-xxlarge": 1_564_549_632,
    "deberta-v3-xsmall": 70_682_112,
    "deberta-v3-small": 141_304_320,
    "deberta-v3-base": 183_831_552,
    "deberta-v3-large": 434_012_160,
    "modernbert-base": 149_014_272,
    "modernbert-large": 394_781_696,
    "fnet-base": 82_861_056,
    "fnet-large": 236_945_408,
    "eurobert-210m": 211_766_016,
    "eurobert-610m": 607_874_688,
    "eurobert-2.1b": 2_107_590_912,
    "neobert": 221_665_536,
    "mosaicbert-base": 137_368_320,
    "nomic-bert-base": 136_731_648,
    "convbert-base": 105_680_520,
}


def test_every_preset_has_a_published_count():
    assert set(PUBLISHED) == set(presets.names())


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameter_count(name):
    assert count_parameters(parameter_shapes(build(preset(name)))) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["bert-base", "bert-large", "nezha-base", "nezha-large"])
def test_parameter_tree(name):
    """Names and shapes are an interface: checkpoints, sharding rules and converters stand on them."""
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    assert {n: list(s) for n, s in parameter_shapes(build(preset(name))).items()} == golden


def test_an_unknown_preset_names_the_near_ones():
    with pytest.raises(UserError, match="did you mean 'nezha-base'"):
        preset("neza-base")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "model_dim=128 is no multiple of num_heads=5"),
        ({"num_heads": 2, "num_kv_heads": 3}, "num_heads=2 is no multiple of num_kv_heads=3"),
        ({"dropout": 1.0}, r"dropout is a rate in \[0, 1\)"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"remat": "ful"}, "did you mean 'full'"),
        ({"arrangement": "prenorm"}, "unknown arrangement 'prenorm'.*pre_norm"),
        ({"max_len": 5}, "no argument 'max_len'.*max_length"),
        ({"dtype": "fp16"}, "expected .*'bfloat16'"),
        ({"stages": ({"pattern": ({},), "repeats": "2"},)}, r"stages\[0\]\.repeats: expected int, got '2'"),
        ({"stages": ({"pattern": ({},), "repeats": 0},)}, "repeats of at least 1, not 0"),
        ({"vocab_size": None}, "vocab_size is not set"),
        ({"stages": ({"pattern": ({},), "repeats": 3},)}, r"3 blocks, model\.num_layers is 2"),
        ({"stages": ({"pattern": ({"mixr": "softmax"},), "repeats": 2},)}, "no part 'mixr'.*'mixer'"),
        ({"stages": ({"repeats": 2},)}, "takes pattern"),
    ],
)
def test_a_wrong_model_says_what_would_be_right(change, message):
    config = preset("bert-tiny")
    config["model"].update(change)
    with pytest.raises(UserError, match=message):
        build(config)


def test_stages_replace_parts_per_block():
    """ModernBERT's depth: a first block of its own, then (local, local, global) repeated."""
    config = preset("bert-tiny")
    local = {"mixer": {"name": "softmax", "window": (64, 64)}, "encoding": {"name": "rope", "theta": 1e4}}
    world = {"encoding": {"name": "rope", "theta": 1.6e5}}
    config["model"].update(num_layers=4, arrangement="pre_norm")
    config["model"]["stages"] = ({"pattern": (world,)}, {"pattern": (local, local, world)})
    model = build(config)
    assert [len(stage.pattern) * stage.repeats for stage in model.stages] == [1, 3]
    assert model.stages[1].pattern[0].mixer.window == (64, 64)
    assert model.stages[1].pattern[2].encodings[0].theta == 1.6e5
