"""A loss that is not finite: stopped at or skipped, as the config says, and the batch written down."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict

import train
from tests.faults.corpus import POISON, is_poisoned
from tests.faults.process import Launcher, flat_state
from zoo.config import load_saved
from zoo.run import CONFIG, assemble


@pytest.fixture(scope="module")
def poisonous(launcher, tmp_path_factory):
    corpus = tmp_path_factory.mktemp("poisoned") / "corpus"
    shutil.copytree(launcher.corpus, corpus)
    with (corpus / "train.txt").open("a") as file:
        file.write(POISON + "\n")
    return Launcher(corpus, launcher.cache)


def test_the_run_stops_with_its_own_code_and_goes_on_when_told_to_skip(poisonous, tmp_path):
    workdir = tmp_path / "run"
    argv = poisonous.argv(workdir, "--config.train.steps=40", "--config.train.checkpoint_every=1", config="poisoned.py")
    code, printed = poisonous.run(argv)
    assert code == train.NONFINITE_EXIT_CODE and "Traceback" not in printed, printed
    (report,) = workdir.glob("nonfinite_step_*.json")
    assert str(report) in printed and "--config.train.nonfinite=skip" in printed
    bad = assert_reports_the_poison(workdir, report)
    state = flat_state(workdir)
    assert state["step"] == bad - 1 and all_finite(state)

    code, printed = poisonous.run([*argv, "--config.train.nonfinite=skip"])
    assert code == 0 and f"step {bad} is not finite and was skipped" in printed, printed
    reports = sorted(workdir.glob("nonfinite_step_*.json"))
    assert report in reports
    for path in reports:
        assert_reports_the_poison(workdir, path)
    state = flat_state(workdir)
    assert state["step"] == 40 and state["extra/skipped"] == len(reports) and all_finite(state)
    assert load_saved(workdir / CONFIG).train.nonfinite == "skip"


def test_a_learning_rate_that_overflows_stops_the_run_before_it_is_applied(launcher, tmp_path):
    workdir = tmp_path / "run"
    rate = ("--config.optimizer.learning_rate=1e39", "--config.schedule=constant", "--config.train.log_every=1")
    code, printed = launcher.run(launcher.argv(workdir, *rate))
    assert code == train.NONFINITE_EXIT_CODE and "Traceback" not in printed, printed
    assert "Lower the learning rate" in printed and len(list(workdir.glob("nonfinite_step_*.json"))) == 1
    assert not (workdir / "checkpoints").exists()


def assert_reports_the_poison(workdir, path) -> int:
    """The report names a batch that holds a poisoned row; returns its step."""
    report = json.loads(path.read_text())
    assert len(report["example_indices"]) == len(report["epochs"]) == 8
    config = load_saved(workdir / CONFIG).to_dict()
    config["task"]["name"] = "masked_lm"  # the poisoned task is known to the process alone
    examples = assemble(ConfigDict(config), workdir).examples("train", workdir)
    places = zip(report["epochs"], report["example_indices"], strict=True)
    rows = [examples.at_epoch(epoch)[index]["input_ids"] for epoch, index in places]
    assert any(map(is_poisoned, rows))
    return report["step"]


def all_finite(state) -> bool:
    return all(np.isfinite(value).all() for value in state.values())
