"""What of a run depends on the length of its rows: what `eval.py --lengths` computes, writes and draws."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from train import Evaluation, build_evaluation, evaluate, predict
from zoo.atomic import write_atomically
from zoo.errors import UserError
from zoo.evaluation.by_position import by_position
from zoo.evaluation.passkeys import passkey_rows
from zoo.evaluation.pictures import picture
from zoo.evaluation.resolution import attention_resolution, expected_scores
from zoo.evaluation.sliding import Windows
from zoo.run import CHECKPOINTS, Parts, reassemble, split_of
from zoo.tasks.causal_lm import CausalLM
from zoo.tasks.recall import Recall
from zoo.training.checkpoints import restore_numpy
from zoo.training.sharding import BATCH_AXES, put_whole

TOKENS = 1 << 16
DEPTHS = tuple(k / 10 for k in range(11))
RESOLUTION_ROWS = 8


def score_at_lengths(
    workdir: Path, lengths: Sequence[int], split: str = "dev", *, tokens: int, rows_of: int = 1 << 13
) -> dict[int, dict[str, float] | UserError]:
    """The scores of the newest checkpoint on rows of each length: those of the first `tokens` tokens of `split`.

    The text is cut anew for each length, so the same tokens are predicted with more before them; a source that is drawn by rule
    draws longer rows. A length that the model's encoding cannot serve has its refusal for an answer.

    Args:
      rows_of: tokens of one batch, about.

    Raises:
      UserError: no run, or no such split.
    """
    parts = reassemble(workdir)
    params = restore_numpy(workdir / CHECKPOINTS, part="params").state["params"]
    scores: dict[int, dict[str, float] | UserError] = {}
    for length in lengths:
        sized = AtLength.of(parts.at_length(length), params, split, workdir, tokens, rows_of)
        try:
            scores[length] = sized.scores()
        except UserError as refusal:
            scores[length] = refusal
    return scores


def score_lengths(
    workdir: Path,
    split: str,
    lengths: Sequence[int],
    *,
    tokens: int = TOKENS,
    stride: int | None = None,
    keys: int | None = None,
    step: int | None = None,
    overrides: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """What of a run depends on length, on the first `tokens` tokens of `split`; also written and drawn beside the run.

    Args:
      stride: for causal_lm, score also through a window that moves by so many tokens.
      keys: for causal_lm, hide so many passkeys at each length and depth.

    Raises:
      UserError: no run, no such split or checkpoint, or something that this run cannot be scored on. A length that the
        encoding refuses is none: its refusal stands in the report.
    """
    parts = reassemble(workdir, overrides)
    for name, value in (("--sliding", stride), ("--passkey", keys)):
        if value is not None and not isinstance(parts.task, CausalLM):
            raise UserError(f"{name} is for runs of task 'causal_lm', not {parts.task.name!r}")
    if stride is not None and not 1 <= stride < min(lengths):
        raise UserError(f"--sliding={stride}: expected 1 to {min(lengths) - 1}, less than every length")
    if tokens < max(lengths):
        raise UserError(
            f"--tokens={tokens} is not one row of {max(lengths)} tokens; raise it, or leave that length out"
        )
    if keys is not None and keys < 1:
        raise UserError(f"--passkey={keys}: at least one key at each length and depth")
    restored = restore_numpy(workdir / CHECKPOINTS, step=step, part="params")
    text = split_of(parts.at({"max_length": tokens}), split, workdir)[0] if stride is not None else None
    report = {
        "step": restored.step,
        "split": split,
        "trained_at": parts.task.max_length,
        "tokens": tokens,
        "lengths": {},
    }
    for length in lengths:
        sized = AtLength.of(parts.at_length(length), restored.state["params"], split, workdir, tokens)
        slid = None if text is None else Windows(text, length, stride, parts.tokenizer.vocabulary.pad)
        try:
            report["lengths"][str(length)] = sized.measured(slid)
        except UserError as refusal:
            report["lengths"][str(length)] = {"refused": str(refusal)}
    if keys is not None:
        report["passkey"] = {"depths": DEPTHS, "keys": keys, "lengths": {}}
        for length in lengths:
            try:
                found = passkeys_found(parts, restored.state["params"], length, keys)
            except UserError as refusal:
                found = str(refusal)
            report["passkey"]["lengths"][str(length)] = found
    write_atomically(workdir / f"lengths_{split}.json", json.dumps(report, indent=2).encode() + b"\n")
    if (drawn := picture(report)) is not None:
        write_atomically(workdir / f"lengths_{split}.png", drawn)
    return report


class AtLength(NamedTuple):
    """A run on rows of one length."""

    evaluation: Evaluation
    params: Any
    placed_params: Any
    rows: Sequence

    @classmethod
    def of(cls, parts: Parts, params: Any, split: str, workdir: Path, tokens: int, rows_of: int = 1 << 13) -> AtLength:
        """On the first `tokens` tokens of `split`, in batches of about `rows_of`."""
        length, every = parts.task.max_length, split_of(parts, split, workdir)
        few = [every[row] for row in range(min(len(every), max(1, tokens // length)))]
        return cls.on(parts, params, few, rows_of)

    @classmethod
    def on(cls, parts: Parts, params: Any, rows: Sequence, rows_of: int = 1 << 13) -> AtLength:
        evaluation, placed_params = placed(parts, params)
        shards = math.prod(evaluation.mesh.shape[axis] for axis in BATCH_AXES)
        batch_size = shards * max(1, rows_of // (parts.task.max_length * shards))
        return cls(evaluation._replace(batch_size=batch_size), params, placed_params, rows)

    def scores(self) -> dict[str, float]:
        return evaluate(self.evaluation, self.placed_params, self.rows)

    def measured(self, slid: Windows | None) -> dict[str, Any]:
        """The scores; of a task that predicts a loss for each token also its mean by position, and attention resolution;
        and the scores through a sliding window."""
        parts = self.evaluation.parts
        predictions = predict(self.evaluation, self.placed_params, self.rows)
        found: dict[str, Any] = {"rows": len(self.rows), "scores": parts.task.score(predictions, self.rows)}
        if not isinstance(parts.task, CausalLM | Recall):
            return found
        found["by_position"] = by_position(predictions["loss"], predictions["weight"])
        few = [parts.features(row, np.random.default_rng(0)) for row in self.rows[:RESOLUTION_ROWS]]
        try:
            resolution = attention_resolution(expected_scores(parts.model, self.params["model"], few))
            found["resolution"] = {"mean": float(resolution.mean()), "by_layer": resolution.mean(axis=1).tolist()}
        except UserError as refusal:
            found["resolution"] = {"refused": str(refusal)}
        if slid is not None:
            predictions = predict(self.evaluation, self.placed_params, slid)
            counted = {name: values * slid.scored() for name, values in predictions.items()}
            found["sliding"] = {"stride": slid.stride, **parts.task.score(counted, slid)}
        return found


def passkeys_found(parts: Parts, params: Any, length: int, keys: int) -> list[float]:
    """How many of `keys` passkeys the run finds in rows of `length` tokens, at each of `DEPTHS`.

    All digits must be the likeliest piece with the right ones before them, which is when greedy decoding writes the key.
    """
    task = Recall(max_length=length)
    parts = dataclasses.replace(parts, task=task, module=task.module(parts.model))
    rows = [row for depth in DEPTHS for row in passkey_rows(parts.tokenizer, length, depth, keys)]
    sized = AtLength.on(parts, params, rows)
    predictions = predict(sized.evaluation, sized.placed_params, rows)
    whole = (predictions["correct"] == predictions["weight"]).all(axis=1)
    return whole.reshape(len(DEPTHS), keys).mean(axis=1).tolist()


def lines(report: dict[str, Any]) -> Iterator[str]:
    """What is printed of a report."""
    for length, entry in report["lengths"].items():
        if "refused" in entry:
            yield f"length {length} refused: {entry['refused']}"
            continue
        said = [f"{name} {value:.4f}" for name, value in entry["scores"].items()]
        said += [
            f"sliding {name} {entry['sliding'][name]:.4f}" for name in ("loss", "perplexity") if "sliding" in entry
        ]
        resolution = entry.get("resolution", {})
        said += [f"resolution {resolution['mean']:.4g}"] if "mean" in resolution else []
        yield f"length {length} {', '.join(said)}"
        if "refused" in resolution:
            yield f"length {length} resolution refused: {resolution['refused']}"
    for length, found in report.get("passkey", {}).get("lengths", {}).items():
        spelled = found if isinstance(found, str) else " ".join(f"{share:.2f}" for share in found)
        yield f"passkey length {length} {'refused: ' if isinstance(found, str) else ''}{spelled}"


def placed(parts: Parts, params: Any) -> tuple[Evaluation, Any]:
    """The compiled evaluation of a run, and restored parameters laid out for it."""
    evaluation = build_evaluation(parts, params)
    return evaluation, jax.tree.map(put_whole, params, evaluation.shardings)
