"""What pretraining is worth on real Chinese data, and whether the position encoding matters: a tiny NEZHA, cell by cell.

    python -m benchmarks.chinese --data=data --workdir=runs/chinese     # about 3 hours on 2 CPU cores
    python -m benchmarks.chinese --tables                               # rewrites the tables of docs/results.md

A cell is one run of train.py and its test scores. A finished cell is appended to `docs/results/chinese.jsonl` at once and
never run again; a cell that was broken off goes on from its checkpoint. `--data` holds the folders zh_text, vocab,
peoples_daily_ner, chnsenticorp and lcqmc, as docs/results.md describes them.

Pretraining is `configs/nezha.py:pretrain,size=tiny` (masked LM of whole words and next-sentence prediction) on zh_text;
fine-tuning starts from it or from scratch, with everything else equal.
"""

from __future__ import annotations

import json
import lzma
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.cells import ROOT, circumstances, of, read, run_missing, run_scripts, spread, trained_seconds
from zoo.atomic import write_atomically
from zoo.command_line import Parser, run_main
from zoo.commands.made_blocks import with_blocks
from zoo.errors import UserError

RESULTS = ROOT / "docs" / "results" / "chinese.jsonl"
PAGE = ROOT / "docs" / "results.md"

PRETRAIN = "pretrain"
STARTS = ("pretrained", "scratch")
SEEDS = (0, 1, 2)
OTHER_ENCODINGS = ("learned", "rope", "t5", "alibi")
LENGTH = 128


@dataclass(frozen=True)
class Cell:
    """One run: which encoding, which task, from which parameters and with which seed."""

    encoding: str
    task: str
    start: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.encoding}_{self.task}_{self.start}_{self.seed}"


@dataclass(frozen=True)
class FineTuning:
    """A task of configs/chinese.py: its files under --data, its length, and the score that counts."""

    config: str
    metric: str
    title: str
    files: dict[str, tuple[str, ...]]
    length: int
    steps: int


# The batch is 32 throughout. The common training file of People's Daily NER is not to be had whole, that of LCQMC has 1,999
# rows: there the dev split, which nothing was chosen on, joins the training.
TASKS = {
    "ner": FineTuning(
        "ner",
        "f1",
        "People's Daily NER, strict entity F1",
        {
            "train": ("peoples_daily_ner/train.51k-edition.minus-dev-test.txt.xz",),
            "dev": ("peoples_daily_ner/example.dev.xz",),
            "test": ("peoples_daily_ner/example.test.xz",),
        },
        LENGTH,
        800,
    ),
    "ner_1000": FineTuning(
        "ner",
        "f1",
        "the same, from 1,000 sentences",
        {
            "train": ("peoples_daily_ner/example.train.first1000.xz",),
            "dev": ("peoples_daily_ner/example.dev.xz",),
            "test": ("peoples_daily_ner/example.test.xz",),
        },
        LENGTH,
        250,
    ),
    "chnsenti": FineTuning(
        "chnsenti",
        "accuracy",
        "ChnSentiCorp, accuracy",
        {split: (f"chnsenticorp/{split}.tsv.xz",) for split in ("train", "dev", "test")},
        LENGTH,
        800,
    ),
    "lcqmc": FineTuning(
        "lcqmc",
        "accuracy",
        "LCQMC, accuracy",
        {"train": ("lcqmc/train.first1999.txt.xz", "lcqmc/dev.txt.xz"), "dev": (), "test": ("lcqmc/test.txt.xz",)},
        64,
        1600,
    ),
}
PRETRAINING_STEPS = 2500


