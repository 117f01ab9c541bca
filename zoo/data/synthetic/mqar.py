"""Multi-query associative recall."""

from __future__ import annotations

import dataclasses

import numpy as np

from zoo.data.registration import registry
from zoo.data.synthetic.stream import Synthetic
from zoo.errors import UserError


@registry.register("mqar")
@dataclasses.dataclass(frozen=True)
class Mqar(Synthetic):
    """Multi-query associative recall: key–value pairs, then each key again in its time, and its value is to be predicted.

    A row is `k₁ v₁ … k_n v_n` and slots of two words after it. Each key is asked once, in a slot of its own drawn without
    replacement, slot g = 1, 2, … in proportion to power · g^(power − 1): most soon, some late. Keys and values are drawn without
    replacement from the two halves of the vocabulary.
    Source: Arora et al. 2023 (arXiv:2312.04927). Here the value stands in the row after its key asked
    again, where their row goes on; and what fills the other slots is drawn from the words that no pair of the row holds, so that
    a key has one value only.

    Attributes:
      length: of every row, in words; even, at least 4 for each pair.
      pairs: n.
      vocabulary: words in all, keys and values together.
      power: of the law of the gaps; 1 is uniform.
    """

    pairs: int = 8
    vocabulary: int = 8192
    power: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        if self.pairs < 1 or self.length % 2 or self.length < 4 * self.pairs:
            raise UserError(
                f"data source {self.name!r}: length is {self.length}; {self.pairs} pairs, each asked once, need an even number, "
                f"at least {4 * max(1, self.pairs)}"
            )
        if self.vocabulary % 2 or self.vocabulary < 2 * self.pairs + 2:
            raise UserError(
                f"data source {self.name!r}: vocabulary is {self.vocabulary}; {self.pairs} different keys and values, and some to "
                f"fill, need an even number, at least {2 * self.pairs + 2}"
            )
        if self.power <= 0:
            raise UserError(f"data source {self.name!r}: power is {self.power}; it must be above 0")

    def draw(self, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
        n, half = self.pairs, self.vocabulary // 2
        keys, values = rng.permutation(half), half + rng.permutation(half)
        # Filled at random with the words of either kind that the pairs leave over.
        spare = np.concatenate([keys[n:], values[n:]])
        row = spare[rng.integers(len(spare), size=self.length)]
        slots = self.length // 2 - n
        chance = np.arange(1, slots + 1) ** (self.power - 1)
        asked = 2 * (n + rng.choice(slots, size=n, replace=False, p=chance / chance.sum()))
        row[0 : 2 * n : 2], row[1 : 2 * n : 2] = keys[:n], values[:n]
        row[asked], row[asked + 1] = keys[:n], values[:n]
        return [f"k{word}" if word < half else f"v{word - half}" for word in row.tolist()], np.sort(asked + 1)
