"""`python -m zoo compare`: the same small models with one position encoding after another, everything else equal.

    python -m zoo compare --workdir=runs/compare --config.data.train=train.txt --config.data.dev=valid.txt
    python -m zoo compare --workdir=runs/compare --encodings=rope,alibi,t5 --seeds=0,1,2 --config.data.train=...
    python -m zoo compare --workdir=runs/compare --report                     # only the tables and pictures

A cell is one run of train.py's, of an objective, an encoding and a seed, and its loss on held-out text at the length it was
trained on and beyond. All cells read the same batches in the same order and start from the same weights where shapes agree. A
finished cell is appended to `--results` at once and never run again; one that is broken off begins anew.
"""

from __future__ import annotations

import datetime
import itertools
import json
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

import eval as scoring
import train as training
from kernels.attention import AttentionMask
from zoo.command_line import Parser, split_overrides
from zoo.commands.compare_report import Cell, read, report
from zoo.commands.relative_speed import Stepper, relative_speed
from zoo.compatibility import compatible
from zoo.config import load_config
from zoo.encodings import registry as encodings
from zoo.errors import UserError, writing
from zoo.run import CHECKPOINTS, DATA, TOKENIZER, assemble
from zoo.tasks.packed_documents import PackedDocuments
from zoo.training.checkpoints import restore_numpy
from zoo.training.host_memory import keep_freed_memory
from zoo.training.records import TIMING, read_records

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "compare.py"
OBJECTIVES = ("causal_lm", "masked_lm")
# Encodings whose default is for the other direction.
CAUSAL = {"t5": "t5:bidirectional=False"}
BIDIRECTIONAL = {"music": "music:bidirectional=True"}
SENTENCE_ENDS = (".", "?", "!")


