"""Which positions the tokens of a training row have, where they are not simply one after another."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from zoo.errors import UserError
from zoo.registry import Registry


@dataclass(frozen=True)
class TrainingPositions(abc.ABC):
    """Makes a training row of some tokens of a longer one, which keep the positions that they have there.

    Attributes:
      longest: tokens of the longer row: all positions lie in 0 … longest − 1.
    """

    name: ClassVar[str]

    longest: int

    @abc.abstractmethod
    def choose(self, row: Mapping[str, np.ndarray], length: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """`length` tokens of `row`, a row of `zoo.data.packing` with more of them, in order; every array of it is cut alike.

        A function of its arguments alone, so of (seed, epoch, row) with the generator that the pipeline makes.
        """


registry = Registry("training positions", TrainingPositions)


@registry.register("segmented")
@dataclass(frozen=True)
class Segmented(TrainingPositions):
    """A row is `pieces` runs of a text of `longest` tokens, in order, each token at its own position: a model meets long distances in short rows.

    Where the runs stand is drawn anew each time, every way to lay them without overlap as likely as any other; their lengths
    differ by one token at most. The tokens between them are left out of that epoch. Attention and masks are those of a
    plain row; the first token of a run begins a word, and its last predicts none. A text no longer than a row is taken whole.
    Source: Karypis, McAuley, Karypis 2023 (arXiv:2310.14633), "chunk" with fraction 1/pieces, 0.25 recommended there; its "prefix" is not here. Rows of packed
    documents are cut like one text; each document keeps its own positions. What the paper does to a learned table is the
    encoding's: `learned` with `interpolate`.
    """

    pieces: int = 4

    def __post_init__(self):
        if self.pieces < 1 or self.longest < self.pieces:
            raise UserError(
                f"training positions 'segmented' cut {self.longest} tokens (longest) into {self.pieces} pieces; pieces must be "
                "at least 1 and at most longest"
            )

    def choose(self, row: Mapping[str, np.ndarray], length: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        used = int(np.count_nonzero(row["segment_ids"]))
        taken = min(used, length)
        index = np.arange(length)  # padding stands at the end of a row
        if used > length:
            lengths = np.diff(np.arange(self.pieces + 1) * taken // self.pieces)
            # A run is one mark among the tokens that are left out; marks without order or repetition are the ways to lay them.
            marks = np.sort(rng.choice(used - taken + self.pieces, self.pieces, replace=False))
            gaps = marks - np.arange(self.pieces)
            index = index + np.repeat(gaps, lengths)
        chosen = {name: values[index] for name, values in row.items()}
        chosen["word_starts"][1:] |= np.diff(index) > 1
        chosen["word_starts"][0] = True
        return chosen
