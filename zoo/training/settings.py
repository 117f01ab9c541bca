"""The scalars of a run: how long, how much at a time, what is written when, over which devices and processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from zoo.training.loss_scale import LossScale
from zoo.training.stages import Stage, lay_out


@dataclass(frozen=True)
class RunSettings:
    """`config.train`.

    Attributes:
      steps, epochs: the length of the run; exactly one is given, but where `stages` say it.
      batch_size: examples of an update, over all devices and micro-batches.
      accumulation: micro-batches that an update is computed in.
      stages: stretches of the run with their own batches and values of the task: a tuple of mappings with the fields of
        `zoo.training.stages.StageSettings`. Empty: the run is one stage.
      log_every: steps between the lines of metrics.jsonl.
      evaluate_every: steps between evaluations on the dev split; 0 evaluates at the end only, None never.
      evaluation_batch_size: None = batch_size.
      checkpoint_every: steps between checkpoints; 0 saves at the end only.
      keep: checkpoints to keep.
      nonfinite: what a non-finite loss does: "stop" the run, or "skip" the step.
      loss_scale, loss_scale_interval: of float16 alone: the loss scale at the start, a power of two, and the updates in a
        row after which it doubles.
      tensorboard: whether to write TensorBoard's event files.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 32
    accumulation: int = 1
    stages: tuple[Any, ...] = ()
    log_every: int = 50
    evaluate_every: int | None = 0
    evaluation_batch_size: int | None = None
    checkpoint_every: int = 1000
    keep: int = 2
    nonfinite: Literal["stop", "skip"] = "stop"
    loss_scale: float = 2.0**16
    loss_scale_interval: int = 2000
    tensorboard: bool = True

    def __post_init__(self):
        if self.stages and self.epochs is not None:
            raise ValueError(f"stages are counted in steps: give steps or their own instead of epochs={self.epochs}")
        if not self.stages and (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give exactly one of steps and epochs, not steps={self.steps} and epochs={self.epochs}")
        for name in ("steps", "epochs", "batch_size", "accumulation", "log_every", "evaluation_batch_size", "keep"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, not {value}")
        for name in ("evaluate_every", "checkpoint_every"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size={self.batch_size} is no multiple of accumulation={self.accumulation}")
        self.scaling("float16")
        if self.stages:
            self.plan(num_examples=1)

    def scaling(self, dtype: str) -> LossScale | None:
        """How the loss is scaled where activations are of `dtype`: only float16 is too narrow for small gradients."""
        return LossScale(self.loss_scale, self.loss_scale_interval) if dtype == "float16" else None

    def plan(self, num_examples: int) -> tuple[Stage, ...]:
        """The stages of the run. Without `stages` it is one, of `steps`, or as many as `epochs` passes over the examples need."""
        if self.stages:
            return lay_out(self.stages, self.steps, self.batch_size, self.accumulation)
        steps = self.steps or max(1, round(self.epochs * num_examples / self.batch_size))
        return (Stage(0, steps, 0, self.batch_size, self.accumulation, {}),)


@dataclass(frozen=True)
class MeshSettings:
    """`config.mesh`: the size of each mesh axis; −1 takes the devices that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1


@dataclass(frozen=True)
class ProcessSettings:
    """`config.processes`: the processes of one run, on one host or several; nothing of it is kept in the run's config.json.

    Attributes:
      detect: whether to ask the cluster (Cloud TPU pod, SLURM, Open MPI, Kubernetes) for the three below; then the command is
        the same on every host.
      count: processes of the run.
      index: which of them this one is, from 0.
      coordinator: host:port of process 0, with a port that is free there.
      lost_after: seconds without a sign of life after which a process counts as lost and the others stop.
      start_within: seconds within which all processes must have started.
      wait: seconds that processes wait for one another, data preparation by process 0 included.
    """

    detect: bool = False
    count: int = 1
    index: int | None = None
    coordinator: str | None = None
    lost_after: float = 60.0
    start_within: float = 300.0
    wait: float = 86400.0

    def __post_init__(self):
        for name in ("count", "lost_after", "start_within", "wait"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.detect and (self.count > 1 or self.index is not None or self.coordinator is not None):
            raise ValueError("detect finds count, index and coordinator by itself; give either it or them")
        if self.count > 1 and (self.index is None or self.coordinator is None):
            raise ValueError(f"count={self.count} also needs index (0 to {self.count - 1}) and coordinator (host:port)")
        if self.index is not None and not 0 <= self.index < self.count:
            raise ValueError(f"index={self.index} is not one of 0 to {self.count - 1} of count={self.count}")
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdecimal():
            raise ValueError(f"coordinator is host:port of process 0, not {self.coordinator!r}")
