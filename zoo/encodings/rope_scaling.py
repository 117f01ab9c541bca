"""How rotary frequencies change so that a model reads further than it was trained: parts of `rope`, under `scaling`."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from zoo.registry import Registry


@dataclass(frozen=True)
class Scaling(abc.ABC):
    """A change of the rotary frequencies θ_m; `temperature` multiplies cos and sin, so logits by its square."""

    name: ClassVar[str]

    @abc.abstractmethod
    def frequencies(self, theta: float, rotary_dim: int, length: int) -> np.ndarray:
        """θ'_m, float64 `[R/2]`, from the base `theta`; `length` is the longest sequence of this call."""

    @property
    def temperature(self) -> float:
        return 1.0


registry = Registry("rope scaling", Scaling)


def plain_frequencies(theta: float, rotary_dim: int) -> np.ndarray:
    """θ_m = theta^(−2m/R), float64 `[R/2]`."""
    return theta ** (-2.0 * np.arange(rotary_dim // 2) / rotary_dim)


@registry.register("linear")
@dataclass(frozen=True)
class Linear(Scaling):
    """Position interpolation: θ'_m = θ_m / factor, as if positions were p / factor (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float

    def __post_init__(self):
        check(self.factor)

    def frequencies(self, theta: float, rotary_dim: int, length: int) -> np.ndarray:
        return plain_frequencies(theta, rotary_dim) / self.factor


@registry.register("ntk")
@dataclass(frozen=True)
class Ntk(Scaling):
    """NTK-aware: theta' = theta · factor^(R/(R−2)), so that the slowest pair is interpolated and the fastest kept.

    Source: bloc97 2023, as described in Peng et al. 2023 (arXiv:2309.00071).
    """

    factor: float

    def __post_init__(self):
        check(self.factor)

    def frequencies(self, theta: float, rotary_dim: int, length: int) -> np.ndarray:
        return plain_frequencies(raised(theta, self.factor, rotary_dim), rotary_dim)


@registry.register("dynamic_ntk")
@dataclass(frozen=True)
class DynamicNtk(Scaling):
    """NTK-aware by the length n of the call: theta' = theta · (factor n/L − (factor − 1))^(R/(R−2)) for n > L = original_length.

    n is static: the length of the sequence, or with a cache its capacity, so that all keys of one cache turn by one base
    (transformers changes it step by step and leaves earlier keys as they are). A packed row counts whole. Packing and
    decoding therefore give what a sequence of n tokens gives, not what a shorter one gives; every other scaling is fixed.
    Source: Peng et al. 2023 (arXiv:2309.00071); transformers, `_compute_dynamic_ntk_parameters`.
    """

    factor: float
    original_length: int

    def __post_init__(self):
        check(self.factor, self.original_length)

    def frequencies(self, theta: float, rotary_dim: int, length: int) -> np.ndarray:
        if length <= self.original_length:
            return plain_frequencies(theta, rotary_dim)
        stretch = self.factor * length / self.original_length - (self.factor - 1)
        return plain_frequencies(raised(theta, stretch, rotary_dim), rotary_dim)


@registry.register("yarn")
@dataclass(frozen=True)
class Yarn(Scaling):
    """YaRN: pairs that turn often in L tokens keep their frequency, those that turn seldom are interpolated, a ramp between.

        θ'_m = θ_m ((1 − g_m) / factor + g_m),  temperature μ = 0.1 ln(factor) + 1

    With c(x) = R ln(L / (2π x)) / (2 ln theta) the pair that turns x times, ramp="index" has g fall from 1 at ⌊c(fast)⌋ to 0
    at ⌈c(slow)⌉ in m, as the released code and every checkpoint; "rotations" is the paper's, linear in L θ_m / 2π from slow
    to fast. `attention_factor` replaces μ.
    Source: Peng et al. 2023 (arXiv:2309.00071) and its repository.
    """

    factor: float
    original_length: int
    fast: float = 32.0
    slow: float = 1.0
    ramp: Literal["index", "rotations"] = "index"
    attention_factor: float | None = None

    def __post_init__(self):
        check(self.factor, self.original_length)
        if not 0 < self.slow < self.fast:
            raise ValueError(f"slow={self.slow} and fast={self.fast} are turns: 0 < slow < fast")

    def frequencies(self, theta: float, rotary_dim: int, length: int) -> np.ndarray:
        plain = plain_frequencies(theta, rotary_dim)
        if self.ramp == "rotations":
            turns = self.original_length * plain / (2 * math.pi)
            kept = np.clip((turns - self.slow) / (self.fast - self.slow), 0.0, 1.0)
        else:
            low, high = self.ends(theta, rotary_dim)
            kept = 1.0 - np.clip((np.arange(rotary_dim // 2) - low) / (high - low), 0.0, 1.0)
        return plain * ((1.0 - kept) / self.factor + kept)

    def ends(self, theta: float, rotary_dim: int) -> tuple[float, float]:
        """Where the ramp in the index begins and ends."""

        def pair(turns: float) -> float:
            return rotary_dim * math.log(self.original_length / (2 * math.pi * turns)) / (2 * math.log(theta))

        low, high = max(math.floor(pair(self.fast)), 0), min(math.ceil(pair(self.slow)), rotary_dim - 1)
        return low, high + 0.001 if low == high else high

    @property
    def temperature(self) -> float:
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor


@registry.register("llama3")
@dataclass(frozen=True)
class Llama3(Scaling):
    """Llama 3.1: by wavelength λ_m = 2π/θ_m, short ones (λ < L/high) stay, long ones (λ > L/low) are interpolated.

    Between them θ' = (1 − z) θ/factor + z θ, z = (L/λ − low)/(high − low).
    Source: Llama team 2024 (arXiv:2407.21783); transformers, `_compute_llama3_parameters`.
    """

    factor: float = 8.0
    original_length: int = 8192
    low: float = 1.0
    high: float = 4.0

    def __post_init__(self):
        check(self.factor, self.original_length)
        if not 0 < self.low < self.high:
            raise ValueError(f"low={self.low} and high={self.high} divide the original length: 0 < low < high")

    def frequencies(self, theta: float, rotary_dim: int, length: int) -> np.ndarray:
        plain = plain_frequencies(theta, rotary_dim)
        turns = self.original_length * plain / (2 * math.pi)
        kept = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return plain * ((1.0 - kept) / self.factor + kept)


def raised(theta: float, stretch: float, rotary_dim: int) -> float:
    """The base that interpolates the slowest pair by `stretch`.

    Raises:
      ValueError: there is one pair only, the fastest, which is never interpolated.
    """
    if rotary_dim < 4:
        raise ValueError(f"rope scaling by NTK needs at least 4 rotary channels, not {rotary_dim}; use linear or yarn")
    return theta * stretch ** (rotary_dim / (rotary_dim - 2))


def check(factor: float, original_length: int = 1) -> None:
    """Refuses values that no scaling has.

    Raises:
      ValueError: the factor is below 1, or the length is not positive.
    """
    if factor < 1:
        raise ValueError(f"factor={factor} stretches positions; it must be at least 1")
    if original_length < 1:
        raise ValueError(f"original_length={original_length} is the length of training; it must be at least 1")