def main(argv: Sequence[str]) -> int:
    arguments, overrides = split_overrides(argv)
    parser = Parser(prog="python -m zoo compare", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the runs, the tables and the pictures")
    parser.add_argument("--config", default=str(CONFIG), help="a config that takes an objective as its argument")
    parser.add_argument("--results", type=Path, help="finished cells, a JSON object a line (default: in --workdir)")
    parser.add_argument("--objectives", default=",".join(OBJECTIVES), help="arguments of the config, comma-separated")
    parser.add_argument("--encodings", help="comma-separated, each NAME or NAME:argument=value (default: all)")
    parser.add_argument("--seeds", default="0", help="comma-separated integers")
    parser.add_argument("--lengths", default="1,2,4,8", help="multiples of the training length to score at")
    parser.add_argument("--tokens", type=int, default=32768, help="held-out tokens to score at each length")
    parser.add_argument("--report", action="store_true", help="train nothing: tables and pictures of what is finished")
    flags = parser.read(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    results = flags.results or flags.workdir / "results.jsonl"
    console = Console()
    if not flags.report:
        multiples = _integers(flags.lengths, "--lengths")
        comparison = Comparison(flags.config, tuple(overrides), flags.workdir, multiples, flags.tokens)
        chosen = encodings.names() if flags.encodings is None else _split(flags.encodings)
        plan = comparison.cells(flags.objectives.split(","), chosen, _integers(flags.seeds, "--seeds"), console)
        comparison.run(plan, results, console)
    report(read(results), flags.workdir, console)
    return 0


class Common(NamedTuple):
    """What the cells of an objective share: the tokenizer's folder, the prepared text's, sentence ends, and the unigram's loss,
    None for a task that is not one of words in a text, and the model without an encoding, whose speed is theirs' measure."""

    tokenizer: Path
    data: Path
    separators: tuple[int, ...]
    unigram_loss: float | None
    plain: Stepper


@dataclass(frozen=True)
class Comparison:
    """What all cells have in common: the config with its overrides, where the runs lie, and what they are scored on."""

    config: str
    overrides: tuple[tuple[str, str], ...]
    workdir: Path
    multiples: tuple[int, ...]
    tokens: int

    def cells(
        self, objectives: Sequence[str], chosen: Sequence[str], seeds: Sequence[int], console: Console
    ) -> list[Cell]:
        """Every cell, in the order they are run; says which encodings an objective leaves out, and why.

        Raises:
          UserError: the config or an encoding is wrong, or no encoding is left.
        """
        plan = []
        for objective in objectives:
            causal = load_config(f"{self.config}:{objective}", self.overrides).model.causal
            best = CAUSAL if causal else BIDIRECTIONAL
            for text in chosen:
                cell = Cell(objective, best.get(text, text), 0)
                config = self._loaded(cell)
                part = encodings.build(config.encoding.to_dict())
                answer = compatible(part, config.mixer.to_dict(), mask=AttentionMask(causal=causal))
                if answer:
                    plan.append(cell)
                else:
                    console.print(
                        f"left out of {objective}: {answer.reason}", highlight=False, markup=False, soft_wrap=True
                    )
        if not plan:
            raise UserError("no encoding is left to compare")
        return [replace(cell, seed=seed) for seed in seeds for cell in plan]

    def run(self, plan: Sequence[Cell], results: Path, console: Console) -> None:
        """Runs every cell that `results` does not hold, appending each as it finishes.

        Raises:
          UserError: the data or a finished cell is wrong.
        """
        if jax.default_backend() == "cpu":
            keep_freed_memory()
        done = {Cell(**row["cell"]) for row in read(results)}
        missing = [cell for cell in plan if cell not in done]
        with writing(results):
            self.workdir.mkdir(parents=True, exist_ok=True)
            results.parent.mkdir(parents=True, exist_ok=True)
        common: dict[str, Common] = {}
        for number, cell in enumerate(missing, start=1):
            title = f"{cell.objective}, {cell.encoding}, seed {cell.seed}"
            console.print(f"[{number} of {len(missing)}] {title}", highlight=False, markup=False, soft_wrap=True)
            if cell.objective not in common:
                common[cell.objective] = self._prepared(cell)
            row = self._row(cell, common[cell.objective])
            with writing(results), results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            console.print(f"  {said(row)}", highlight=False, markup=False, soft_wrap=True)
            jax.clear_caches()  # of programs that no other cell runs

    def _loaded(self, cell: Cell, *more: tuple[str, str]) -> ConfigDict:
        overrides = [("encoding", cell.encoding), ("seed", str(cell.seed)), *more, *self.overrides]
        return load_config(f"{self.config}:{cell.objective}", overrides)

    def _prepared(self, cell: Cell) -> Common:
        """Learns the tokenizer and prepares the text, where it is not done yet."""
        folder = self.workdir / "shared"
        parts = assemble(self._loaded(cell), folder)
        train, held_out = (scoring.split_of(parts, split, folder) for split in ("train", "dev"))
        few = max(1, self.tokens // parts.task.max_length)
        words = isinstance(parts.task, PackedDocuments)
        plain = self._loaded(replace(cell, encoding="none"), ("tokenizer.path", str(folder / TOKENIZER)))
        separators = parts.tokenizer.encode_words(SENTENCE_ENDS).ids
        return Common(
            folder / TOKENIZER,
            (folder / DATA).absolute(),
            tuple(sorted({int(piece) for piece in separators} - {parts.tokenizer.vocabulary.unk})),
            unigram_loss(train, itertools.islice(held_out, few), parts.tokenizer.vocabulary.size) if words else None,
            Stepper(plain, folder),
        )

    def _row(self, cell: Cell, common: Common) -> dict[str, Any]:
        begin = time.monotonic()
        device = f"{os.cpu_count()} CPU cores"
        if jax.default_backend() != "cpu":
            device = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
        return {
            "cell": asdict(cell),
            **self._measured(cell, common),
            "seconds": round(time.monotonic() - begin, 1),
            "tokens_scored": self.tokens,
            "date": datetime.date.today().isoformat(),
            "versions": {name: version(name) for name in ("jax", "flax")} | {"python": platform.python_version()},
            "hardware": device,
        }

    def _measured(self, cell: Cell, common: Common) -> dict[str, Any]:
        """What the run of a cell gave, or why it ended early."""
        folder = self.workdir / cell.folder
        more = [("tokenizer.path", str(common.tokenizer))]
        part = encodings.build(self._loaded(cell).encoding.to_dict())
        if part.facts().sentences and not part.facts().separators:
            more.append(("encoding.separators", str(common.separators)))
        config = self._loaded(cell, *more)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / DATA).symlink_to(common.data, target_is_directory=True)
        try:
            training.train(config, folder)
        except training.NotFinite:
            return {"failed": "the loss is not finite"}
        length = config.task.max_length
        lengths = tuple(multiple * length for multiple in self.multiples)
        scores = scoring.score_at_lengths(folder, lengths, tokens=self.tokens)
        params = restore_numpy(folder / CHECKPOINTS, part="params").state["params"]
        tokens = config.train.batch_size * length
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "steps": config.train.steps,
            "tokens": config.train.steps * tokens,
            "relative_speed": round(relative_speed(Stepper(config, folder), common.plain), 3),
            "program_bytes": read_records(folder / TIMING)[-1].get("program_bytes"),
            "unigram_loss": common.unigram_loss and round(common.unigram_loss, 4),
            "losses": {n: str(s) if isinstance(s, UserError) else round(s["loss"], 4) for n, s in scores.items()},
            "accuracies": {n: round(s["accuracy"], 4) for n, s in scores.items() if not isinstance(s, UserError)},
        }


def unigram_loss(train: Sequence, held_out: Iterable, vocabulary_size: int) -> float:
    """Nats per token of `held_out` under the frequencies of `train`, one added to each count; both are packed rows."""

    def counts(rows: Iterable) -> np.ndarray:
        total = np.zeros(vocabulary_size, np.int64)
        for row in rows:
            total += np.bincount(row["input_ids"][row["segment_ids"] > 0], minlength=vocabulary_size)
        return total

    seen, wanted = counts(train) + 1, counts(held_out)
    return float(-(wanted * np.log(seen / seen.sum())).sum() / wanted.sum())


def said(row: dict[str, Any]) -> str:
    """A finished cell in one line."""
    if "failed" in row:
        return f"failed: {row['failed']}"
    losses = (f"{length}: {loss if isinstance(loss, float) else 'refused'}" for length, loss in row["losses"].items())
    return f"loss at {', '.join(losses)}; speed {row['relative_speed']}, {row['seconds']} s in all"


def _split(text: str) -> list[str]:
    """The names between commas, but for commas within parentheses or between arguments, which are `name=value`."""
    return re.split(r",(?![^(]*\))(?!\w+=)", text)


def _integers(text: str, flag: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{flag} takes integers with commas between them, not {text!r}") from None
