"""What tasks have in common whose rows are filled with documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from zoo.data.packing import PackedRows, Specials
from zoo.data.positions import TrainingPositions
from zoo.data.store import prepare
from zoo.errors import UserError
from zoo.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class PackedDocuments(Task):
    """Rows are filled with documents, anew for every epoch.

    Attributes:
      attend_across: documents packed into one row see each other and positions run through; else each is alone and its
        positions begin at 0.
      specials: where [CLS] and [SEP] stand: around no text, each row's, or each document's.
      split_documents: a document may go on in another row; else only one longer than a row is cut.
      seed: of the order in which documents are packed.
      positions: of the tokens of a training row where they are not one after another; evaluation reads plain rows.
    """

    attend_across: bool = False
    specials: Specials = "document"
    split_documents: bool = True
    seed: int = 0
    positions: TrainingPositions | None = None

    @property
    def contiguous(self) -> bool:
        """Whether positions grow by one from token to token of a document."""
        return self.positions is None

    def check_fits(self, model_length: int) -> None:
        super().check_fits(model_length)
        if self.positions is None:
            return
        longest = self.positions.longest
        if longest > model_length:
            raise UserError(
                f"positions.longest={longest} is longer than model.max_length={model_length}; lower the one or raise the other"
            )
        if longest <= self.max_length:
            raise UserError(
                f"positions.longest={longest} leaves nothing to choose for rows of max_length={self.max_length}; raise the one "
                "or lower the other, or leave positions out"
            )

    def check_model(self, model: Any) -> None:
        mixing = sorted({spec.mixer.name for spec in model.block_specs() if not spec.mixer.facts().packs})
        if mixing and not self.attend_across:
            raise UserError(
                f"attend_across=False packs documents into one row, and mixer {' and '.join(map(repr, mixing))} cannot keep them "
                "apart; set it to True, which makes them one, or choose another mixer"
            )

    def examples(self, source: Any, split: str, tokenizer: Any, directory: Any) -> PackedRows:
        """Packed rows over the prepared store, which is made in `directory` where it is not there yet."""
        longer = self.positions is not None and split == "train"
        return PackedRows(
            prepare(source, split, tokenizer, directory),
            tokenizer.vocabulary,
            row_length=self.positions.longest if longer else self.max_length,
            seed=self.seed,
            split_documents=self.split_documents,
            specials=self.specials,
        )

    def row(self, example: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """An example as a row of T tokens: `input_ids`, `word_starts`, `segment_ids` and `positions`, each [T]."""
        row = dict(example)
        if self.attend_across:
            row["segment_ids"] = (row["segment_ids"] > 0).astype(np.int32)
            row["positions"] = np.arange(len(row["segment_ids"]), dtype=np.int32)
        if self.positions is not None and len(row["segment_ids"]) > self.max_length:
            row = self.positions.choose(row, self.max_length, rng)
        return row

    def placed(self, row: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What of a row tells a model where tokens stand: `segment_ids`, and `positions` unless they run through."""
        names = ("segment_ids",) if self.attend_across and self.contiguous else ("segment_ids", "positions")
        return {name: row[name] for name in names}
