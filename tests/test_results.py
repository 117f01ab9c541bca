"""docs/results.md shows what the committed rows hold."""

from pathlib import Path

import pytest

from benchmarks import chinese, minilm
from benchmarks.cells import read
from zoo.errors import UserError


def row(encoding, task, start, seed, **scores):
    cell = {
        "name": f"{encoding}_{task}_{start}_{seed}",
        "encoding": encoding,
        "task": task,
        "start": start,
        "seed": seed,
    }
    return {"cell": cell, "scores": scores, "training_seconds": 120.0}


@pytest.mark.parametrize("benchmark", [chinese, minilm], ids=["chinese", "minilm"])
def test_the_tables_are_those_of_the_rows(benchmark):
    page = benchmark.PAGE.read_text(encoding="utf-8")
    fresh = benchmark.with_tables(page, read(benchmark.RESULTS))
    assert fresh == page, f"run python -m {benchmark.__name__} --tables"


@pytest.mark.parametrize("benchmark", [chinese, minilm], ids=["chinese", "minilm"])
def test_no_cell_is_run_twice_and_none_is_foreign(benchmark):
    found = [r["cell"]["name"] for r in read(benchmark.RESULTS)]
    planned = [cell.name for cell in benchmark.cells()]
    assert len(set(planned)) == len(planned)
    assert len(set(found)) == len(found)
    assert set(found) <= set(planned)


def test_a_table_shows_the_mean_the_range_and_what_was_not_run():
    rows = [row("nezha", "ner", "pretrained", s, f1=f) for s, f in enumerate((0.5, 0.7, 0.9))]
    rows += [row("nezha", "ner", "scratch", s, f1=f) for s, f in enumerate((0.4, 0.6))]
    line = chinese.task_table(rows).splitlines()[2]
    assert "| 2 | 60.0 [50.0, 70.0] | 50.0 [40.0, 60.0] | +10.0 |" in line, "the third seed has no scratch run yet"
    assert "not run" in chinese.task_table(rows).splitlines()[3]


def test_a_page_without_marks_is_refused():
    with pytest.raises(UserError, match="has no lines"):
        chinese.with_tables("nothing", [])


def test_the_corpus_keeps_documents_apart_and_holds_some_out(monkeypatch):
    monkeypatch.setattr(chinese, "documents", lambda folder: (["一句。两句！", f"{n}"] for n in range(100)))
    splits = chinese.corpus(Path("."))
    assert splits["dev"].split("\n\n") == ["一句。\n两句！\n49", "一句。\n两句！\n99\n"]
    assert splits["train"].count("\n\n") == 97 and splits["train"].endswith("\n")


def test_a_cell_differs_from_scratch_by_init_from_alone(tmp_path):
    data = Path("data")
    pretrained, scratch = (
        set(chinese.overrides(chinese.Cell("rope", "ner", start, 1), data, tmp_path)) for start in chinese.STARTS
    )
    assert pretrained - scratch == {f"--config.init_from={tmp_path / 'rope_pretrain_scratch_0'}"}
    assert scratch < pretrained
