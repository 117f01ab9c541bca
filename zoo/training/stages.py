"""Stages of a run: stretches of its steps, each with its own batch size and its own values of the task.

BERT trains nine steps of ten on rows of 128 tokens and the last on rows of 512 (arXiv:1810.04805, appendix A.2). State, optimizer and
schedule run through; what a stage begins with follows from the settings alone, so that a checkpoint need hold no more than the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from zoo.errors import UserError
from zoo.registry import make


@dataclass(frozen=True)
class StageSettings:
    """One entry of `config.train.stages`.

    Attributes:
      steps: the length of the stage: a whole number, or, as a float, a share of `train.steps`.
      batch_size, accumulation: None = those of `train`.
      task: the values of `config.task` that the stage replaces, such as `max_length` and `max_predictions`.
    """

    steps: int | float
    batch_size: int | None = None
    accumulation: int | None = None
    task: Mapping | None = None

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulation"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if "name" in (self.task or {}):
            raise ValueError("a stage replaces values of the task, not the task itself: leave task.name out")


class Stage(NamedTuple):
    """Where a stage stands in its run.

    Attributes:
      first_step, last_step: it makes the updates first_step + 1 … last_step, those of the batches first_step … last_step − 1.
      first_example: how many examples the run has seen before.
      batch_size, accumulation: as in `RunSettings`.
      task: the values of the task that it replaces.
    """

    first_step: int
    last_step: int
    first_example: int
    batch_size: int
    accumulation: int
    task: Mapping[str, Any]


def lay_out(entries: Sequence[Any], steps: int | None, batch_size: int, accumulation: int) -> tuple[Stage, ...]:
    """The stages of a run of `steps` steps from the entries of `config.train.stages`.

    Stages of whole numbers are the length of the run; `steps` may be None, or must be their sum. Stages of shares need
    `steps`; the ends are rounded, so that every step belongs to one.

    Raises:
      UserError: a wrong entry, shares and whole numbers together, or steps that do not add up; says which.
    """
    given = [make(StageSettings, entry, _where(number)) for number, entry in enumerate(entries)]
    ends = _ends([stage.steps for stage in given], steps)
    stages, first_step, first_example = [], 0, 0
    for number, (stage, end) in enumerate(zip(given, ends, strict=True)):
        if end <= first_step:
            raise UserError(
                f"{_where(number)}: {stage.steps} of {steps} steps is less than one; give it a larger share"
            )
        size, parts = stage.batch_size or batch_size, stage.accumulation or accumulation
        if size % parts:
            raise UserError(f"{_where(number)}: batch_size={size} is no multiple of accumulation={parts}")
        stages.append(Stage(first_step, end, first_example, size, parts, dict(stage.task or {})))
        first_step, first_example = end, first_example + (end - first_step) * size
    return tuple(stages)


def _ends(lengths: Sequence[int | float], steps: int | None) -> list[int]:
    """The last step of each stage."""
    shares = [isinstance(length, float) for length in lengths]
    so_far = [math.fsum(lengths[: k + 1]) for k in range(len(lengths))]
    if all(shares):
        if steps is None:
            raise UserError(
                "train.stages are shares of train.steps, which is not given; give it, or whole numbers of steps"
            )
        if not math.isclose(so_far[-1], 1.0, abs_tol=1e-6):
            raise UserError(f"the shares of train.stages add up to {so_far[-1]:g}, not to 1: {_listed(lengths)}")
        return [round(share * steps) for share in so_far]
    if any(shares):
        raise UserError(f"steps of train.stages are all whole numbers or all shares (floats), not {_listed(lengths)}")
    if steps is not None and so_far[-1] != steps:
        raise UserError(
            f"the steps of train.stages add up to {so_far[-1]:.0f} ({_listed(lengths)}), but train.steps is {steps}; leave "
            "it None, or give shares of it"
        )
    return [int(end) for end in so_far]


def _listed(lengths: Sequence[int | float]) -> str:
    return " + ".join(map(str, lengths))


def _where(number: int) -> str:
    return f"train.stages[{number}]"
