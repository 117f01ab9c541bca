"""Tables: rows of a text, perhaps a second text, perhaps a label, in tab-separated, comma-separated or JSON form."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from zoo.data.files import Line
from zoo.data.record import Record
from zoo.data.registration import registry
from zoo.data.source import BadRows, FileSource
from zoo.errors import UserError, near

Row = tuple[int, list[str]]


@dataclasses.dataclass(frozen=True)
class TableSource(FileSource):
    """Rows of columns. Every row has as many as the first line of its file, header or not.

    Attributes:
      header: whether the first line names the columns.
      text, text_pair, label: which column holds each: its name in the header, or its index from 0 (from the end where
        negative); None where the table has no such column. Labels are kept as they are spelled.
    """

    header: bool = False
    text: int | str = 0
    text_pair: int | str | None = None
    label: int | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, column in self._named().items():
            if isinstance(column, str) and not self.header:
                raise UserError(
                    f"data source {self.name!r}: {field}={column!r} names a column, which needs header=True; "
                    "without a header give its index from 0"
                )

    def parse(self, file: str, lines: Iterator[Line], bad: BadRows) -> Iterator[Record]:
        width, columns = 0, {}
        for number, row in self.rows(file, lines, bad):
            if not width:
                width = len(row)
                columns = self._columns(file, number, row)
                if self.header:
                    continue
            if len(row) != width:
                bad.add(file, number, f"{_count(len(row))} where the first line of the file has {width}")
                continue
            yield Record({field: row[k] for field, k in columns.items()}, file, number)

    def rows(self, file: str, lines: Iterator[Line], bad: BadRows) -> Iterator[Row]:
        """(first line, columns) of every row; each form of table defines it."""
        raise TypeError(f"{type(self).__name__} does not say how to cut rows")

    def _named(self) -> dict[str, int | str]:
        named = {"text": self.text, "text_pair": self.text_pair, "label": self.label}
        return {field: column for field, column in named.items() if column is not None}

    def _columns(self, file: str, number: int, first: list[str]) -> dict[str, int]:
        indices = {}
        for field, column in self._named().items():
            if isinstance(column, str):
                if column not in first:
                    raise UserError(f"{file}:{number}: {field}={column!r} is not in the header; {near(column, first)}")
                indices[field] = first.index(column)
            elif -len(first) <= column < len(first):
                indices[field] = column
            else:
                raise UserError(f"{file}:{number}: {field} is column {column}, but the line has {_count(len(first))}")
        return indices


def _count(columns: int) -> str:
    return f"{columns} column{'s' if columns != 1 else ''}"


@registry.register("tsv")
@dataclasses.dataclass(frozen=True)
class TsvSource(TableSource):
    """Tab-separated values. Lines are cut at tabs alone: quote characters are text, as in GLUE, LCQMC, XNLI."""

    def rows(self, file: str, lines: Iterator[Line], bad: BadRows) -> Iterator[Row]:
        for line in lines:
            if line.problem:
                bad.add(file, line.number, line.problem)
            else:
                yield line.number, line.text.split("\t")


@registry.register("csv")
@dataclasses.dataclass(frozen=True)
class CsvSource(TableSource):
    """Comma-separated values with quotes (RFC 4180): a quoted field may hold commas, doubled quotes and line ends.

    A field of more than 131,072 characters is refused: nearly always a quote that is never closed.

    Attributes:
      delimiter: one character.
    """

    delimiter: str = ","

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.delimiter) != 1:
            raise UserError(f"data source 'csv': the delimiter is one character, not {self.delimiter!r}")

    def rows(self, file: str, lines: Iterator[Line], bad: BadRows) -> Iterator[Row]:
        start: int | None = None
        spoiled = False

        def usable() -> Iterator[str]:
            nonlocal start, spoiled
            for line in lines:
                if line.problem:
                    bad.add(file, line.number, line.problem)
                    spoiled |= start is not None  # inside a quoted field: what is left of the row is no row
                else:
                    start = start or line.number
                    yield line.text + "\n"

        source = usable()
        while True:
            # A fresh reader for every row: after an error the old one would still be inside a quoted field.
            start, spoiled = None, False
            try:
                row = next(csv.reader(source, delimiter=self.delimiter, strict=True), None)
            except csv.Error as error:
                bad.add(file, start, f"malformed CSV: {error}; is a quote never closed?")
                continue
            if row is None:
                return
            if row and not spoiled:
                yield start, row


@registry.register("jsonl")
@dataclasses.dataclass(frozen=True)
class JsonlSource(FileSource):
    """One JSON object per line.

    Attributes:
      text, text_pair, label: the keys that hold each; None where there is no such key. Texts are strings; a label is
        a string, or a number or boolean, which is kept as it is spelled.
    """

    text: str = "text"
    text_pair: str | None = None
    label: str | None = None

    def parse(self, file: str, lines: Iterator[Line], bad: BadRows) -> Iterator[Record]:
        for line in lines:
            try:
                if line.problem:
                    raise ValueError(line.problem)
                if line.text.strip():
                    yield Record(self._fields(_json_object(line.text)), file, line.number)
            except ValueError as error:
                bad.add(file, line.number, str(error))

    def _fields(self, value: dict[str, Any]) -> dict[str, str]:
        fields = {"text": _get(value, self.text, (str,))}
        if self.text_pair is not None:
            fields["text_pair"] = _get(value, self.text_pair, (str,))
        if self.label is not None:
            label = _get(value, self.label, (str, bool, _Number))
            fields["label"] = str(label).lower() if isinstance(label, bool) else str(label)
        return fields


class _Number(str):
    """A JSON number as it is spelled, told apart from a JSON string."""


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_float=_Number, parse_int=_Number, parse_constant=_Number)
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON at character {error.pos + 1}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError("malformed JSON: nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, {{...}}, not {text.strip()[:40]!r}")
    return value


def _get(value: dict[str, Any], key: str, types: tuple[type, ...]) -> Any:
    if key not in value:
        raise ValueError(f"no key {key!r}; {near(key, value) if value else 'the object is empty'}")
    found = value[key]
    if not isinstance(found, types) or (_Number not in types and isinstance(found, _Number)):
        expected = "a string" if types == (str,) else "a string, number or boolean"
        raise ValueError(f"key {key!r} holds {json.dumps(found)[:40]}, not {expected}")
    return found
