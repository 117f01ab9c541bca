"""NEZHA against what transformers 4.57.6 computed at the same random weights (tests/peers/make_nezha_golden.py): a directory of that
library loaded and run, every layer, the losses, and all gradients.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import zoo
from tests.peers import ours
from tests.peers.compare import check_gradients, check_outputs
from zoo.config import plain
from zoo.interop.pretrained import Pretrained
from zoo.interop.weights import write_weights

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


@pytest.fixture(scope="module", params=sorted(CASES))
def computed(request, tmp_path_factory):
    """(the case's arrays, the loaded checkpoint, what our tasks compute with its parameters, their gradients as our tree)."""
    golden = read(request.param)

    def load(tensors: dict[str, np.ndarray]) -> Pretrained:
        directory = tmp_path_factory.mktemp("nezha")
        (directory / "config.json").write_text(json.dumps(ALL | CASES[request.param]))
        write_weights(directory, tensors)
        return zoo.load_pretrained(directory)

    loaded = load(golden["weight"])
    results = ours.run(plain(loaded.config), golden["input"], loaded.params)
    return golden, loaded, results, load(golden["gradient"]).params


def test_a_row_is_longer_than_the_clipping_distance_and_padded(computed):
    golden = computed[0]
    lengths = golden["input"]["attention_mask"].sum(1)
    assert lengths.max() > 2 * max(case["max_relative_position"] for case in CASES.values()) + 1
    assert lengths.min() < lengths.max()


def test_the_loaded_checkpoint(computed):
    golden, loaded, _, _ = computed
    mask = golden["input"]["attention_mask"]
    found = loaded.apply(golden["input"]["input_ids"], mask, golden["input"]["token_type_ids"])
    expected = {"hidden": golden["output"]["hidden_states"][-1], **golden["output"]}
    for name in {"hidden", "logits", "pooled", "sentence_logits"} & expected.keys():
        array, wanted = np.asarray(getattr(found, name)), expected[name]
        if name in ("hidden", "logits"):
            array, wanted = array[mask > 0], wanted[mask > 0]
        np.testing.assert_allclose(array, wanted, rtol=0, atol=1e-5, err_msg=name)


def test_every_layer_and_the_losses(computed):
    golden, _, results, _ = computed
    check_outputs(results, golden["output"], golden["input"]["attention_mask"])


def test_gradients(computed):
    _, _, results, theirs = computed
    check_gradients(results.gradients, theirs)
