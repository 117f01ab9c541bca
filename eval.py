"""Scores a run on a split of its data.

    python eval.py --workdir=runs/lcqmc
    python eval.py --workdir=runs/lcqmc --split=test --step=2000
    python eval.py --workdir=runs/large --config.mesh.fsdp=1 --config.train.evaluation_batch_size=8
    python eval.py --workdir=runs/lm --lengths=128,256,512,1024 --sliding=64 --passkey

On several hosts, with the same `--config.processes` as train.py; process 0 writes and prints.

Rebuilds the model from the run's folder alone, prints the task's official scores and writes them to
`<workdir>/scores_<split>.json`. The run's mesh is used unless another is given.

With `--lengths` the run is scored on rows of each of these lengths instead, and what depends on length is written to
`<workdir>/lengths_<split>.json` and drawn as `lengths_<split>.png` (docs/evaluation.md).
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from train import evaluate
from zoo.atomic import write_atomically
from zoo.command_line import Parser, outcome, run_main, split_overrides
from zoo.commands.lengths import TOKENS, lines, placed, score_at_lengths, score_lengths
from zoo.errors import UserError
from zoo.run import CHECKPOINTS, override_processes, reassemble, split_of
from zoo.training.checkpoints import restore_numpy
from zoo.training.processes import Processes, joined

__all__ = ["main", "score", "score_at_lengths", "score_lengths", "split_of"]


def main(argv: list[str]) -> int:
    arguments, overrides = split_overrides(argv)
    parser = Parser(prog="eval.py", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run")
    parser.add_argument("--split", default="dev", help="split of the run's data (default: dev)")
    parser.add_argument("--step", type=int, help="checkpoint to score (default: the newest)")
    parser.add_argument("--lengths", help="score on rows of these lengths instead, comma-separated")
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, help=f"of the split, to score at each length (default: {TOKENS})"
    )
    parser.add_argument("--sliding", type=int, help="score causal_lm also through a window moved by so many tokens")
    parser.add_argument(
        "--passkey", type=int, nargs="?", const=20, help="hide so many keys (20) at each length and depth"
    )
    flags = parser.read(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    settings, overrides = override_processes(overrides)
    if flags.lengths is not None:
        if settings.count > 1 or settings.detect:
            raise UserError("--lengths runs on one process; leave config.processes out")
        options = dict(
            tokens=flags.tokens, stride=flags.sliding, keys=flags.passkey, step=flags.step, overrides=overrides
        )
        report = score_lengths(flags.workdir, flags.split, integers(flags.lengths), **options)
        print("\n".join(f"{flags.split} {line}" for line in lines(report)))
        return 0
    for name in ("tokens", "sliding", "passkey"):
        if getattr(flags, name) != parser.get_default(name):
            raise UserError(f"--{name} belongs to --lengths, which is not given")
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


def integers(text: str) -> tuple[int, ...]:
    """The lengths of `--lengths`, in rising order."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"--lengths takes integers with commas between them, not {text!r}") from None
    if found[0] < 4:
        raise UserError(f"--lengths={text}: a row has at least 4 tokens")
    return tuple(found)


if __name__ == "__main__":
    sys.exit(run_main(main))
