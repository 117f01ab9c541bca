"""Flip-flop language: one bit to keep in mind while others go by."""

from __future__ import annotations

import dataclasses

import numpy as np

from zoo.data.registration import registry
from zoo.data.synthetic.stream import Synthetic
from zoo.errors import UserError

WRITE, READ, IGNORE = "w", "r", "i"


@registry.register("flip_flop")
@dataclasses.dataclass(frozen=True)
class FlipFlop(Synthetic):
    """Flip-flop language FFL(p): pairs of an instruction and a bit; after `r` stands the bit of the last `w`, which is to be predicted.

    The first instruction is `w`, the last `r`; each other is `i` with probability p = `ignore`, else `w` or `r` with (1 − p)/2
    each. Bits after `w` and `i` are fair coins. The paper trains on FFL(0.8) and looks for glitches in FFL(0.98), where the last
    `w` is far away, and in FFL(0.1).
    Source: Liu et al. 2023 (arXiv:2306.00946).

    Attributes:
      length: of every row, in words; even.
      ignore: p.
    """

    length: int = 512
    ignore: float = 0.8

    def __post_init__(self):
        super().__post_init__()
        if self.length < 4 or self.length % 2:
            raise UserError(
                f"data source {self.name!r}: length is {self.length}; pairs make an even number, at least 4"
            )
        if not 0 <= self.ignore <= 1:
            raise UserError(f"data source {self.name!r}: ignore is {self.ignore}; it is a probability")

    def draw(self, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
        pairs = self.length // 2
        uniform = rng.random(pairs)
        instructions = np.where(uniform < self.ignore, IGNORE, np.where(uniform < (1 + self.ignore) / 2, WRITE, READ))
        instructions[0], instructions[-1] = WRITE, READ
        bits = rng.integers(2, size=pairs)
        last_write = np.maximum.accumulate(np.where(instructions == WRITE, np.arange(pairs), 0))
        reads = instructions == READ
        bits = np.where(reads, bits[last_write], bits)
        words = np.stack([instructions, bits.astype(str)], axis=1).reshape(-1).tolist()
        return words, 2 * np.flatnonzero(reads) + 1
