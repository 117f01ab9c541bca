"""Training in float16 with a dynamic loss scale, beside the same in float32."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

import train
from tests.small_runs import config, use_devices, write_texts
from zoo.data.pipeline import Pipeline
from zoo.run import assemble
from zoo.training.records import METRICS, read_records
from zoo.training.sharding import put_batch
from zoo.training.step import initial_state

WITHOUT_DROPOUT = {"model__dropout": 0.0, "model__attention_dropout": 0.0}
ENCODINGS = {
    "nezha": dict(name="nezha", limit=4),
    "t5": dict(name="t5", num_buckets=8, max_distance=16),
    "rope": dict(name="rope"),
    "alibi": dict(name="alibi"),
}
SCALE = 2.0**16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("sentences"))


def drawn(shapes: Any) -> Any:
    """Parameters none of which is idle: biases and tables too."""
    rng, flat = np.random.default_rng(0), flatten_dict(shapes)
    drawn = {path: (path[-1] == "scale") + 0.1 * rng.normal(size=leaf.shape) for path, leaf in flat.items()}
    return unflatten_dict({path: value.astype(np.float32) for path, value in drawn.items()})


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_loss_and_gradient_are_those_of_float32(encoding, folder, tmp_path):
    """To a few units of float16's 11 bits, in every tensor; bfloat16's are eight times as large."""
    losses, grads, params = {}, {}, None
    for dtype, scale in (("float32", 1.0), ("float16", SCALE)):
        made = config(folder, encoding=ENCODINGS[encoding], model__dtype=dtype, **WITHOUT_DROPOUT)
        parts = assemble(made, tmp_path)
        batch = Pipeline(parts.examples("train", tmp_path), parts.features, seed=0, batch_size=8).batch(0)
        if params is None:
            params = drawn(jax.eval_shape(parts.module.init, jax.random.key(0), batch)["params"])

        def scaled(params, batch, module=parts.module, scale=scale):
            total, weight = module.apply({"params": params}, batch, train=False).losses["masked_lm"]
            return scale * total / weight

        loss, grad = jax.jit(jax.value_and_grad(scaled))(params, batch)
        losses[dtype] = float(loss) / scale
        grads[dtype] = {name: np.asarray(leaf) / scale for name, leaf in flatten_dict(grad, sep="/").items()}
    assert losses["float16"] == pytest.approx(losses["float32"], rel=2**-11)
    assert losses["float16"] != losses["float32"]
    for name, exact in grads["float32"].items():
        # The gradient of a key's bias is zero but for rounding, where the encoding leaves keys as they are.
        off = np.linalg.norm(grads["float16"][name] - exact)
        assert off <= 2**-7 * np.linalg.norm(exact) + 1e-5 * name.endswith("key/bias"), name


class Curve(NamedTuple):
    loss: np.ndarray
    overflows: np.ndarray
    state: Any


def curve(made: ConfigDict, workdir: Path) -> Curve:
    trainer = train.build_trainer(assemble(made, workdir), workdir)
    scaling = trainer.settings.scaling(trainer.parts.config.model.dtype)
    state = initial_state(drawn(trainer.shapes.params), trainer.optimizer, scaling)
    state, said = jax.device_put(state, trainer.shardings), []
    for stage, batch in trainer.batches(0):
        state, metrics = stage.train_step(state, put_batch(batch, trainer.mesh))
        said.append((metrics["loss"], metrics.get("overflows", 0)))
    return Curve(*np.asarray(jax.device_get(said)).T, jax.device_get(state))


def in_float16(folder: Path, **changes: Any) -> ConfigDict:
    """Fifty steps whose scale doubles after 16 updates and 32, when it is too large."""
    scale = {"train__loss_scale": 2.0**15, "train__loss_scale_interval": 16}
    return config(
        folder, **{"model__dtype": "float16", "model__vocab_size": 64, "train__steps": 50, **scale, **changes}
    )


@pytest.fixture(scope="module")
def half(folder, tmp_path_factory) -> Curve:
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        return curve(in_float16(folder), tmp_path_factory.mktemp("half"))


def test_the_curve_is_that_of_float32(folder, half, tmp_path, monkeypatch):
    use_devices(monkeypatch, 1)
    wide = curve(config(folder, model__vocab_size=64, train__steps=50), tmp_path)
    clean = half.overflows == 0
    assert np.sum(clean) >= 32 and wide.loss[0] - wide.loss[32] > 1
    # An update's rounding is that of a mean over many products of 11 bits.
    np.testing.assert_allclose(half.loss[clean], wide.loss[clean], rtol=2**-11)
    np.testing.assert_allclose(half.loss[-1], wide.loss[-1], rtol=2**-7)  # with updates left out
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(half.state.params))


def test_eight_devices_draw_the_curve_of_one(folder, half, tmp_path, monkeypatch):
    use_devices(monkeypatch, 8)
    many = curve(in_float16(folder, mesh={"data": 2, "fsdp": 2, "tensor": 2}), tmp_path)
    assert int(half.state.extra["overflows"]) >= 1
    assert half.overflows.tolist() == many.overflows.tolist()
    np.testing.assert_allclose(many.loss, half.loss, rtol=2**-11)


def test_a_resumed_run_has_the_scale_of_an_unbroken_one(folder, tmp_path, monkeypatch):
    """Killed between a growth and the next, after a fall from a scale at which everything overflows."""
    use_devices(monkeypatch, 1)
    scale = {"train__loss_scale": 2.0**20, "train__loss_scale_interval": 4}
    every = {"train__checkpoint_every": 10, "data__dev": ()}
    made = in_float16(folder, model__num_layers=1, train__steps=20, **every, **scale)
    train.train(made, tmp_path / "unbroken")
    shutil.copytree(tmp_path / "unbroken", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000020")
    train.train(made, tmp_path / "run")
    assert (tmp_path / "run" / METRICS).read_bytes() == (tmp_path / "unbroken" / METRICS).read_bytes()
    lines = read_records(tmp_path / "run" / METRICS)
    scales, overflows = ([line[name] for line in lines] for name in ("loss_scale", "overflows"))
    assert scales[:4] == [2.0**20, 2.0**19, 2.0**18, 2.0**17] and 0 < overflows[9] < overflows[-1]
    assert any(later > earlier for earlier, later in itertools.pairwise(scales[10:])), "no growth after the stop"
    assert not list((tmp_path / "run").glob("nonfinite*")), "an overflow is no fault"
