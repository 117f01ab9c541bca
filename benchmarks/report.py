"""What every benchmark prints beside its figures, and how: a table of Markdown, the versions, the hardware."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Sequence

import jax


def table(columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> str:
    """A table of Markdown; numbers with three significant digits, to the right; an empty text is no number there."""
    texts = [[_text(cell) for cell in row] for row in rows]
    numeric = [all(row[i] == "" or not isinstance(row[i], str) for row in rows) for i in range(len(columns))]
    widths = [max(len(column), 3, *(len(row[i]) for row in texts)) for i, column in enumerate(columns)]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (w - 1) + (":" if n else "-") for w, n in zip(widths, numeric, strict=True)]
    return "\n".join([line(columns), line(rule), *map(line, texts)])


def surroundings(*packages: str) -> str:
    """One line: date, Python, the versions of `packages`, processor and its cores, JAX's device."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    device = jax.devices()[0]
    processor = f"{len(os.sched_getaffinity(0))} cores of {_processor()}"
    accelerator = [] if device.platform == "cpu" else [f"{jax.device_count()} × {device.device_kind}"]
    python = f"Python {platform.python_version()}"
    return ", ".join([datetime.date.today().isoformat(), python, *versions, processor, *accelerator])


def _text(cell: str | float) -> str:
    if isinstance(cell, str):
        return cell
    return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
