"""Learning-rate schedules: warm-up from zero to the peak, then a decay to `end` times the peak.

The learning rate of an update is that of the number of updates before it: the first update of a warmed-up run has rate 0,
as in the released BERT and NEZHA code.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import optax

from zoo.errors import UserError
from zoo.registry import Registry

registry = Registry("schedule")
names = registry.names


@dataclasses.dataclass(frozen=True)
class Constant:
    """η(t) = peak · min(1, t/W) for ever. `warmup` is a number of steps, or, as a float below 1, a share of all steps."""

    warmup: int | float = 0

    def __post_init__(self) -> None:
        if self.warmup < 0 or (isinstance(self.warmup, float) and self.warmup >= 1.0):
            raise ValueError(f"warmup is a whole number of steps or a share in [0, 1) of them, not {self.warmup!r}")

    def warmup_steps(self, steps: int) -> int:
        """W for a run of `steps` steps.

        Raises:
          UserError: the warm-up would not end before the run does.
        """
        warmup = round(self.warmup * steps) if isinstance(self.warmup, float) else self.warmup
        if steps < 1:
            raise UserError(f"a schedule needs at least one step, not {steps}")
        if warmup >= steps:
            raise UserError(f"a warm-up of {warmup} steps does not end within a run of {steps}; make warmup smaller")
        return warmup

    def decay(self, peak: float, warmup: int, steps: int) -> optax.Schedule:
        """What follows the warm-up, as a function of the steps since its end."""
        return optax.constant_schedule(peak)

    def build(self, peak: float, steps: int) -> optax.Schedule:
        """The schedule of a run of `steps` steps: (updates so far) → learning rate."""
        warmup = self.warmup_steps(steps)
        decay = self.decay(peak, warmup, steps)
        if warmup == 0:
            return decay
        return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


registry.register("constant")(Constant)


@dataclasses.dataclass(frozen=True)
class _Decay(Constant):
    """A schedule that falls to `end` times the peak at the last step."""

    end: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.end <= 1.0:
            raise ValueError(f"end is the last learning rate as a share of the peak, in [0, 1], not {self.end!r}")


@registry.register("polynomial")
@dataclasses.dataclass(frozen=True)
class Polynomial(_Decay):
    """η(t) = (peak − e)·((T − t)/(T − T₀))^power + e with e = end · peak, after a warm-up of W steps.

    `start="warmup"`: T₀ = W, so that the curve is continuous (NEZHA's corrected start: η·(1 − t/T)/(1 − W/T) for power 1).
    `start="zero"`: T₀ = 0 as in Google's BERT and NVIDIA's LAMB recipe (arXiv 1904.00962 with power 0.5): the rate drops
    by the factor (1 − W/T)^power where the warm-up ends.
    """

    power: float = 1.0
    start: Literal["warmup", "zero"] = "warmup"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power <= 0:
            raise ValueError(f"power must be positive, not {self.power!r}")

    def decay(self, peak: float, warmup: int, steps: int) -> optax.Schedule:
        begin = warmup if self.start == "warmup" else 0
        curve = optax.polynomial_schedule(peak, self.end * peak, self.power, steps - begin)
        return lambda count: curve(count + (warmup - begin))


@registry.register("linear")
@dataclasses.dataclass(frozen=True)
class Linear(_Decay):
    """`Polynomial` with power 1."""

    start: Literal["warmup", "zero"] = "warmup"

    def decay(self, peak: float, warmup: int, steps: int) -> optax.Schedule:
        return Polynomial(self.warmup, self.end, 1.0, self.start).decay(peak, warmup, steps)


@registry.register("cosine")
@dataclasses.dataclass(frozen=True)
class Cosine(_Decay):
    """η(t) = peak · (end + (1 − end) · ½(1 + cos(π (t − W)/(T − W)))) after the warm-up (SGDR without restarts, arXiv 1608.03983)."""

    def decay(self, peak: float, warmup: int, steps: int) -> optax.Schedule:
        return optax.cosine_decay_schedule(peak, steps - warmup, alpha=self.end)
