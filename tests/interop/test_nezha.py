"""NEZHA against what transformers 4.57.6 computed at the same random weights (tests/peers/make_nezha_golden.py): a directory of that
library loaded and run, every layer, the losses, and all gradients.
"""

from __future__ import annotations

import numpy as np
import pytest

import zoo
from tests.interop import nezha_golden
from tests.peers import ours
from tests.peers.compare import check_gradients, check_outputs
from zoo.config import plain
from zoo.interop.pretrained import Pretrained


@pytest.fixture(scope="module", params=sorted(nezha_golden.CASES))
def computed(request, tmp_path_factory):
    """(the case's arrays, the loaded checkpoint, what our tasks compute with its parameters, their gradients as our tree)."""
    golden = nezha_golden.read(request.param)

    def load(tensors: dict[str, np.ndarray]) -> Pretrained:
        directory = tmp_path_factory.mktemp("nezha")
        nezha_golden.write(request.param, directory, tensors)
        return zoo.load_pretrained(directory)

    loaded = load(golden["weight"])
    results = ours.run(plain(loaded.config), golden["input"], loaded.params)
    return golden, loaded, results, load(golden["gradient"]).params


def test_a_row_is_longer_than_the_clipping_distance_and_padded(computed):
    golden = computed[0]
    lengths = golden["input"]["attention_mask"].sum(1)
    assert lengths.max() > 2 * max(case["max_relative_position"] for case in nezha_golden.CASES.values()) + 1
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
