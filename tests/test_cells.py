"""Benchmarks that run cell by cell: nothing finished is run again, and a row says what was run."""

from pathlib import Path

import pytest

from benchmarks import cells, minilm
from zoo.command_line import split_overrides
from zoo.config import difference, load_config
from zoo.data import registry as sources
from zoo.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
GLUE = ROOT.parent / "shared" / "data" / "glue"


@pytest.fixture
def data(tmp_path):
    for task in minilm.TASKS.values():
        (tmp_path / "glue" / task.folder).mkdir(parents=True)
        (tmp_path / "glue" / task.folder / "train.tsv.xz").touch()
        (tmp_path / "glue" / task.folder / "dev.tsv").touch()
    return tmp_path / "glue"


class Broken(Exception):
    """The machine is switched off."""


def test_a_broken_run_of_cells_goes_on_where_it_was(tmp_path, monkeypatch, data):
    """train.py is stood in for by what it leaves in the folder; the fourth cell is broken off the first time."""
    started, results = [], tmp_path / "results" / "minilm.jsonl"

    def run_scripts(workdir, script):
        folder = Path(script[1].removeprefix("--workdir="))
        assert script[0] == "train.py" and folder.parent == workdir
        started.append(folder.name)
        if len(started) == 4:
            raise Broken
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "timing.jsonl").write_text('{"step": 5, "seconds": 2.25}\n{"step": 9, "seconds": 3.5}\n')
        (folder / "metrics.jsonl").write_text(
            '{"step": 9, "loss": 1}\n{"step": 9, "dev/accuracy": 0.87541, "dev/mcc": 0.5, "dev/pearson_spearman": 0}\n'
        )

    monkeypatch.setattr(minilm, "run_scripts", run_scripts)
    monkeypatch.setattr(minilm, "PAGE", tmp_path / "page.md")
    minilm.PAGE.write_text(minilm.with_tables((ROOT / "docs" / "results.md").read_text(), []))
    flags = [f"--checkpoint={tmp_path}/minilm", f"--data={data}", f"--workdir={tmp_path}/runs", f"--results={results}"]
    with pytest.raises(Broken):
        minilm.main(flags)
    first, *_ = rows = cells.read(results)
    assert len(rows) == 3 and "not run" in minilm.PAGE.read_text(), "the table is written at the end"
    assert first["scores"] == {"accuracy": 0.8754, "mcc": 0.5, "pearson_spearman": 0} and first["steps"] == 9
    assert first["training_seconds"] == 5.8, "the sum, rounded"
    assert "--config.data.train=data/glue/SST-2/train.tsv.xz" in first["command"]
    assert {"--config.init_from=checkpoint", "--workdir=runs/minilm/sst2_pretrained_0"} <= set(first["command"])
    assert not (tmp_path / "runs" / "sst2_pretrained_0" / "checkpoints").exists()
    assert minilm.main(flags) == 0
    names = [cell.name for cell in minilm.cells()]
    assert started == [*names[:4], *names[3:]] and len(set(names)) == len(names) == 24
    assert [row["cell"]["name"] for row in cells.read(results)] == names
    assert "| 3 | 87.5 [87.5, 87.5] | 87.5 [87.5, 87.5] | +0.0 |" in minilm.PAGE.read_text()


def test_a_script_that_fails_is_named_and_leaves_no_row(tmp_path):
    with pytest.raises(UserError, match=r"no_such_script\.py .* failed; see .*log\.txt"):
        cells.run_scripts(tmp_path, ["no_such_script.py", "--flag"])
    assert "no_such_script.py" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("task", minilm.TASKS)
def test_the_starts_of_a_cell_differ_in_what_is_said(task, data):
    """The same model, batches and steps; where it starts from, and the rate that suits it."""

    def made(start):
        config, *overrides = minilm.overrides(minilm.Cell(task, start, 1), Path("dir"), data)
        return load_config(config.removeprefix("--config="), split_overrides(overrides)[1])

    lines = {line.split(":")[0] for line in difference(made("pretrained"), made("scratch"))}
    assert lines == {"init_from", "optimizer.learning_rate", "tokenizer.path"}
    assert made("scratch").model.max_length >= made("scratch").task.max_length


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="--checkpoint is missing"):
        minilm.main([])
    with pytest.raises(UserError, match=r"RTE: neither train\.tsv nor train\.tsv\.xz"):
        minilm.file_of(tmp_path, "RTE", "train")


@pytest.mark.skipif(not GLUE.is_dir(), reason="the real data sets are not beside the repository")
@pytest.mark.parametrize("task", ["sst2", "rte"])
def test_what_not_reading_scores(task):
    """The more frequent class of train, on dev."""
    config, *overrides = minilm.overrides(minilm.Cell(task, "scratch", 0), Path("dir"), GLUE)
    made = load_config(config.removeprefix("--config="), split_overrides(overrides)[1])
    source = sources.build(made.data.to_dict())
    train, dev = ([record.fields["label"] for record in source.records(split)] for split in ("train", "dev"))
    assert dev.count(max(set(train), key=train.count)) / len(dev) == pytest.approx(
        minilm.TASKS[task].baseline, abs=5e-5
    )
