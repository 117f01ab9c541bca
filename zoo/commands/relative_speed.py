"""How fast one run trains beside another on the same machine at the same time."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import jax
from ml_collections import ConfigDict

import train as training
from zoo.run import assemble
from zoo.training.sharding import put_batch

ROUNDS, STEPS = 9, 10


class Stepper:
    """A run's compiled update, applied to random parameters and its own batches; nothing of it is kept."""

    def __init__(self, config: ConfigDict, folder: Path):
        trainer = training.build_trainer(assemble(config, folder), folder)
        (stage,) = trainer.stages
        self._batches = [put_batch(stage.pipeline.batch(step), trainer.mesh) for step in range(STEPS)]
        self._state: Any = training.initial(trainer)
        # Ahead of time: such a program outlives `jax.clear_caches`.
        self._update = stage.train_step.lower(self._state, self._batches[0]).compile()
        self.seconds()  # the first turn also allocates

    def seconds(self) -> float:
        """The time of `STEPS` updates: the processor's on a CPU, which others may be using too, else the clock's."""
        clock = time.process_time if jax.default_backend() == "cpu" else time.monotonic
        begin = clock()
        for batch in self._batches:
            self._state, _ = self._update(self._state, batch)
        jax.block_until_ready(self._state)
        return clock() - begin


def relative_speed(one: Stepper, other: Stepper) -> float:
    """Updates per second of `one` relative to `other`: the median of the ratios of turns they take.

    Each ratio is of two turns next to each other, so that what else the machine does for a while bears on both.
    """
    return median(other.seconds() / one.seconds() for _ in range(ROUNDS))
