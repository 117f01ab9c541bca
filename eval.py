"""Scores a run on a split of its data.

    python eval.py --workdir=runs/lcqmc
    python eval.py --workdir=runs/lcqmc --split=test --step=2000
    python eval.py --workdir=runs/large --config.mesh.fsdp=1 --config.train.evaluation_batch_size=8

On several hosts, with the same `--config.processes` as train.py; process 0 writes and prints.

Rebuilds the model from the run's folder alone, prints the task's official scores and writes them to
`<workdir>/scores_<split>.json`. The run's mesh is used unless another is given.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from train import Evaluation, build_evaluation, evaluate
from zoo.atomic import write_atomically
from zoo.command_line import Parser, outcome, run_main, split_overrides
from zoo.errors import UserError, near
from zoo.run import CHECKPOINTS, Parts, override_processes, reassemble
from zoo.training.checkpoints import restore_numpy
from zoo.training.processes import Processes, joined
from zoo.training.sharding import BATCH_AXES, put_whole


def main(argv: list[str]) -> int:
    arguments, overrides = split_overrides(argv)
    parser = Parser(prog="eval.py", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run")
    parser.add_argument("--split", default="dev", help="split of the run's data (default: dev)")
    parser.add_argument("--step", type=int, help="checkpoint to score (default: the newest)")
    flags = parser.read(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    settings, overrides = override_processes(overrides)
    with joined(settings, outcome) as processes:
        scores = score(flags.workdir, flags.split, flags.step, overrides, processes)
        for name, value in scores.items() if processes.primary else ():
            print(f"{flags.split} {name} {value:.4f}")
    return 0


def score(
    workdir: Path,
    split: str,
    step: int | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    processes: Processes | None = None,
) -> dict[str, float]:
    """The scores of the run in `workdir` on `split`, at checkpoint `step` (None: the newest); also written beside it.

    Raises:
      UserError: no run, no such split, no valid checkpoint, or an override of something else than the place.
    """
    processes = Processes() if processes is None else processes
    with processes.primary_first("preparation"):
        parts = reassemble(workdir, overrides)
        examples = split_of(parts, split, workdir)
    restored = restore_numpy(workdir / CHECKPOINTS, step=step, part="params")
    if restored.step != processes.share("step", restored.step):
        raise UserError(f"not all processes see the same newest checkpoint in {workdir}; name one by --step")
    scores = evaluate(*placed(parts, restored.state["params"]), examples)
    if not processes.primary:
        return scores
    report = {"step": restored.step, "split": split, "examples": len(examples), "scores": scores}
    write_atomically(workdir / f"scores_{split}.json", json.dumps(report, indent=2).encode() + b"\n")
    return scores


def score_at_lengths(
    workdir: Path, lengths: Sequence[int], split: str = "dev", *, tokens: int, rows_of: int = 1 << 13
) -> dict[int, dict[str, float] | UserError]:
    """The scores of the newest checkpoint on rows of each length: those of the first `tokens` tokens of `split`.

    The text is cut anew for each length, so the same tokens are predicted with more before them. A length that the model's
    encoding cannot serve has its refusal for an answer.

    Args:
      rows_of: tokens of one batch, about.

    Raises:
      UserError: no run, or no such split.
    """
    parts = reassemble(workdir)
    params = restore_numpy(workdir / CHECKPOINTS, part="params").state["params"]
    scores: dict[int, dict[str, float] | UserError] = {}
    for length in lengths:
        own = parts.at({"max_length": length})
        rows = split_of(own, split, workdir)
        few = [rows[row] for row in range(min(len(rows), max(1, tokens // length)))]
        evaluation, placed_params = placed(own, params)
        shards = math.prod(evaluation.mesh.shape[axis] for axis in BATCH_AXES)
        batch_size = shards * max(1, rows_of // (length * shards))
        try:
            scores[length] = evaluate(evaluation._replace(batch_size=batch_size), placed_params, few)
        except UserError as refusal:
            scores[length] = refusal
    return scores


def split_of(parts: Parts, split: str, workdir: Path) -> Sequence:
    """The examples of a split of a run's data.

    Raises:
      UserError: there is no such split.
    """
    if split not in parts.source.splits():
        raise UserError(f"the run's data have no split {split!r}; {near(split, parts.source.splits())}")
    return parts.examples(split, workdir)


def placed(parts: Parts, params: Any) -> tuple[Evaluation, Any]:
    """The compiled evaluation of a run, and restored parameters laid out for it."""
    evaluation = build_evaluation(parts, params)
    return evaluation, jax.tree.map(put_whole, params, evaluation.shardings)


if __name__ == "__main__":
    sys.exit(run_main(main))
