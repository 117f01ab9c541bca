"""`python -m zoo compare`: cells, what is equal between them, what is said of those that refuse or fail."""

import csv
import io
import json

import chex
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from matplotlib.image import imread

import train as training
from zoo.__main__ import main
from zoo.commands.compare import Comparison, unigram_loss
from zoo.commands.compare_report import Cell, as_csv, lines_of, markdown, picture, read, table
from zoo.errors import UserError
from zoo.run import assemble

TINY = dict(model_dim=16, num_heads=2, num_layers=1, max_length=16, unroll=1)
SETTINGS = {
    **{f"model.{name}": value for name, value in TINY.items()},
    "feed_forward": "gelu:width=16",
    "task.max_length": 16,
    "tokenizer.size": 120,
    "train.steps": 2,
    "train.log_every": 1,
    "train.batch_size": 8,
}


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for split, lines in (("train", 60), ("dev", 30)):
        text = "\n".join(f"The {k} owls saw {k % 7} mice . Did they sleep ? No !" for k in range(lines))
        (folder / f"{split}.txt").write_text(text)
    return {**SETTINGS, **{f"data.{split}": folder / f"{split}.txt" for split in ("train", "dev")}}


@pytest.fixture(scope="module")
def compared(overrides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")

    def run(*flags):
        values = [f"--config.{name}={value}" for name, value in overrides.items()]
        return main(["compare", f"--workdir={folder}", "--lengths=1,4", "--tokens=128", *flags, *values])

    run("--objectives=causal_lm", "--encodings=learned,bipe_rope")
    return folder, run


def test_cells_are_run_once_and_scored_beyond_their_length(compared, capsys):
    folder, run = compared
    rows = read(folder / "results.jsonl")
    assert [row["cell"]["encoding"] for row in rows] == ["learned", "bipe_rope"]
    learned, sentences = (row["losses"] for row in rows)
    assert set(learned) == set(sentences) == {"16", "64"}
    assert isinstance(learned["16"], float) and isinstance(sentences["64"], float)
    assert "has max_length=16 positions" in learned["64"]
    assert rows[0]["tokens"] == 2 * 8 * 16 and rows[1]["parameters"] > rows[0]["parameters"] > 0
    before = (folder / "results.jsonl").read_bytes()
    run("--objectives=causal_lm", "--encodings=learned")
    assert (folder / "results.jsonl").read_bytes() == before
    assert "[1 of" not in capsys.readouterr().out
    assert "| learned |" in (folder / "causal_lm.md").read_text()
    assert imread(folder / "causal_lm.png").std() > 0.01


def test_an_objective_leaves_out_what_it_cannot_train_and_says_so(compared, capsys):
    _, run = compared
    with pytest.raises(UserError, match="no encoding is left"):
        run("--objectives=masked_lm", "--encodings=xpos")
    out = capsys.readouterr().out
    assert "left out of masked_lm" in out and "use a causal mask" in out
    with pytest.raises(UserError, match="did you mean 'rope'"):
        run("--encodings=roppe")
    with pytest.raises(UserError, match="--seeds takes integers"):
        run("--encodings=rope", "--seeds=a")


def test_cells_differ_in_the_encoding_alone(overrides, tmp_path):
    """The same batches, and the same parameters at the start where both have them."""
    comparison = Comparison("configs/compare.py", tuple((n, str(v)) for n, v in overrides.items()), tmp_path, (1,), 64)
    made = []
    for encoding in ("t5:bidirectional=False", "nezha"):
        parts = assemble(comparison._loaded(Cell("causal_lm", encoding, 3)), tmp_path / "shared")
        trainer = training.build_trainer(parts, tmp_path / "shared")
        made.append(
            (trainer.stages[0].pipeline.batch(1), flatten_dict(jax.device_get(training.initial(trainer).params)))
        )
    (one, first), (two, second) = made
    chex.assert_trees_all_equal(one, two)
    common = first.keys() & second.keys()
    assert len(common) == len(second) < len(first)
    chex.assert_trees_all_equal({k: first[k] for k in common}, {k: second[k] for k in common})


def finished(encoding, losses, *, seed=0, speed=1.0, objective="causal_lm", **more):
    measured = dict(parameters=100, relative_speed=speed, program_bytes=2**20, unigram_loss=6.0)
    losses = {str(n): loss for n, loss in losses.items()}
    return {"cell": dict(objective=objective, encoding=encoding, seed=seed), "losses": losses, **measured, **more}


def test_the_report_ranks_by_the_longest_rows_and_marks_what_failed():
    rows = [
        finished("none", {8: 4.5, 16: 4.6}),
        finished("learned", {8: 4.0, 16: "too long, says learned"}),
        finished("rope", {8: 3.9, 16: 5.0}, speed=0.8),
        finished("alibi", {8: 4.1, 16: 4.0}, seed=0),
        finished("alibi", {8: 4.3, 16: 4.2}, seed=1),
        finished("tupe", {8: 5.5, 16: 5.5}),
        {"cell": dict(objective="causal_lm", encoding="fire", seed=0), "failed": "the loss is not finite"},
        finished("t5", {8: 1.0}, objective="masked_lm"),
    ]
    lines = lines_of(rows, "causal_lm")
    assert [line.encoding for line in lines] == ["alibi", "none", "rope", "learned", "tupe", "fire"]
    header, cells = table(lines)
    assert dict(zip(header, cells[0], strict=True)) == {
        "encoding": "alibi",
        "seeds": "2",
        "parameters": "100",
        "speed": "1.00",
        "MiB": "1.0",
        "learnt": "1.70",
        "8": "4.200 [4.100, 4.300]",
        "16": "4.100 [4.000, 4.200]",
        "": "",
    }
    assert cells[2][3] == "0.80" and cells[3][-2] == "–"
    assert cells[4][-1] == "failed: learnt too little" and cells[5][-1] == "failed: the loss is not finite"
    assert len(markdown(lines).splitlines()) == 2 + 6
    written = list(csv.DictReader(io.StringIO(as_csv(rows, "causal_lm").decode())))
    assert len(written) == 2 * 6 + 1
    assert {row["refused"] for row in written} == {"", "too long, says learned"}


def test_a_task_that_is_no_text_is_reported_by_accuracy():
    rows = [
        finished("rope", {8: 0.1, 16: 2.0}, unigram_loss=None, accuracies={"8": 1.0, "16": 0.5}),
        finished("path", {8: 0.2, 16: 3.0}, unigram_loss=None, accuracies={"8": 0.9, "16": 0.8}),
        finished("learned", {8: 0.1, 16: "too long"}, unigram_loss=None, accuracies={"8": 1.0}),
    ]
    lines = lines_of(rows, "causal_lm")
    assert [line.encoding for line in lines] == ["path", "rope", "learned"]
    assert lines[0].values == {8: (0.9,), 16: (0.8,)} and lines[2].values[16] == ()
    assert {line.note for line in lines} == {""}
    assert imread(io.BytesIO(picture(lines))).std() > 0.01


def test_unigram_loss_adds_one_to_each_count():
    train = [{"input_ids": np.array([0, 0, 2, 9]), "segment_ids": np.array([1, 1, 1, 0])}]
    held_out = [{"input_ids": np.array([0, 1]), "segment_ids": np.array([1, 1])}]
    expected = -(np.log(3 / 13) + np.log(1 / 13)) / 2  # counts 3, 1, 2 and seven of 1
    assert unigram_loss(train, held_out, 10) == pytest.approx(expected)


def test_a_damaged_line_of_results_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(finished("none", {8: 1.0})) + '\n{"cell": {"objective": 1}}\n')
    with pytest.raises(UserError, match=r"results\.jsonl:2: not a finished cell"):
        read(path)
