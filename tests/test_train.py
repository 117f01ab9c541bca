"""train.py as a whole, in one process: devices, micro-batches, dtypes, depth, and that it learns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

import eval as scoring
import train
from tests.small_runs import config, use_devices, write_texts
from zoo.errors import UserError
from zoo.models.parameters import has_layer_axis
from zoo.run import assemble
from zoo.training import flops
from zoo.training.records import read_records
from zoo.training.sharding import put_batch
from zoo.training.step import initial_state

WITHOUT_DROPOUT = {"model__dropout": 0.0, "model__attention_dropout": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("sentences"))


class Curve(NamedTuple):
    """What each step said, and the parameters before the first and after the last."""

    loss: np.ndarray
    grad_norm: np.ndarray
    start: Any
    params: Any


def curve(made: ConfigDict, workdir: Path, steps: int = 6, params: Any = None) -> Curve:
    """The first steps of a run, from `params` or from the run's own."""
    trainer = train.build_trainer(assemble(made, workdir), workdir)
    state = train.initial(trainer) if params is None else initial_state(params, trainer.optimizer)
    state, (stage,) = jax.device_put(state, trainer.shardings), trainer.stages
    start, said = jax.device_get(state.params), []
    for step in range(steps):
        state, metrics = stage.train_step(state, put_batch(stage.pipeline.batch(step), trainer.mesh))
        said.append(metrics)
    loss, grad_norm = (
        np.asarray(jax.device_get([metrics[name] for metrics in said])) for name in ("loss", "grad_norm")
    )
    return Curve(loss, grad_norm, start, jax.device_get(state.params))


# --- the same numbers in other ways


@pytest.fixture(scope="module")
def one_device(folder, tmp_path_factory) -> Curve:
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        found = curve(config(folder, model__vocab_size=64), tmp_path_factory.mktemp("one"))
    assert found.loss[0] - found.loss[-1] > 0.3, "a curve that does not move would be drawn by any program"
    return found


def assert_same_curve(found: Curve, expected: Curve, rtol: float) -> None:
    np.testing.assert_allclose(found.loss, expected.loss, rtol=rtol)
    # LAMB does not see the scale of a gradient; this does.
    np.testing.assert_allclose(found.grad_norm, expected.grad_norm, rtol=10 * rtol)


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_eight_devices_draw_the_curve_of_one(mesh, folder, tmp_path, one_device, monkeypatch):
    """Dropout and masks included: neither depends on the number of devices."""
    use_devices(monkeypatch, 8)
    many = curve(config(folder, mesh=mesh, model__vocab_size=64), tmp_path)
    assert_same_curve(many, one_device, rtol=2e-5)


def test_recomputing_changes_no_step(folder, tmp_path, one_device, monkeypatch):
    use_devices(monkeypatch, 1)
    again = curve(config(folder, model__remat="full", model__vocab_size=64), tmp_path, params=one_device.start)
    assert_same_curve(again, one_device, rtol=2e-5)


def test_bfloat16_follows_float32_and_keeps_float32_parameters(folder, tmp_path, one_device, monkeypatch):
    use_devices(monkeypatch, 1)
    made = config(folder, model__dtype="bfloat16", model__vocab_size=64)
    low = curve(made, tmp_path, params=one_device.start)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(low.params))
    # 8 significant bits; the curve falls by a multiple of this.
    np.testing.assert_allclose(low.loss, one_device.loss, rtol=2**-7)
    assert not np.array_equal(low.loss, one_device.loss)


@pytest.fixture(scope="module")
def uneven(folder, tmp_path_factory) -> Curve:
    """Parameters whose second layer is three times the first, and two steps from there without dropout."""
    made, workdir = config(folder, **WITHOUT_DROPOUT), tmp_path_factory.mktemp("uneven")
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        shapes = flatten_dict(train.build_trainer(assemble(made, workdir), workdir).shapes.params)
        rng = np.random.default_rng(0)
        flat = {path: (path[-1] == "scale") + 0.1 * rng.normal(size=leaf.shape) for path, leaf in shapes.items()}
        for path in filter(has_layer_axis, flat):
            flat[path][1] *= 3
        params = unflatten_dict({path: value.astype(np.float32) for path, value in flat.items()})
        return curve(made, workdir, steps=2, params=params)


def assert_moved_alike(found: Mapping[str, Any], expected: Mapping[str, Any], start: Mapping[str, Any]) -> None:
    """Every tensor moved to the same place: to 1e-6 of its size, and to 1 % of the way it went."""
    found, expected, start = (flatten_dict(tree, sep="/") for tree in (found, expected, start))
    assert found.keys() == expected.keys()
    for name in expected:
        if name.endswith("key/bias"):
            continue  # it adds the same to all logits of a row: its gradient is rounding, which Adam blows up
        off, went = np.linalg.norm(found[name] - expected[name]), np.linalg.norm(expected[name] - start[name])
        assert off <= 1e-6 * np.linalg.norm(expected[name]), name
        assert off <= 1e-2 * went, name


