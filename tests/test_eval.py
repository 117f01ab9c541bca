"""eval.py on a finished run: the trainer's scores again, from the folder alone; and what it refuses."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

import eval as scoring
import train
from tests.faults import tiny
from tests.faults.corpus import write_corpus
from zoo.command_line import MISTAKE, run_main
from zoo.config import load_config
from zoo.data.pipeline import evaluation_batches
from zoo.run import CHECKPOINTS, assemble
from zoo.training.records import read_records

DEV = 10  # examples; batches of 8, so that the last is partly filled


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = write_corpus(tmp_path_factory.mktemp("eval") / "corpus", documents=8 * DEV)
    (folder / "test.tsv").write_text("one two three\todd\nbig cat\teven\nred red red\todd\n")
    return folder


def config(corpus: Path, task: str, *overrides: tuple[str, Any]) -> ConfigDict:
    return load_config(f"{tiny.__file__}:{task},folder={corpus}", [(name, str(value)) for name, value in overrides])


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> tuple[ConfigDict, Path, dict[str, float]]:
    """A finished run of six steps, evaluated and saved at every second."""
    every = [(f"train.{what}", 2) for what in ("evaluate_every", "checkpoint_every", "log_every")]
    made = config(
        corpus,
        "classification",
        ("data.test", f"('{corpus / 'test.tsv'}',)"),
        ("train.steps", 6),
        ("optimizer.learning_rate", 0.05),
        *every,
    )
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return made, workdir, train.train(made, workdir)


@pytest.fixture
def command(capsys):
    """A function that runs eval.py with arguments and returns (exit code, what it printed, its error)."""
    handlers = logging.root.handlers[:]

    def call(*argv: str) -> tuple[int, str, str]:
        code = run_main(scoring.main, list(argv))
        return code, *capsys.readouterr()

    yield call
    logging.root.handlers[:] = handlers  # eval.main has put its own in their place


def test_the_dev_scores_are_those_the_trainer_recorded(run, command):
    _, workdir, scores = run
    code, printed, _ = command(f"--workdir={workdir}")
    assert code == 0
    assert printed.splitlines() == [f"dev {name} {value:.4f}" for name, value in scores.items()]
    report = json.loads((workdir / "scores_dev.json").read_text())
    assert report == {"step": 6, "split": "dev", "examples": DEV, "scores": scores}
    recorded = read_records(workdir / "metrics.jsonl")[-1]
    assert (
        recorded["step"] == 6 and {f"dev/{name}": value for name, value in scores.items()}.items() <= recorded.items()
    )


def test_an_earlier_checkpoint_has_the_scores_of_its_step(run, command):
    _, workdir, _ = run
    assert command(f"--workdir={workdir}", "--step=4")[0] == 0
    report = json.loads((workdir / "scores_dev.json").read_text())
    (recorded,) = [r for r in read_records(workdir / "metrics.jsonl") if r["step"] == 4 and "dev/accuracy" in r]
    assert report["step"] == 4
    assert {f"dev/{name}": value for name, value in report["scores"].items()}.items() <= recorded.items()


def test_another_split(run, command):
    """Fewer examples than a batch."""
    _, workdir, _ = run
    code, printed, _ = command(f"--workdir={workdir}", "--split=test")
    assert code == 0 and printed.startswith("test accuracy 0.")
    report = json.loads((workdir / "scores_test.json").read_text())
    assert (report["split"], report["examples"]) == ("test", 3)
    assert 3 * report["scores"]["accuracy"] == pytest.approx(round(3 * report["scores"]["accuracy"]))


def test_other_devices_give_the_same_scores(run, command):
    """The folder says 8 devices in a row; a machine with other ones must not need another run."""
    _, workdir, scores = run
    place = "--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.train.evaluation_batch_size=16"
    code, printed, _ = command(f"--workdir={workdir}", *place)
    assert code == 0
    assert printed.splitlines() == [f"dev {name} {value:.4f}" for name, value in scores.items()]


def test_what_is_refused(run, command, tmp_path):
    _, workdir, _ = run
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}

    def said(*argv: str) -> str:
        code, printed, error = command(*argv)
        assert code == MISTAKE and not printed and error.startswith("error: ") and "Traceback" not in error
        return error

    assert "no split 'tets'; did you mean 'test'? (known: dev, test, train)" in said(
        f"--workdir={workdir}", "--split=tets"
    )
    assert "there is no checkpoint of step 5" in (late := said(f"--workdir={workdir}", "--step=5")) and "6, 4" in late
    assert "unknown flag --spilt; did you mean '--split'" in said(f"--workdir={workdir}", "--spilt=dev")
    assert "--workdir" in said("--split=dev")
    assert "config.seed would make it another run" in said(f"--workdir={workdir}", "--config.seed=1")
    assert "does not fit 8 devices" in said(f"--workdir={workdir}", "--config.mesh.data=3")
    assert "batch of 6 rows" in said(f"--workdir={workdir}", "--config.train.evaluation_batch_size=6")
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert f"{folder} is not a run folder: it has no config.json" in said(f"--workdir={folder}")
    begun = tmp_path / "begun"
    shutil.copytree(workdir, begun, ignore=shutil.ignore_patterns(CHECKPOINTS))
    assert f"the run in {begun} has no checkpoint yet" in said(f"--workdir={begun}")
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_the_command_of_a_finished_run_does_nothing_again(run, monkeypatch):
    made, workdir, scores = run
    before = {path: path.read_bytes() for path in workdir.glob("*.json*")}
    monkeypatch.setattr(train, "with_compiled_steps", lambda trainer: pytest.fail("compiled for nothing"))
    assert train.train(made, workdir) == scores
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("task", ["classification", "token_tagging", "masked_lm"])
def test_a_partly_filled_last_batch_changes_nothing(task, corpus, tmp_path, monkeypatch):
    """Eleven rows as 8 + 3 and as one batch of 24 (13 of them padding): the same predictions and scores."""
    labels = [("task.labels", "('even', 'odd', 'a', 'b', 'c', 'd')")] if task == "classification" else []
    parts = assemble(config(corpus, task, *labels), tmp_path)
    rows = parts.examples("train", tmp_path)
    examples = [rows[k] for k in range(11)]
    batch = next(evaluation_batches(examples, parts.features, batch_size=1))
    shapes = jax.eval_shape(parts.module.init, jax.random.key(0), batch)["params"]
    rng = np.random.default_rng(2)
    # Without biases, which would give every row the same class.
    centre = {"bias": (0.0, 0.0), "scale": (1.0, 0.0)}
    drawn = {n: rng.normal(*centre.get(n[-1], (0.0, 0.3)), leaf.shape) for n, leaf in flatten_dict(shapes).items()}
    params = unflatten_dict({name: value.astype(np.float32) for name, value in drawn.items()})
    kept = []
    score = type(parts.task).score

    def keep(self, predictions, examples):
        kept.append(predictions)
        return score(self, predictions, examples)

    monkeypatch.setattr(type(parts.task), "score", keep)
    found = []
    for size in (8, 24):
        evaluation = train.build_evaluation(parts, params)._replace(batch_size=size)
        found.append(train.evaluate(evaluation, params, examples))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    several, one = kept
    for name in several:
        assert len(several[name]) == 11
        np.testing.assert_allclose(several[name], one[name], rtol=1e-4)
    assert any(len(np.unique(rows, axis=0)) > 1 for rows in one.values()), "rows all alike say nothing of their order"
