"""A run of ours through `load_pretrained`: its head reads what it was trained on, or is refused."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop import small_checkpoints
from zoo.errors import UserError
from zoo.interop.export import export
from zoo.interop.load import load_pretrained
from zoo.interop.pretrained import Head, Pretrained
from zoo.interop.run_folder import save_run_folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Pretrained:
    width = small_checkpoints.WIDTH
    tensors = small_checkpoints.weights()
    tensors |= {
        "bert.pooler.dense.weight": np.eye(width, dtype=np.float32),
        "bert.pooler.dense.bias": np.zeros(width, "f4"),
    }
    return load_pretrained(small_checkpoints.write(tmp_path_factory.mktemp("bert"), tensors), heads=False)


def run(bert: Pretrained, folder, name: str, outputs: int, **task):
    """The folder of a run of this task, whose head has so many outputs."""
    output = {"kernel": np.ones((small_checkpoints.WIDTH, outputs), np.float32), "bias": np.zeros(outputs, np.float32)}
    params = {**bert.params, "heads": {name: {"output": output}}}
    save_run_folder(dataclasses.replace(bert, params=params, heads=(Head(name, classes=outputs),)), folder)
    saved = json.loads((folder / "config.json").read_text())
    saved["config"]["task"] = {"name": name, **task}
    (folder / "config.json").write_text(json.dumps(saved))
    return folder


@pytest.mark.parametrize(("name", "outputs"), [("classification", 3), ("regression", 1)])
def test_heads_over_the_pooled_output(name, outputs, bert, tmp_path):
    loaded = load_pretrained(run(bert, tmp_path / "run", name, outputs))
    ids = jnp.ones((2, 5), jnp.int32)
    shapes = jax.eval_shape(lambda: loaded.module.apply({"params": loaded.params}, ids, ids, None))
    assert shapes.logits.shape == (2, outputs)
    described = json.loads((export(loaded, tmp_path / "exported") / "config.json").read_text())
    assert described["architectures"] == ["BertForSequenceClassification"]
    assert described.get("problem_type") == ("regression" if outputs == 1 else None)


def test_a_head_over_the_mean_is_no_checkpoints(bert, tmp_path):
    """No class of the source library pools so: exported, the head would read another vector in silence."""
    folder = run(bert, tmp_path / "run", "regression", 1, pooling="mean")
    with pytest.raises(UserError, match=r"this run of 'regression' reads the mean over the tokens.*heads=False"):
        load_pretrained(folder)
    encoder = load_pretrained(folder, heads=False)
    assert encoder.heads == () and "heads" not in encoder.params
    jax.tree.map(np.testing.assert_array_equal, encoder.params["model"], bert.params["model"])
