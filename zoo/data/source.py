"""What the sources that read files share: splits, the policy for bad rows, and the hash of their content."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from typing import Literal

from zoo.data.files import MAX_BYTES, MAX_LINE_LENGTH, Line, content_hash, read_lines
from zoo.data.record import Record
from zoo.errors import UserError, near

logger = logging.getLogger(__name__)

SPLITS = ("train", "dev", "test")
SHOWN = 5


@dataclasses.dataclass
class BadRows:
    """Rows that could not be read: the first one stops the run, or all are counted and shown, as the source says.

    Attributes:
      count: how many.
      shown: what was wrong with the first few, each with file and line.
    """

    policy: Literal["stop", "skip"]
    count: int = 0
    shown: list[str] = dataclasses.field(default_factory=list)

    def add(self, file: str, line: int, problem: str) -> None:
        """Raises UserError where the policy is to stop."""
        message = f"{file}:{line}: {problem}"
        if self.policy == "stop":
            raise UserError(f"{message} (on_bad_row='skip' leaves such rows out and counts them)")
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(message)


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Local files, several for each split.

    Attributes:
      train, dev, test: the files of each split, read in this order; names ending in `.gz` or `.xz` are unpacked.
      on_bad_row: "stop" at the first row that cannot be read, or "skip" such rows, count them, and log the count
        and the first few with file and line.
      max_line_length: in characters; a longer line is a bad row.
      max_bytes: what one file may unpack to.
    """

    train: tuple[str, ...] = ()
    dev: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    on_bad_row: Literal["stop", "skip"] = "stop"
    max_line_length: int = MAX_LINE_LENGTH
    max_bytes: int = MAX_BYTES

    def __post_init__(self) -> None:
        for name in ("max_line_length", "max_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def splits(self) -> tuple[str, ...]:
        return tuple(split for split in SPLITS if getattr(self, split))

    def files(self, split: str) -> tuple[str, ...]:
        """Raises UserError where the split has no files."""
        if split not in self.splits():
            known = near(split, self.splits()) if self.splits() else "it has no files at all: set train=(...)"
            raise UserError(f"data source {self.name!r} has no split {split!r}; {known}")
        return getattr(self, split)

    def records(self, split: str, bad: BadRows | None = None) -> Iterator[Record]:
        """The records of a split, file after file; `bad` collects what was skipped, if the caller wants to see it.

        Raises:
          UserError: no such split; a file that is missing, empty, damaged or without any row; a bad row under "stop".
        """
        files = self.files(split)
        bad = BadRows(self.on_bad_row) if bad is None else bad
        return self._records(files, bad)

    def _records(self, files: tuple[str, ...], bad: BadRows) -> Iterator[Record]:
        for file in files:
            before, rows = bad.count, 0
            for record in self.parse(file, self._lines(file), bad):
                rows += 1
                yield record
            skipped = bad.count - before
            if skipped:
                logger.warning(
                    "%s: skipped %d bad rows, kept %d. The first: %s", file, skipped, rows, "; ".join(bad.shown)
                )
            if not rows:
                raise UserError(f"{file}: the file holds no rows" + (f" but {skipped} bad ones" if skipped else ""))

    def _lines(self, file: str) -> Iterator[Line]:
        return read_lines(file, max_line_length=self.max_line_length, max_bytes=self.max_bytes)

    def parse(self, file: str, lines: Iterator[Line], bad: BadRows) -> Iterator[Record]:
        """The records in the lines of one file; each kind of source defines it, giving every bad row to `bad`."""
        raise TypeError(f"{type(self).__name__} does not say how to parse a file")

    def fingerprint(self) -> str:
        """SHA-256 of the files' bytes and of how they are read. Where the files lie does not enter."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        # Tokenizer, stores and checkpoints all ask; reading a corpus through once per source is enough.
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for split in SPLITS:
            facts[split] = [content_hash(file) for file in facts[split]]
        return hashlib.sha256(json.dumps([self.name, facts], sort_keys=True).encode()).hexdigest()
