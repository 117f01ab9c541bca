"""A run in stages: 8 tokens, then 16, in one run that can be stopped anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

import eval as scoring
import train
from tests.small_runs import config, stop_in_turn, use_devices, write_texts
from zoo.config import load_saved
from zoo.errors import UserError
from zoo.run import assemble
from zoo.training.records import read_records

SHORT = dict(max_length=8, max_predictions=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("sentences"))


def staged(folder: Path, *stages: dict[str, Any], **changes: Any) -> ConfigDict:
    """Three steps of eight short rows, two of four long ones; a model of one layer."""
    stages = stages or (dict(steps=3, task=SHORT), dict(steps=2, batch_size=4))
    small = dict(model__num_layers=1, train__steps=None, train__evaluate_every=2, train__checkpoint_every=0)
    return config(folder, **{**small, "train__stages": stages, "task__max_predictions": 5, **changes})


@pytest.fixture(scope="module")
def unbroken(folder, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        train.train(staged(folder), workdir)
    return workdir


def test_stopped_in_both_stages_and_between_them_it_writes_the_bytes_of_an_unbroken_run(
    folder, unbroken, tmp_path, monkeypatch
):
    use_devices(monkeypatch, 1)
    workdir = tmp_path / "run"
    for turns, step in ((2, 2), (1, 3), (1, 4)):
        with monkeypatch.context() as patch, pytest.raises(train.Stopped, match=f"SIGTERM at step {step} of 5"):
            stop_in_turn(patch, turns)
            train.train(staged(folder), workdir)
    train.train(staged(folder), workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
    lines = read_records(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]


def test_the_whole_run_has_one_schedule_one_evaluation_and_says_its_stages(folder, unbroken):
    lines = read_records(unbroken / "metrics.jsonl")
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    np.testing.assert_allclose(rates, 0.05 * (1 - np.arange(5) / 5), rtol=1e-6)
    saved = load_saved(unbroken / "config.json")
    assert [stage["steps"] for stage in saved.train.stages] == [3, 2]
    # Scored on config.task: the rows are those of the second stage also while the first was trained.
    evaluations = [line for line in lines if "dev/loss" in line]
    assert [line["step"] for line in evaluations] == [2, 4, 5]
    assert scoring.score(unbroken, "dev")["loss"] == pytest.approx(evaluations[-1]["dev/loss"], rel=1e-5)


def test_each_stage_has_its_batches_and_goes_on_in_the_data(folder, tmp_path, monkeypatch):
    use_devices(monkeypatch, 1)
    made = staged(
        folder, dict(steps=3, task=SHORT), dict(steps=2, batch_size=4, accumulation=2), dict(steps=1, batch_size=2)
    )
    trainer = train.build_trainer(assemble(made, tmp_path), tmp_path)
    assert trainer.total_steps == 6
    assert [stage.tokens_per_step for stage in trainer.stages] == [8 * 8, 4 * 16, 2 * 16]
    found = list(trainer.batches(0))
    assert [batch["input_ids"].shape for _, batch in found] == [(8, 8)] * 3 + [(4, 16)] * 2 + [(2, 16)]
    assert [batch["masked_positions"].shape[1] for _, batch in found] == [3] * 3 + [5] * 3
    for step, (_, batch) in enumerate(found):
        np.testing.assert_array_equal(batch["example_index"], trainer.locate(step)[1])
    # Batch warm-up is stages of one task: no example comes again before its epoch is over.
    order = np.concatenate([trainer.stages[1].pipeline.batch(step)["example_index"] for step in (3, 4)])
    alone = train.Pipeline(
        trainer.parts.examples("train", tmp_path), trainer.parts.features, seed=0, batch_size=24 + 4 * 2 + 2
    ).batch(0)
    np.testing.assert_array_equal(order, alone["example_index"][24:32])
    np.testing.assert_array_equal(found[5][1]["input_ids"], alone["input_ids"][32:])
    for step in (2, 3, 5):
        resumed = list(trainer.batches(step))
        assert len(resumed) == 6 - step
        np.testing.assert_array_equal(resumed[0][1]["input_ids"], found[step][1]["input_ids"])


def test_a_batch_of_a_later_stage_that_does_not_fit_is_found_before_the_first_step(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "loop", lambda *args: pytest.fail("training began"))
    made = staged(folder, dict(steps=3, task=SHORT), dict(steps=2, batch_size=4))
    with pytest.raises(UserError, match=r"batch of 4 rows .*choose a multiple of 8"):
        train.train(made, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (dict(max_length=32), r"train.stages\[1\].task.max_length=32 is longer than model.max_length=16"),
        (dict(max_lenght=8), r"train.stages\[1\]: .*'max_lenght'; did you mean 'max_length'"),
        (dict(max_predictions=17), r"train.stages\[1\]: .*max_predictions must be 1 to 16, not 17"),
    ],
    ids=str,
)
def test_a_wrong_value_is_found_before_the_data_is_prepared(task, message, folder, tmp_path):
    with pytest.raises(UserError, match=message):
        assemble(staged(folder, dict(steps=3, task=SHORT), dict(steps=2, task=task)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_stage_cannot_have_another_head(folder, tmp_path):
    made = config(
        folder,
        "token_tagging",
        train__steps=2,
        train__stages=(dict(steps=1), dict(steps=1, task=dict(labels=("O", "B-PET", "I-PET")))),
    )
    with pytest.raises(UserError, match=r"train.stages\[1\].task makes other parameters than the first stage"):
        train.build_trainer(assemble(made, tmp_path), tmp_path)
