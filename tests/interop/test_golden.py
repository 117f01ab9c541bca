"""Every family against what its source library computed once at random weights (`tests/peers/make_checkpoint_goldens.py`)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import zoo
from zoo.interop.architectures import ARCHITECTURES
from zoo.interop.weights import open_weights, write_weights

GOLDEN = {path.stem: path for path in sorted((Path(__file__).parent / "golden").glob("*.npz"))}
# Families whose source is not transformers 5, compared elsewhere in this folder.
IN_FILES_OF_THEIR_OWN = {"nezha", "neobert", "mosaicbert"}
# At padding nobody reads what is computed, and libraries differ.
BY_TOKEN = ("hidden", "logits")


@pytest.fixture(scope="module", params=sorted(GOLDEN))
def golden(request, tmp_path_factory):
    """(the file's arrays, what we make of the directory they describe)."""
    with np.load(GOLDEN[request.param], allow_pickle=False) as file:
        arrays = dict(file)
    directory = tmp_path_factory.mktemp("checkpoint")
    (directory / "config.json").write_bytes(arrays["config.json"].tobytes())
    write_weights(directory, part(arrays, "weight/"))
    return arrays, zoo.load_pretrained(directory)


def part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def test_outputs(golden):
    arrays, ours = golden
    inputs = part(arrays, "input/")
    real = inputs["attention_mask"] > 0
    found = ours.apply(**inputs)
    for name, expected in part(arrays, "output/").items():
        array = np.asarray(getattr(found, name))
        assert array.shape == expected.shape, name
        if name in BY_TOKEN and array.shape[:2] == real.shape:
            array, expected = array[real], expected[real]
        assert np.abs(expected).max() > 0.1, name
        np.testing.assert_allclose(array, expected, rtol=0, atol=5e-5, err_msg=name)


def test_the_export_is_the_same_tensor_by_tensor(golden, tmp_path):
    arrays, ours = golden
    weights = part(arrays, "weight/")
    tied = ARCHITECTURES[ours.architecture].tied
    with open_weights(zoo.export(ours, tmp_path / "exported")) as again:
        assert set(again.names()) <= set(weights)
        # What is tied, or made anew, is not written.
        assert {name for name in weights if name not in again.names()} <= {*tied, *ours_ignores(ours, weights)}
        for name in again.names():
            np.testing.assert_array_equal(again.read(name), weights[name], err_msg=name)


def ours_ignores(ours, weights: dict[str, np.ndarray]) -> set[str]:
    patterns = ARCHITECTURES[ours.architecture].ignored
    return {name for name in weights if any(re.fullmatch(pattern, name) for pattern in patterns)}


def test_every_family_has_a_golden_file():
    assert set(GOLDEN) | IN_FILES_OF_THEIR_OWN == set(ARCHITECTURES)
