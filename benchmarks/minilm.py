"""What a published checkpoint is worth: a 6-layer MiniLM fine-tuned on GLUE, beside the same architecture from scratch.

    python -m benchmarks.minilm --checkpoint=checkpoint --data=data/glue --workdir=runs/minilm     # two hours on a CPU core
    python -m benchmarks.minilm --tables                                     # rewrites the table of docs/results.md

`--checkpoint` is a Hugging Face directory with a BERT of 6 layers of width 384 and its vocabulary, `--data` GLUE's folders
(CoLA, RTE, SST-2, STS-B; .tsv or .tsv.xz). A cell is one run of train.py, scored on dev after its last step. A finished cell is
appended to `docs/results/minilm.jsonl` at once and never run again; its checkpoint, of 270 MB, is removed.

Both starts have the same tokenizer, batches, steps and schedule, and each its own learning rate; nothing else differs.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.cells import ROOT, circumstances, of, read, run_missing, run_scripts, spread, trained_seconds
from zoo.atomic import write_atomically
from zoo.command_line import Parser, run_main
from zoo.commands.made_blocks import with_blocks
from zoo.errors import UserError
from zoo.training.records import METRICS, read_records

RESULTS = ROOT / "docs" / "results" / "minilm.jsonl"
PAGE = ROOT / "docs" / "results.md"

STARTS = ("pretrained", "scratch")
SEEDS = (0, 1, 2)
BATCH = 16
RATES = {"pretrained": 1e-4, "scratch": 3e-4}


@dataclass(frozen=True)
class Cell:
    """One run: which task, from which parameters and with which seed."""

    task: str
    start: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}_{self.start}_{self.seed}"


@dataclass(frozen=True)
class FineTuning:
    """A task of configs/glue.py: its folder in GLUE, its official score, its budget.

    `baseline` is that score on dev for whoever has not read the texts: the class that is more frequent in train, or one number.
    """

    folder: str
    metric: str
    title: str
    baseline: float
    length: int
    steps: int


# 150,000 to 310,000 tokens a run. Of dev, 2 % of SST-2's rows, 3 % of STS-B's and 12 % of RTE's are cut.
TASKS = {
    "sst2": FineTuning("SST-2", "accuracy", "SST-2, accuracy", 0.5092, 48, 200),
    "cola": FineTuning("CoLA", "mcc", "CoLA, Matthews correlation", 0.0, 32, 400),
    "stsb": FineTuning("STS-B", "pearson_spearman", "STS-B, mean of Pearson and Spearman", 0.0, 64, 300),
    "rte": FineTuning("RTE", "accuracy", "RTE, accuracy", 0.5271, 128, 150),
}


def cells() -> Iterator[Cell]:
    """All of them, in the order they are run: one seed whole, then the next."""
    for seed in SEEDS:
        for task in TASKS:
            for start in STARTS:
                yield Cell(task, start, seed)


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m benchmarks.minilm", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="Hugging Face directory of the checkpoint")
    parser.add_argument("--data", type=Path, default=Path("data/glue"), help="folder with GLUE's folders")
    parser.add_argument("--workdir", type=Path, default=Path("runs/minilm"), help="folder for the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="finished cells, one JSON object per line")
    parser.add_argument("--tables", action="store_true", help="only write the table of docs/results.md")
    flags = parser.read(argv)
    if not flags.tables:
        if flags.checkpoint is None:
            raise UserError("--checkpoint is missing: the directory with config.json, model.safetensors and vocab.txt")
        flags.workdir.mkdir(parents=True, exist_ok=True)
        run_missing(cells(), lambda cell: run(cell, flags.checkpoint, flags.data, flags.workdir), flags.results)
    write_atomically(PAGE, with_tables(PAGE.read_text(encoding="utf-8"), read(flags.results)).encode())
    return 0


# --- running


def run(cell: Cell, checkpoint: Path, data: Path, workdir: Path) -> dict[str, Any]:
    """Trains and scores one cell and says how."""
    folder = workdir / cell.name
    arguments = [f"--workdir={folder}", *overrides(cell, checkpoint, data)]
    begin = time.monotonic()
    run_scripts(workdir, ["train.py", *arguments])
    last = list(read_records(folder / METRICS))[-1]
    row = {
        "cell": {"name": cell.name, **asdict(cell)},
        "scores": {n.removeprefix("dev/"): round(value, 4) for n, value in last.items() if n.startswith("dev/")},
        "split": "dev",
        "steps": last["step"],
        # Of training alone; `seconds` is all, with start-up, preparation and scoring.
        "training_seconds": trained_seconds(folder),
        "seconds": round(time.monotonic() - begin, 1),
        "command": ["train.py", *(named_alike(argument, checkpoint, data, workdir) for argument in arguments)],
        **circumstances(),
    }
    shutil.rmtree(folder / "checkpoints")
    return row


def overrides(cell: Cell, checkpoint: Path, data: Path) -> list[str]:
    """The arguments of train.py that make the cell."""
    task = TASKS[cell.task]
    values: dict[str, Any] = {
        "seed": cell.seed,
        "data.train": file_of(data, task.folder, "train"),
        "data.dev": file_of(data, task.folder, "dev"),
        "task.max_length": task.length,
        "optimizer.learning_rate": RATES[cell.start],
        "train.batch_size": BATCH,
        "train.epochs": None,
        "train.steps": task.steps,
        "train.log_every": 10,
        "train.checkpoint_every": 0,
        "train.tensorboard": False,
    }
    values["init_from" if cell.start == "pretrained" else "tokenizer.path"] = checkpoint
    config = f"configs/glue.py:{cell.task},size=minilm,pooling=mean"
    return [f"--config={config}", *(f"--config.{name}={value}" for name, value in values.items())]


def file_of(data: Path, folder: str, split: str) -> Path:
    """The file of a split, plain or packed.

    Raises:
      UserError: there is neither.
    """
    found = [path for end in ("tsv", "tsv.xz") if (path := data / folder / f"{split}.{end}").exists()]
    if not found:
        raise UserError(
            f"{data / folder}: neither {split}.tsv nor {split}.tsv.xz; --data is the folder with GLUE's folders"
        )
    return found[0]


def named_alike(argument: str, checkpoint: Path, data: Path, workdir: Path) -> str:
    """The argument as on a machine where the three folders have the names of the docstring."""
    for path, name in ((checkpoint, "checkpoint"), (data, "data/glue"), (workdir, "runs/minilm")):
        argument = argument.replace(f"={path}", f"={name}", 1)
    return argument


# --- the table


def with_tables(page: str, rows: list[dict[str, Any]]) -> str:
    """`page` with the table made from `rows` between its marks.

    Raises:
      UserError: the page has no such marks.
    """
    return with_blocks(page, {"minilm": table(rows)}, by="python -m benchmarks.minilm --tables", where=str(PAGE))


def table(rows: list[dict[str, Any]]) -> str:
    """The scores by task over the seeds that were run from both starts, beside those of not reading."""
    lines = [
        "| task | steps × tokens | without reading | seeds | MiniLM | from scratch | gain | seconds a run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, task in TASKS.items():
        found = {start: of(rows, task=name, start=start) for start in STARTS}
        seeds = set.intersection(*({row["cell"]["seed"] for row in found[start]} for start in STARTS))
        both = {start: [row for row in found[start] if row["cell"]["seed"] in seeds] for start in STARTS}
        scores = {start: [100 * row["scores"][task.metric] for row in both[start]] for start in STARTS}
        gain = f"{mean(scores['pretrained']) - mean(scores['scratch']):+.1f}" if seeds else ""
        times = [row["training_seconds"] for start in STARTS for row in both[start]]
        lines.append(
            f"| {task.title} | {task.steps} × {BATCH * task.length:,} | {100 * task.baseline:.1f} | {len(seeds)} "
            f"| {spread(scores['pretrained'])} | {spread(scores['scratch'])} | {gain} | {spread(times, '.0f')} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(run_main(main))
