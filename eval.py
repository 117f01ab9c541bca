"""Scores a run on a split of its data.

    python eval.py --workdir=runs/lcqmc
    python eval.py --workdir=runs/lcqmc --split=test --step=2000
    python eval.py --workdir=runs/large --config.mesh.fsdp=1 --config.train.evaluation_batch_size=8

Rebuilds the model from the run's folder alone, prints the task's official scores and writes them to
`<workdir>/scores_<split>.json`. The run's mesh is used unless another is given.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from train import build_evaluation, evaluate
from zoo.command_line import Parser, run_main, split_overrides
from zoo.errors import UserError, near
from zoo.run import CHECKPOINTS, reassemble
from zoo.training.atomic import write_atomically
from zoo.training.checkpoints import restore_numpy


def main(argv: list[str]) -> int:
    arguments, overrides = split_overrides(argv)
    parser = Parser(prog="eval.py", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run")
    parser.add_argument("--split", default="dev", help="split of the run's data (default: dev)")
    parser.add_argument("--step", type=int, help="checkpoint to score (default: the newest)")
    flags = parser.read(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    scores = score(flags.workdir, flags.split, flags.step, overrides)
    for name, value in scores.items():
        print(f"{flags.split} {name} {value:.4f}")
    return 0


def score(
    workdir: Path, split: str, step: int | None = None, overrides: Sequence[tuple[str, str]] = ()
) -> dict[str, float]:
    """The scores of the run in `workdir` on `split`, at checkpoint `step` (None: the newest); also written beside it.

    Raises:
      UserError: no run, no such split, no valid checkpoint, or an override of something else than the place.
    """
    parts = reassemble(workdir, overrides)
    if split not in parts.source.splits():
        raise UserError(f"the run's data have no split {split!r}; {near(split, parts.source.splits())}")
    restored = restore_numpy(workdir / CHECKPOINTS, step=step, part="params")
    examples = parts.examples(split, workdir)
    params = restored.state["params"]
    scores = evaluate(build_evaluation(parts, params), params, examples)
    report = {"step": restored.step, "split": split, "examples": len(examples), "scores": scores}
    write_atomically(workdir / f"scores_{split}.json", json.dumps(report, indent=2).encode() + b"\n")
    return scores


if __name__ == "__main__":
    sys.exit(run_main(main))