def test_micro_batches_equal_the_big_batch(folder, tmp_path, uneven, monkeypatch):
    use_devices(monkeypatch, 1)
    made = config(folder, train__accumulation=4, **WITHOUT_DROPOUT)
    parts = curve(made, tmp_path, steps=2, params=uneven.start)
    np.testing.assert_allclose(parts.loss, uneven.loss, rtol=1e-6)
    assert_moved_alike(parts.params, uneven.params, uneven.start)


def test_lamb_adapts_every_layer_and_tensor_also_under_scan(folder, tmp_path, uneven, monkeypatch):
    """Two steps of the scanned model equal two of the same model written out layer by layer."""
    use_devices(monkeypatch, 1)
    start, scanned = uneven.start, uneven.params
    unrolled = config(folder, model__stages=({"pattern": ({},)}, {"pattern": ({},)}), **WITHOUT_DROPOUT)
    apart = {name: value for name, value in start["model"].items() if name != "stage_0"}
    apart |= {f"stage_{k}": jax.tree.map(lambda a, k=k: a[k : k + 1], start["model"]["stage_0"]) for k in range(2)}
    params = curve(unrolled, tmp_path, steps=2, params={**start, "model": apart}).params["model"]
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), params.pop("stage_0"), params.pop("stage_1"))
    assert_moved_alike({**params, "stage_0": joined}, scanned["model"], start["model"])


# --- it learns, and what a run is


@pytest.mark.parametrize("task", ["masked_lm", "classification", "token_tagging"])
def test_it_learns_by_heart_and_eval_agrees_with_the_trainer(task, folder, tmp_path, monkeypatch):
    """A run of every task; the scores recorded are those that eval.py finds in the folder."""
    use_devices(monkeypatch, 8 if task == "token_tagging" else 1)
    adamw = {"optimizer": {"name": "adamw", "learning_rate": 1e-2}, **WITHOUT_DROPOUT}
    made = config(folder, task, "by_heart.txt", train__steps=150, train__log_every=50, **adamw)
    workdir = tmp_path / "run"
    scores = train.train(made, workdir)
    if task == "masked_lm":
        assert scores["perplexity"] < 1.6, "who does not look at the other words has 8"
    else:
        assert scores["accuracy" if task == "classification" else "f1"] > 0.95
    lines = read_records(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [50, 100, 150]
    assert {f"dev/{name}": value for name, value in scores.items()}.items() <= lines[-1].items()
    assert scoring.score(workdir, "dev") == pytest.approx(scores, rel=1e-5)
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_an_evaluation_batch_that_does_not_fit_is_found_before_the_first_step(folder, tmp_path, monkeypatch):
    """Not when the first evaluation is due, which may be hours later."""
    monkeypatch.setattr(train, "loop", lambda *args: pytest.fail("training began"))
    use_devices(monkeypatch, 8)
    with pytest.raises(UserError, match="batch of 6 rows"):
        train.train(config(folder, "classification", train__evaluation_batch_size=6), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(("epochs", "steps"), [(2.5, 5), (0.01, 1), (3.0, 6)])
def test_epochs_are_counted_in_steps(folder, tmp_path, epochs, steps):
    made = config(folder, "classification", train__steps=None, train__epochs=epochs)
    trainer = train.build_trainer(assemble(made, tmp_path), tmp_path)
    assert trainer.total_steps == steps  # 16 examples, batches of 8
    seen = np.concatenate([trainer.stages[0].pipeline.locate(step)[1] for step in range(2)])
    assert sorted(seen) == list(range(16)), "an epoch shows every example once"


def test_a_resumed_run_sees_the_batches_it_would_have_seen(folder, tmp_path):
    pipeline = train.build_trainer(assemble(config(folder), tmp_path), tmp_path).stages[0].pipeline
    unbroken = [batch for (_, batch), _ in zip(pipeline.iterate(0), range(5), strict=False)]
    resumed = [batch for (_, batch), _ in zip(pipeline.iterate(3), range(2), strict=False)]
    for step, one, two in zip((3, 4), unbroken[3:], resumed, strict=True):
        chex.assert_trees_all_equal(one, two)
        np.testing.assert_array_equal(two["example_index"], pipeline.locate(step)[1])
    assert not np.array_equal(unbroken[3]["input_ids"], unbroken[4]["input_ids"])


def test_timing_holds_utilisation_and_goodput(folder, tmp_path, monkeypatch):
    """The CPU is said to have a peak far above this model's need: a utilisation that is small but there."""
    monkeypatch.setitem(flops.PEAKS, "cpu", 1e15)
    use_devices(monkeypatch, 1)
    made = config(folder, train__steps=4)
    train.train(made, tmp_path)
    lines = read_records(tmp_path / "timing.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(0 < line["mfu"] < 1 and 0 < line["goodput"] < 1 for line in lines)

    def flops_of(made):
        (stage,) = train.build_trainer(assemble(made, tmp_path), tmp_path).stages
        return stage.flops_per_step

    assert flops_of(config(folder, train__batch_size=16)) == 2 * flops_of(made) > 0
    # A kernel that runs on a GPU alone is counted by what it computes.
    fused = config(folder, mixer__implementation="pallas_gpu", model__dtype="bfloat16")
    assert flops_of(fused) == flops_of(made)
