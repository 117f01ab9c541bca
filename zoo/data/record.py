"""What a source yields: named fields, and the place they were read from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Record:
    """One row, sentence or document of a source.

    Attributes:
      fields: by kind of source. Text: {"text": str}. Tables: {"text": str} and, where the config names their columns,
        {"text_pair": str} and {"label": str}. CoNLL: {"words": tuple[str, ...], "tags": tuple[str, ...]}. Drawn by
        rule: {"words": tuple[str, ...], "answers": tuple[int, ...]}.
      file: where it was read from.
      line: its first line there, counted from 1; with `file` it is what an error message names.
    """

    fields: Mapping[str, Any]
    file: str
    line: int


class Source(Protocol):
    """What the rest of the library knows of a source: splits, a stream of records, and a name for its content."""

    def splits(self) -> tuple[str, ...]: ...

    def records(self, split: str) -> Iterator[Record]:
        """The records of a split, in a fixed order, in bounded memory."""
        ...

    def fingerprint(self) -> str:
        """A hash that differs where the records of some split differ."""
        ...


def texts(records: Iterable[Record]) -> Iterator[str]:
    """The text of each record, for training a tokenizer: both texts of a pair, the words of a tagged sentence."""
    for record in records:
        if "words" in record.fields:
            yield " ".join(record.fields["words"])
            continue
        yield record.fields["text"]
        if "text_pair" in record.fields:
            yield record.fields["text_pair"]
