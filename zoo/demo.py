"""`python -m zoo demo`: the main job on text that is already on this machine, and whether it was worth it.

Learns a WordPiece vocabulary, pretrains a small NEZHA by whole-word masking under LAMB, then fine-tunes it on two labelled
tasks cut from the same text, each from the pretrained weights and from scratch with everything else equal.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

import eval as scoring
import train as training
from zoo.atomic import write_atomically
from zoo.command_line import Parser
from zoo.config import load_config, load_saved
from zoo.data.docstrings import versions
from zoo.run import CONFIG, TOKENIZER, assemble
from zoo.training.host_memory import keep_freed_memory
from zoo.training.sharding import put_batch

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "demo.py"

# Wall time from here to the table, on any machine that can do it: what fine-tuning leaves of it, pretraining takes.
SECONDS = 290.0
FEWEST_STEPS, MOST_STEPS = 800, 3500
# Fine-tuning steps of all runs together, and the seconds per run for data, compilation and scoring.
FINE_TUNING_STEPS, SECONDS_PER_RUN = 1300, 4.0


class LabelledTask(NamedTuple):
    """A task of the demo: its name in configs/demo.py, the score that counts, and the seeds it is repeated with."""

    name: str
    metric: str
    seeds: tuple[int, ...]
    what: str


TASKS = (
    LabelledTask("parameter_names", "f1", (0,), "tag the words of a docstring that are its function's parameters"),
    LabelledTask("parameter_types", "accuracy", (0, 1, 2), "say a parameter's type from its description, 6 classes"),
)


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m zoo demo", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"), help="folder for the runs and the summary")
    workdir = parser.read(argv).workdir
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    begin = time.monotonic()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    # Pretrained and scratch runs compile the same program; the second one takes it from here.
    jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").absolute()))
    console = Console()
    console.print(
        f"text: docstrings of {', '.join(f'{k} {v}' for k, v in _text_versions(workdir).items())}", highlight=False
    )
    pretrained = pretrain(workdir, begin, console)
    results = {task.name: fine_tune(task, pretrained, workdir, console) for task in TASKS}
    seconds = round(time.monotonic() - begin, 1)
    summary = {"tasks": results, "seconds": seconds}
    write_atomically(workdir / "summary.json", json.dumps(summary, indent=2).encode() + b"\n")
    show(results, seconds, workdir, console)
    return 0


def pretrain(workdir: Path, begin: float, console: Console) -> Path:
    """Pretrains for the time there is and returns the run's folder; a run that was begun keeps its number of steps."""
    folder = workdir / "pretrain"
    config = _config("pretrain", workdir)
    if (folder / CONFIG).exists():
        steps = load_saved(folder / CONFIG).train.steps
    else:
        speed = _steps_per_second(config, folder)
        fine_tuning = FINE_TUNING_STEPS / speed + SECONDS_PER_RUN * sum(2 * len(task.seeds) for task in TASKS)
        left = SECONDS - (time.monotonic() - begin) - fine_tuning
        steps = int(min(max(left * speed, FEWEST_STEPS), MOST_STEPS)) // 100 * 100
        console.print(f"{speed:.1f} steps/s here: pretraining for {steps} steps", highlight=False)
    config = _config("pretrain", workdir, ("train.steps", str(steps)), ("train.evaluate_every", str(steps // 5)))
    scores = training.train(config, folder)
    console.print(f"pretrained: held-out loss {scores['loss']:.3f}, accuracy {scores['accuracy']:.3f}", highlight=False)
    return folder


def fine_tune(task: LabelledTask, pretrained: Path, workdir: Path, console: Console) -> dict[str, float | str]:
    """The task's mean test scores over its seeds, from the pretrained weights and from scratch, in percent."""
    scores: dict[str, list[float]] = {"pretrained": [], "scratch": []}
    for seed in task.seeds:
        for start, found in scores.items():
            folder = workdir / f"{task.name}_{start}_{seed}"
            overrides = [("seed", str(seed)), ("data.seed", str(seed)), ("tokenizer.path", str(pretrained / TOKENIZER))]
            if start == "pretrained":
                overrides.append(("init_from", str(pretrained)))
            training.train(_config(task.name, workdir, *overrides), folder)
            found.append(100 * scoring.score(folder, "test")[task.metric])
        console.print(
            f"{task.name}, seed {seed}: {task.metric} {scores['pretrained'][-1]:.1f} pretrained, "
            f"{scores['scratch'][-1]:.1f} from scratch",
            highlight=False,
        )
    return {"metric": task.metric} | {start: round(mean(found), 2) for start, found in scores.items()}


def show(results: dict[str, dict[str, float | str]], seconds: float, workdir: Path, console: Console) -> None:
    """Prints the table, the folders and the pictures."""
    table = Table(title=f"test scores (%), {seconds:.0f} seconds in all")
    for column in ("task", "seeds", "metric", "pretrained", "from scratch", "gain"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for task in TASKS:
        found = results[task.name]
        gain = found["pretrained"] - found["scratch"]
        cells = (str(found["metric"]), f"{found['pretrained']:.1f}", f"{found['scratch']:.1f}", f"{gain:+.1f}")
        table.add_row(task.name, str(len(task.seeds)), *cells)
    console.print(table)
    for task in TASKS:
        console.print(f"{task.name}: {task.what}", highlight=False)
    console.print(f"summary: {workdir / 'summary.json'}", highlight=False, soft_wrap=True)
    for folder in sorted(path.parent for path in workdir.glob(f"*/{CONFIG}")):
        pictures = " ".join(picture.name for picture in sorted(folder.glob("*.png")))
        console.print(f"run: {folder}  {pictures}", highlight=False, soft_wrap=True)


def _config(task: str, workdir: Path, *overrides: tuple[str, str]) -> ConfigDict:
    """The demo's config of a task, its harvest kept in one place for all runs."""
    return load_config(f"{CONFIGS}:{task}", [("data.cache", str(workdir / "text")), *overrides])


def _text_versions(workdir: Path) -> dict[str, str]:
    return versions(_config("pretrain", workdir).data.packages)


def _steps_per_second(config: ConfigDict, folder: Path) -> float:
    """How fast this machine trains the config, after compilation; nothing of these steps is kept."""
    trainer = training.build_trainer(assemble(config, folder), folder)
    state, (stage,) = training.initial(trainer), trainer.stages
    speeds = []
    for chunk in range(6):
        begin = time.monotonic()
        for step in range(8 * chunk, 8 * chunk + 8):
            state, _ = stage.train_step(state, put_batch(stage.pipeline.batch(step), trainer.mesh))
        jax.block_until_ready(state)
        speeds.append(8 / (time.monotonic() - begin))
    return median(speeds[1:])  # the first chunk compiles; of the others a short disturbance shall not decide
