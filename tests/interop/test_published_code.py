"""NeoBERT and MosaicBERT, which no library has, against what their published code computes (`published_code.py`)."""

from __future__ import annotations

import json

import numpy as np
import pytest

import zoo
from tests.interop import published_code
from tests.interop.published_models import CONFIGS, MODELS, REAL, published
from zoo.errors import UserError
from zoo.interop.weights import open_weights


@pytest.mark.parametrize("name", sorted(MODELS))
def test_as_the_published_code_computes_it_and_exported_as_it_was(name, tmp_path):
    made = published(name)
    made.write(tmp_path)
    ours = zoo.load_pretrained(tmp_path)
    found = ours.apply(**made.inputs)
    for output, expected in made.compute(made.tensors).items():
        array = np.asarray(getattr(found, output))
        assert array.shape == expected.shape and np.abs(expected).max() > 0.3
        by_token = array.shape[:2] == REAL.shape
        array, expected = (array[REAL > 0], expected[REAL > 0]) if by_token else (array, expected)
        np.testing.assert_allclose(array, expected, rtol=0, atol=2e-5, err_msg=output)

    exported = zoo.export(ours, tmp_path / "exported")
    with open_weights(exported) as weights:
        assert set(weights.names()) == set(made.tensors)
        for tensor in weights.names():
            np.testing.assert_array_equal(weights.read(tensor), made.tensors[tensor], err_msg=tensor)
    config = json.loads((exported / "config.json").read_text())
    assert {key for key in config if key in made.config and config[key] != made.config[key]} == set()


def test_the_slopes_of_twelve_heads():
    expected = [*2.0 ** -np.arange(1.0, 9), *2.0 ** -np.array([0.5, 1.5, 2.5, 3.5])]
    np.testing.assert_allclose(published_code.slopes(12), expected)


def test_mosaicbert_under_the_name_of_bert_is_told_its_own(tmp_path):
    config = CONFIGS["mosaicbert"] | {"model_type": "bert", "auto_map": {"AutoConfig": "configuration_bert.BertConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"never run\. .*MosaicBERT.*model_type to 'mosaicbert'"):
        zoo.load_pretrained(tmp_path)
    del config["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"MosaicBERT.*model_type to 'mosaicbert'"):
        zoo.load_pretrained(tmp_path)