def cells() -> Iterator[Cell]:
    """All of them, in the order they are run: NEZHA's whole, then the other encodings on NER."""
    yield Cell("nezha", PRETRAIN, "scratch", 0)
    for seed in SEEDS:
        for task in TASKS:
            for start in STARTS:
                yield Cell("nezha", task, start, seed)
    for encoding in OTHER_ENCODINGS:
        yield Cell(encoding, PRETRAIN, "scratch", 0)
        for start in STARTS:
            yield Cell(encoding, "ner", start, 0)


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m benchmarks.chinese", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with zh_text, vocab and the three labelled sets")
    parser.add_argument("--workdir", type=Path, default=Path("runs/chinese"), help="folder for the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="finished cells, one JSON object per line")
    parser.add_argument("--tables", action="store_true", help="only write the tables of docs/results.md")
    flags = parser.read(argv)
    if not flags.tables:
        if flags.data is None:
            raise UserError("--data is missing: the folder with zh_text, vocab and the three labelled sets")
        run_all(flags.data, flags.workdir, flags.results)
    write_atomically(PAGE, with_tables(PAGE.read_text(encoding="utf-8"), read(flags.results)).encode())
    return 0


# --- running


def run_all(data: Path, workdir: Path, results: Path) -> None:
    """Runs every cell that `results` does not hold."""
    workdir.mkdir(parents=True, exist_ok=True)
    for split, text in corpus(data / "zh_text").items():
        if not (workdir / f"{split}.txt").exists():
            write_atomically(workdir / f"{split}.txt", text.encode())
    run_missing(cells(), lambda cell: run(cell, data, workdir), results)


def run(cell: Cell, data: Path, workdir: Path) -> dict[str, Any]:
    """Trains and scores one cell and says how."""
    folder, split = workdir / cell.name, scored_split(cell)
    arguments = [f"--workdir={folder}", *overrides(cell, data, workdir)]
    begin = time.monotonic()
    run_scripts(workdir, ["train.py", *arguments], ["eval.py", f"--workdir={folder}", f"--split={split}"])
    report = json.loads((folder / f"scores_{split}.json").read_text())
    return {
        "cell": {"name": cell.name, **asdict(cell)},
        "scores": {name: round(value, 4) for name, value in report["scores"].items()},
        "split": split,
        "examples": report["examples"],
        "steps": report["step"],
        # Of training alone; `seconds` is all, with start-up, preparation and scoring.
        "training_seconds": trained_seconds(folder),
        "seconds": round(time.monotonic() - begin, 1),
        "command": ["train.py", *(named_alike(argument, data, workdir) for argument in arguments)],
        **circumstances(),
    }


def overrides(cell: Cell, data: Path, workdir: Path) -> list[str]:
    """The arguments of train.py that make the cell."""
    values: dict[str, Any] = {
        "seed": cell.seed,
        "encoding": cell.encoding,
        "tokenizer.path": data / "vocab" / "zh_21128.txt.xz",
        "train.batch_size": 32,
        "train.log_every": 50,
        "train.checkpoint_every": 500,
        "train.keep": 1,
        "train.tensorboard": False,
    }
    if cell.task == PRETRAIN:
        # Dropout is for data seen often: here every text comes three times.
        values |= {"data.train": workdir / "train.txt", "data.dev": workdir / "dev.txt"}
        values |= {"model.dropout": 0.0, "model.attention_dropout": 0.0, "train.steps": PRETRAINING_STEPS}
        values |= {"schedule.warmup": 250, "train.evaluation_batch_size": 64}
        config = PRETRAIN
    else:
        task = TASKS[cell.task]
        for split, files in task.files.items():
            values[f"data.{split}"] = ",".join(str(data / file) for file in files) or "()"
        values |= {"task.max_length": task.length, "train.epochs": None, "train.steps": task.steps}
        values |= {"train.evaluation_batch_size": 100}
        if cell.start == "pretrained":
            values["init_from"] = workdir / Cell(cell.encoding, PRETRAIN, "scratch", 0).name
        config = task.config
    return [f"--config=configs/nezha.py:{config},size=tiny", *(f"--config.{n}={v}" for n, v in values.items())]


def named_alike(argument: str, data: Path, workdir: Path) -> str:
    """The argument as on a machine where both folders have the names of the docstring."""
    return argument.replace(f"{data}/", "data/").replace(f"{workdir}/", "runs/chinese/")


def scored_split(cell: Cell) -> str:
    return "dev" if cell.task == PRETRAIN else "test"


# --- the corpus


SENTENCE_END = re.compile(r"(?<=[。！？；])")
CHAPTER = re.compile(r"\s*第[一二三四五六七八九十百零〇]+回")


def corpus(folder: Path) -> dict[str, str]:
    """zh_text in the form of BERT's data builders, a sentence per line and documents apart by an empty line; every 50th
    document is for dev. A document is an article, a passage, or a chapter of a novel; the marks of idioms to fill in are cut.
    """
    splits: dict[str, list[str]] = {"train": [], "dev": []}
    for index, lines in enumerate(documents(folder)):
        sentences = [piece.strip() for line in lines for piece in SENTENCE_END.split(line) if piece.strip()]
        if sentences:
            splits["dev" if index % 50 == 49 else "train"].append("\n".join(sentences) + "\n")
    return {split: "\n".join(texts) for split, texts in splits.items()}


def documents(folder: Path) -> Iterator[list[str]]:
    for name in ("wiki_sample", "cluecorpussmall_sample.bert-format", "news_sample"):
        yield from blocks(lines_of(folder / f"{name}.txt.xz"), starts=lambda line: not line.strip())
    for line in lines_of(folder / "chid_passages.json.xz"):
        yield [json.loads(line)["content"].replace("#idiom#", "")]
    for name in ("hongloumeng", "xiyouji"):
        yield from blocks(lines_of(folder / f"novel.{name}.txt.xz"), starts=CHAPTER.match)


def blocks(lines: Iterable[str], *, starts: Any) -> Iterator[list[str]]:
    held: list[str] = []
    for line in lines:
        if starts(line) and held:
            yield held
            held = []
        held.append(line)
    if held:
        yield held


def lines_of(path: Path) -> Iterator[str]:
    with lzma.open(path, "rt", encoding="utf-8", newline="\n") as file:
        yield from file


# --- the tables


def with_tables(page: str, rows: list[dict[str, Any]]) -> str:
    """`page` with the tables made from `rows` between its marks.

    Raises:
      UserError: the page has no such marks.
    """
    made = {"tasks": task_table(rows), "encodings": encoding_table(rows)}
    return with_blocks(page, made, by="python -m benchmarks.chinese --tables", where=str(PAGE))


def task_table(rows: list[dict[str, Any]]) -> str:
    """NEZHA's scores by task, over the seeds that were run from both starts."""
    lines = ["| task | seeds | pretrained | from scratch | gain | seconds a run |", "|---|---|---|---|---|---|"]
    for name, task in TASKS.items():
        found = {start: of(rows, encoding="nezha", task=name, start=start) for start in STARTS}
        seeds = set.intersection(*({row["cell"]["seed"] for row in found[start]} for start in STARTS))
        both = {start: [row for row in found[start] if row["cell"]["seed"] in seeds] for start in STARTS}
        scores = {start: [100 * row["scores"][task.metric] for row in both[start]] for start in STARTS}
        gain = f"{mean(scores['pretrained']) - mean(scores['scratch']):+.1f}" if seeds else ""
        times = [row["training_seconds"] for start in STARTS for row in both[start]]
        lines.append(
            f"| {task.title} | {len(seeds)} | {spread(scores['pretrained'])} | {spread(scores['scratch'])} | {gain} "
            f"| {spread(times, '.0f')} |"
        )
    return "\n".join(lines) + "\n"


def encoding_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| encoding | held-out masked-LM loss | accuracy | pretraining, minutes | NER F1 pretrained | from scratch |",
        "|---|---|---|---|---|---|",
    ]
    for encoding in ("nezha", *OTHER_ENCODINGS):
        for before in of(rows, encoding=encoding, task=PRETRAIN):
            f1 = {s: of(rows, encoding=encoding, task="ner", start=s, seed=0) for s in STARTS}
            shown = (spread([100 * row["scores"]["f1"] for row in f1[start]]) for start in STARTS)
            lines.append(
                f"| {encoding} | {before['scores']['loss']:.3f} | {100 * before['scores']['accuracy']:.1f} "
                f"| {before['training_seconds'] / 60:.0f} | {' | '.join(shown)} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(run_main(main))
