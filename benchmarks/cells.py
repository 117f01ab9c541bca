"""Results cell by cell: a cell is one run of train.py; its row is appended when it is finished, and it is never run again."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

from zoo.errors import UserError
from zoo.training.records import TIMING, read_records

ROOT = Path(__file__).resolve().parent.parent


class Cell(Protocol):
    """What is run: a value with a name of its own."""

    @property
    def name(self) -> str: ...


def run_missing(cells: Iterable[Cell], run: Callable[[Any], dict[str, Any]], results: Path) -> None:
    """Runs the cells that `results` does not hold and appends the row of each as it finishes."""
    results.parent.mkdir(parents=True, exist_ok=True)
    cells = list(cells)
    finished = {row["cell"]["name"] for row in read(results)}
    for number, cell in enumerate(cells, start=1):
        if cell.name in finished:
            continue
        print(f"{number} of {len(cells)}: {cell.name}", flush=True)
        row = run(cell)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(f"  {row['seconds']:.0f} s, {row['scores']}", flush=True)


def run_scripts(workdir: Path, *scripts: list[str]) -> None:
    """Runs commands such as ["train.py", "--config=…"] from the repository, one after the other, logging to `workdir`/log.txt.

    Programs are compiled once for all cells of `workdir`.

    Raises:
      UserError: one failed.
    """
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str((workdir / "compiled").absolute())}
    with (workdir / "log.txt").open("a", encoding="utf-8") as log:
        for script in scripts:
            if subprocess.run([sys.executable, *script], cwd=ROOT, env=environment, stdout=log, stderr=log).returncode:
                raise UserError(f"{' '.join(script)} failed; see {log.name}")


def circumstances() -> dict[str, Any]:
    """What a row says of when and where it was made."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("jax", "flax")} | {"python": platform.python_version()},
        "hardware": f"{cores} CPU core{'s' if cores != 1 else ''}",
    }


def trained_seconds(folder: Path) -> float:
    """The seconds of training alone, as a run's timing.jsonl has them, without start-up, preparation and scoring."""
    return round(sum(record["seconds"] for record in read_records(folder / TIMING)), 1)


def read(results: Path) -> list[dict[str, Any]]:
    """The rows of the finished cells."""
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def of(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The rows whose cell has these values."""
    return [row for row in rows if all(row["cell"][name] == value for name, value in wanted.items())]


def spread(values: list[float], form: str = ".1f") -> str:
    """The mean, and the range where there are several."""
    if not values:
        return "not run"
    shown = f"{mean(values):{form}}"
    return f"{shown} [{min(values):{form}}, {max(values):{form}}]" if len(values) > 1 else shown
