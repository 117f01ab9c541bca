"""Copying a string of random words."""

from __future__ import annotations

import dataclasses
from typing import Self

import numpy as np

from zoo.data.registration import registry
from zoo.data.synthetic.stream import Synthetic
from zoo.errors import UserError

BEGIN, AGAIN = "begin", "again"


@registry.register("copy")
@dataclasses.dataclass(frozen=True)
class Copy(Synthetic):
    """Copying: `begin x₁ … x_n again x₁ … x_n` of random words x, of which the second half is to be predicted.

    n = length/2 − 1 in every row, or, with `shortest`, drawn uniformly from shortest … length/2 − 1, so that no fixed look-back
    solves the task; rows are then of several lengths up to `length`.
    Sources: Graves et al. 2014 (arXiv:1410.5401), section 4.1; for length generalisation Jelassi et al. 2024 (arXiv:2402.01032).

    Attributes:
      length: of the longest rows, in words; even.
      vocabulary: how many different words x may be.
      shortest: the fewest words to copy; None: as many as a row holds.
    """

    vocabulary: int = 32
    shortest: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.length < 4 or self.length % 2:
            raise UserError(f"data source {self.name!r}: length is {self.length}; it must be even and at least 4")
        if self.vocabulary < 2:
            raise UserError(f"data source {self.name!r}: vocabulary is {self.vocabulary}; it must be at least 2")
        if self.shortest is not None and not 1 <= self.shortest <= self._longest:
            raise UserError(
                f"data source {self.name!r}: shortest is {self.shortest}; a row of {self.length} words copies 1 to {self._longest}"
            )

    @property
    def _longest(self) -> int:
        return self.length // 2 - 1

    def at_length(self, length: int) -> Self:
        """Every row as long as `length` says."""
        return dataclasses.replace(self, length=length, shortest=None)

    def draw(self, rng: np.random.Generator) -> tuple[list[str], range]:
        count = self._longest if self.shortest is None else int(rng.integers(self.shortest, self._longest + 1))
        copied = [f"x{word}" for word in rng.integers(self.vocabulary, size=count)]
        return [BEGIN, *copied, AGAIN, *copied], range(count + 2, 2 * count + 2)
