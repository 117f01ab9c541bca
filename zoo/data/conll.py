"""Tagged words, one per line (CoNLL)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from zoo.data.files import Line
from zoo.data.record import Record
from zoo.data.registration import registry
from zoo.data.source import BadRows, FileSource
from zoo.errors import UserError

DOCUMENT_START = "-DOCSTART-"


@registry.register("conll")
@dataclasses.dataclass(frozen=True)
class ConllSource(FileSource):
    """One word and its tags per line, an empty line after each sentence; fields "words" and "tags".

    Lines are cut at `separator` alone, so that a word may be any other white space (in character-wise data U+3000 is a
    word); a line that begins with the separator has the separator itself as its word. Every line has as many columns
    as the first of its file. A line `-DOCSTART- …` (CoNLL-2003) ends a sentence and is no word. A bad line spoils its
    sentence, which counts as one bad row.

    Attributes:
      separator: one character.
      word, tag: the columns of the two, from 0, from the end where negative.
    """

    separator: str = " "
    word: int = 0
    tag: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.separator) != 1:
            raise UserError(f"data source 'conll': the separator is one character, not {self.separator!r}")

    def parse(self, file: str, lines: Iterator[Line], bad: BadRows) -> Iterator[Record]:
        words: list[str] = []
        tags: list[str] = []
        width, start, spoiled = 0, 0, False
        for line in lines:
            if line.text is not None and self._is_boundary(line.text):
                if words and not spoiled:
                    yield Record({"words": tuple(words), "tags": tuple(tags)}, file, start)
                words, tags, spoiled = [], [], False
                continue
            if spoiled:
                continue
            columns = [] if line.problem else self._cut(line.text)
            problem = line.problem or self._problem(columns, width)
            if problem:
                bad.add(file, line.number, problem)
                spoiled = True
                continue
            width = width or len(columns)
            start = start if words else line.number
            words.append(columns[self.word])
            tags.append(columns[self.tag])
        if words and not spoiled:
            yield Record({"words": tuple(words), "tags": tuple(tags)}, file, start)

    def _is_boundary(self, text: str) -> bool:
        return not text.strip(self.separator + "\t ") or text.split(self.separator, 1)[0] == DOCUMENT_START

    def _cut(self, text: str) -> list[str]:
        if text.startswith(self.separator * 2):
            return [self.separator, *text[2:].split(self.separator)]
        return text.split(self.separator)

    def _problem(self, columns: list[str], width: int) -> str | None:
        what = f"{len(columns)} column{'s' if len(columns) != 1 else ''} ({self.separator!r} between columns)"
        if len(columns) < 2:
            return f"{what}: the word {columns[0]!r} has no tag; expected word{self.separator}tag"
        if width and len(columns) != width:
            return f"{what} where the first line of the file has {width}"
        for field, k in (("word", self.word), ("tag", self.tag)):
            if not -len(columns) <= k < len(columns):
                return f"{what}: there is no column {k} for the {field}"
            if not columns[k]:
                return f"the {field} is empty"
        return None
