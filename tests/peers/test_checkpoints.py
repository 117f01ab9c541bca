"""Every architecture against the source library at random weights: loaded, run, differentiated, exported and loaded there again.

Needs the extra `peers`: `make test-peers`. `tests.peers.measure_checkpoints` writes the same figures down.
"""

from __future__ import annotations

import pytest

import zoo
from zoo.config import difference
from zoo.interop.architectures import architecture

pytest.importorskip("torch", reason="needs the extra peers: make venv-peers")
transformers = pytest.importorskip("transformers", reason="needs the extra peers: make venv-peers")

from tests.peers import checkpoints, differences  # noqa: E402

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module", params=sorted(checkpoints.CASES))
def case(request, tmp_path_factory):
    """(the source's model, inputs and outputs; its directory; ours)."""
    made = checkpoints.make(checkpoints.CASES[request.param], seed=len(request.param))
    directory = tmp_path_factory.mktemp("checkpoint")
    made.model.save_pretrained(directory)
    return made, directory, zoo.load_pretrained(directory)


def test_outputs(case):
    made, _, ours = case
    assert differences.of_outputs(made, ours) < 1e-4


def test_gradients(case):
    made, _, ours = case
    assert differences.of_gradients(made, ours) < 1e-4


def test_exported_and_loaded_there(case, tmp_path):
    made, directory, ours = case
    assert differences.of_export(made, ours, directory, tmp_path / "exported") < 1e-6


@pytest.mark.parametrize(
    "name", sorted(name for name in checkpoints.CASES if "," not in name and "deberta" not in name)
)
def test_missing_keys_mean_what_they_mean_there(name):
    """DeBERTa's defaults are refused: they are of a model without relative positions."""
    theirs = getattr(transformers, checkpoints.CASES[name].config)
    family = architecture(theirs.model_type, "test")
    lines = difference(family.read({}, "nothing"), family.read(theirs().to_dict(), "all"))
    # None is the width of a head, and the number of key heads, that the others give.
    assert [line for line in lines if not line.startswith(("model.head_dim: None", "model.num_kv_heads: None"))] == []
