"""docs/checkpoints.md: the families of checkpoints, from the code, and how near each is to its source, from what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.commands.made_blocks import with_blocks
from zoo.errors import UserError

RESULTS = Path("results") / "checkpoints.jsonl"


def page(folder: Path) -> str:
    """The page in `folder` with its table as it should be now.

    Raises:
      UserError: there is no page, or it lacks a mark.
    """
    path, measured = folder / "checkpoints.md", folder / RESULTS
    if not path.is_file():
        raise UserError(f"no page {path}, whose written parts stand around the table that is made")
    rows = [json.loads(line) for line in measured.read_text("utf-8").splitlines()] if measured.is_file() else []
    table = "\n" + "\n".join(families(rows)) + "\n\n"
    return with_blocks(path.read_text(encoding="utf-8"), {"families": table}, by="`make docs`", where=str(path))


def families(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A table: every family, the classes that are loaded and exported, and the largest differences that were measured."""
    from zoo.interop.architectures import ARCHITECTURES

    yield "| `model_type` | classes, loaded and exported | compared with | outputs | gradients | exported |"
    yield "|---|---|---|---:|---:|---:|"
    for name, family in ARCHITECTURES.items():
        its = [row for row in rows if row["family"] == name]
        sources = ", ".join(dict.fromkeys(row["source"] for row in its)) or "not measured"
        figures = " | ".join(_largest(row.get(key) for row in its) for key in ("outputs", "gradients", "exported"))
        yield f"| {name} | {', '.join(family.classes)} | {sources} | {figures} |"


def _largest(values: Iterator[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return "0" if max(known) == 0 else f"{max(known):.0e}"
