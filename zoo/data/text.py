"""Running text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from zoo.data.files import Line
from zoo.data.record import Record
from zoo.data.registration import registry
from zoo.data.source import BadRows, FileSource


@registry.register("text")
@dataclasses.dataclass(frozen=True)
class TextSource(FileSource):
    """Plain text: a document per line, per block between blank lines, or per file.

    Records have one field, "text". Lines of white space alone belong to no document of the first two kinds. A bad
    line spoils its line or block; with a document per file it is left out of it.

    Attributes:
      documents: "line", "blank_line" (the input form of BERT's data builders: a sentence per line, documents apart
        by a blank line; lines are joined by line feeds) or "file".
      max_document_length: in characters. A longer document is a bad row, since a document is held in memory whole.
    """

    documents: Literal["line", "blank_line", "file"] = "line"
    max_document_length: int = 1 << 26

    def parse(self, file: str, lines: Iterator[Line], bad: BadRows) -> Iterator[Record]:
        if self.documents == "line":
            return self._one_per_line(file, lines, bad)
        return self._blocks(file, lines, bad)

    def _one_per_line(self, file: str, lines: Iterator[Line], bad: BadRows) -> Iterator[Record]:
        for line in lines:
            if line.problem:
                bad.add(file, line.number, line.problem)
            elif line.text.strip():
                yield Record({"text": line.text}, file, line.number)

    def _blocks(self, file: str, lines: Iterator[Line], bad: BadRows) -> Iterator[Record]:
        whole = self.documents == "file"
        held: list[str] = []
        start, length, spoiled = 1, 0, False
        for line in lines:
            if line.problem:
                bad.add(file, line.number, line.problem)
                spoiled = not whole
            elif line.text.strip() or whole:
                if not held and not spoiled:
                    start = line.number
                length += len(line.text) + 1
                if length <= self.max_document_length:
                    held.append(line.text)
                elif not spoiled:
                    limit = f"{self.max_document_length:,} characters; raise max_document_length to read it"
                    bad.add(file, start, f"the document has more than {limit}")
                    spoiled, held = True, []
            else:
                if held and not spoiled:
                    yield Record({"text": "\n".join(held)}, file, start)
                held, length, spoiled = [], 0, False
        if any(text.strip() for text in held) and not spoiled:
            yield Record({"text": "\n".join(held)}, file, start)
