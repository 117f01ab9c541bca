"""What the synthetic sources share: splits, seeds, and records that are a pure function of where they stand."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np

from zoo.data.record import Record
from zoo.data.source import SPLITS
from zoo.errors import UserError, near

_STREAM = 3  # keeps these draws apart from the other streams of the same seed


@dataclasses.dataclass(frozen=True)
class Synthetic(abc.ABC):
    """Rows of words of which some are to be predicted from those before them; row `index` follows from (seed, split, index) alone.

    Records have the fields {"words": tuple[str, ...], "answers": tuple[int, ...]}, the latter the indices of those words, in
    rising order. Words hold no white space, so that the tokenizer `words` keeps each whole.

    Attributes:
      length: of every row, in words.
      train_examples, dev_examples, test_examples: rows of each split; a split of none is not there.
      seed: of all splits; equal rows in two splits are chance.
    """

    length: int = 128
    train_examples: int = 20_000
    dev_examples: int = 500
    test_examples: int = 500
    seed: int = 0

    def __post_init__(self):
        for name in ("train_examples", "dev_examples", "test_examples", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"data source {self.name!r}: {name} is {getattr(self, name)}; it must be at least 0")

    @abc.abstractmethod
    def draw(self, rng: np.random.Generator) -> tuple[Sequence[str], Sequence[int]]:
        """(words, answers) of one row."""

    def at_length(self, length: int) -> Self:
        """The same source with rows of another length.

        Raises:
          UserError: no row is so short.
        """
        return dataclasses.replace(self, length=length)

    def splits(self) -> tuple[str, ...]:
        return tuple(split for split in SPLITS if self._count(split))

    def records(self, split: str) -> Iterator[Record]:
        """The rows of a split; `file` is the source's and the split's name, `line` the index counted from 1.

        Raises:
          UserError: no such split.
        """
        if split not in self.splits():
            raise UserError(f"data source {self.name!r} has no split {split!r}; {near(split, self.splits())}")
        return (self.record(split, index) for index in range(self._count(split)))

    def record(self, split: str, index: int) -> Record:
        """Row `index` of a split, in time that does not depend on it."""
        key = np.random.SeedSequence([self.seed, _STREAM, SPLITS.index(split), index]).generate_state(2, np.uint64)
        words, answers = self.draw(np.random.Generator(np.random.Philox(key=key)))
        fields = {"words": tuple(words), "answers": tuple(int(answer) for answer in answers)}
        return Record(fields, f"{self.name}:{split}", index + 1)

    def fingerprint(self) -> str:
        """SHA-256 of the arguments, which are all that the rows depend on."""
        return hashlib.sha256(json.dumps([self.name, dataclasses.asdict(self)], sort_keys=True).encode()).hexdigest()

    def _count(self, split: str) -> int:
        return getattr(self, f"{split}_examples")
