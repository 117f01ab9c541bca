"""Our NEZHA against what transformers 4.57.6 computed at the same random weights (tests/peers/make_nezha_golden.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.peers import ours
from tests.peers.compare import check_gradients, check_outputs
from tests.peers.weights import to_ours

GOLDEN = Path(__file__).parent / "golden" / "nezha.npz"
CASES = {
    "pretraining": dict(limit=4, num_heads=2, width=24, approximate=False, pooler=True),
    "masked_lm": dict(limit=3, num_heads=4, width=32, approximate=True, pooler=False),
}


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
def computed(request):
    golden, sizes = read(request.param), dict(CASES[request.param])
    encoding = {"name": "nezha", "limit": sizes.pop("limit")}
    vocabulary, width = golden["weight"]["nezha.embeddings.word_embeddings.weight"].shape
    config = ours.config(
        encoding, epsilon=1e-12, vocab_size=vocabulary, model_dim=width, num_layers=2, max_length=13, **sizes
    )
    return golden, ours.run(config, golden["input"], to_ours(golden["weight"], "nezha", layers=2))


def test_a_row_is_longer_than_the_clipping_distance_and_padded(computed):
    golden, _ = computed
    lengths = golden["input"]["attention_mask"].sum(1)
    assert lengths.max() > 2 * max(case["limit"] for case in CASES.values()) + 1
    assert lengths.min() < lengths.max()


def test_outputs(computed):
    golden, results = computed
    check_outputs(results, golden["output"], golden["input"]["attention_mask"])


def test_gradients(computed):
    golden, results = computed
    check_gradients(results.gradients, to_ours(golden["gradient"], "nezha", layers=2))
