"""ModernBERT's config.json in the words of every version of the source library, and what of it is refused."""

from __future__ import annotations

import json

import pytest
from ml_collections import ConfigDict

from zoo.errors import UserError
from zoo.interop.architectures.modernbert import FULL, MASKED_LM, MODERNBERT, SLIDING, repeated
from zoo.interop.export import export
from zoo.interop.pretrained import Head, Pretrained
from zoo.interop.starting_point import adopt
from zoo.models import preset

SMALL = {"vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 24}


def read(**changes):
    return MODERNBERT.read(SMALL | changes, "config.json")


def test_old_and_new_words_give_one_model():
    old = read(global_attn_every_n_layers=2, global_rope_theta=500.0, local_rope_theta=30, local_attention=7)
    new = read(
        layer_types=[FULL, SLIDING] * 3,
        rope_parameters={FULL: {"rope_type": "default", "rope_theta": 500}, SLIDING: {"rope_theta": 30.0}},
        local_attention=6,
        # What a file has in both words is the new one's.
        global_attn_every_n_layers=3,
        global_rope_theta=1.0,
    )
    assert old == new
    first, rest, last = old["model"]["stages"]
    assert (len(first["pattern"]), len(rest["pattern"]), rest["repeats"], len(last["pattern"])) == (1, 2, 2, 1)
    assert last["pattern"][0]["mixer"]["window"] == (3, 3) and old["encoding"]["theta"] == 500.0


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ("", []),
        ("LLGLLG", [("LLG", 2)]),
        ("LLGLL", [("LLG", 1), ("LL", 1)]),
        ("GGG", [("G", 3)]),
        ("LGG", [("LGG", 1)]),
    ],
)
def test_the_shortest_repeated_pattern(types, expected):
    assert repeated(types) == [(tuple(pattern), repeats) for pattern, repeats in expected]


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 1}, {"layer_types": [SLIDING] * 2 + [FULL] * 4}])
def test_written_and_read_again(changes):
    assert MODERNBERT.read(MODERNBERT.write(read(**changes)), "again") == read(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": {FULL: {"rope_type": "yarn", "factor": 2.0}}},
            f"rope_parameters.{FULL}=.*yarn.*not among",
        ),
        ({"rope_parameters": {"full": {}}}, f"'full' is not read|did you mean '{FULL}'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "'rope_scaling' is not read"),
        ({"rope_parameters": {SLIDING: {"rope_theta": -1}}}, "must be a number above 0, but is -1"),
        ({"layer_types": [FULL] * 5}, "for each of 6 layers"),
        ({"layer_types": [FULL] * 5 + ["chunked"]}, "must name full_attention or sliding_attention"),
        ({"classifier_pooling": "max"}, "classifier_pooling='max' is not among"),
        ({"hidden_activation": "mish"}, "hidden_activation='mish' is not among"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        read(**changes)


def test_a_head_with_half_of_its_biases_is_refused():
    with pytest.raises(UserError, match=r"classifier_bias=True and norm_bias=False.*both or none"):
        MASKED_LM.read(read(classifier_bias=True), {}, "config.json")
    assert MASKED_LM.read(read(), {"decoder_bias": False, "tie_word_embeddings": False}, "config.json") == {
        "transform": True,
        "activation": "gelu",
        "norm_epsilon": 1e-5,
        "transform_bias": False,
        "output_bias": False,
        "tied": False,
    }


def test_a_tagging_run_that_begins_from_it_has_its_head(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"model_type": "modernbert", "norm_eps": 0.1}))
    tree = {**preset("bert-tiny"), "task": {"name": "token_tagging"}}
    adopt(tree, str(tmp_path))
    given = {"transform": True, "activation": "gelu", "norm_epsilon": 0.1, "transform_bias": False}
    assert tree["task"] == {"name": "token_tagging", **given}


@pytest.mark.parametrize(
    ("head", "fields", "message"),
    [
        ("token_tagging", {"transform": False}, "no token_tagging head of this model with transform=False"),
        (
            "masked_lm",
            {"norm_epsilon": 0.5},
            r"no masked_lm head of this model with norm_epsilon=0\.5, transform_bias=True",
        ),
    ],
)
def test_another_head_is_not_exported(tmp_path, head, fields, message):
    ours = Pretrained(None, {}, None, ConfigDict(read()), "modernbert", (Head(head, tuple(fields.items()), 2),))
    with pytest.raises(UserError, match=message):
        export(ours, tmp_path / "out")
