"""Passkey retrieval: a number in a long text that says nothing else."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from zoo.data.registration import registry
from zoo.data.synthetic.stream import Synthetic
from zoo.errors import UserError

TASK = (
    "There is an important info hidden inside a lot of irrelevant text . Find it and memorize it . "
    "I will quiz you about the important information there ."
)
FILLER = ("The grass is green .", "The sky is blue .", "The sun is yellow .", "Here we go .", "There and back again .")
TOLD = "The pass key is {0} . Remember it . {0} is the pass key ."
ASKED = "What is the pass key ? The pass key is {0}"


@registry.register("passkey")
@dataclasses.dataclass(frozen=True)
class Passkey(Synthetic):
    """Passkey retrieval: filler sentences with `The pass key is 7 1 4 3 2 .` at some depth, and at the end the key, to be predicted.

    The filler is five short sentences over and over; it breaks off where the length asks. The key stands before the filler
    sentence that begins at or next below depth times the filler's words.
    Source: Mohtashami & Jaggi 2023 (arXiv:2305.16300). Here the key is written digit by digit and punctuation stands
    by itself, so that whatever the tokenizer every key is spelled, and all are equally long; a key of d digits is guessed in one
    of 10^d cases.

    Attributes:
      length: of every row, in words.
      digits: of the key.
      depth: where the key stands, 0 at the beginning of the filler, 1 at its end; None: drawn uniformly.
    """

    digits: int = 5
    depth: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.digits < 1:
            raise UserError(f"data source {self.name!r}: digits is {self.digits}; it must be at least 1")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise UserError(
                f"data source {self.name!r}: depth is {self.depth}; it is a part of the filler, from 0 to 1"
            )
        if self.length < self.shortest:
            raise UserError(
                f"data source {self.name!r}: length is {self.length}; without any filler a row has {self.shortest} words"
            )

    @property
    def shortest(self) -> int:
        """The words of a row without filler."""
        return len(" ".join((TASK, TOLD, ASKED)).format(" ".join("0" * self.digits)).split())

    def draw(self, rng: np.random.Generator) -> tuple[list[str], range]:
        key = " ".join(str(digit) for digit in rng.integers(10, size=self.digits))
        depth = rng.random() if self.depth is None else self.depth
        room = self.length - self.shortest
        before: list[str] = []
        after: list[str] = []
        for sentence in itertools.cycle(FILLER):
            words = sentence.split()
            if len(before) + len(after) + len(words) > room:
                after += words[: room - len(before) - len(after)]
                break
            (after if after or len(before) + len(words) > depth * room else before).extend(words)
        words = [*TASK.split(), *before, *TOLD.format(key).split(), *after, *ASKED.format(key).split()]
        return words, range(self.length - self.digits, self.length)
