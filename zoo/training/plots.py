"""The curves of a run as PNG, drawn from `metrics.jsonl` alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from zoo.training.records import METRICS, read_records


def plot_curves(workdir: str | Path) -> tuple[Path, ...]:
    """Draws `loss.png` (every `loss`, `loss/<name>` and `<split>/loss`) and `scores.png` (every other `<split>/<score>`).

    Returns the files drawn: none where there is nothing to draw.

    Raises:
      UserError: a line of metrics.jsonl is not a record.
    """
    workdir = Path(workdir)
    curves = _curves(read_records(workdir / METRICS))
    losses = {name: curve for name, curve in curves.items() if "loss" in name.split("/")}
    scores = {name: curve for name, curve in curves.items() if "/" in name and name not in losses}
    drawn = []
    if losses:
        drawn.append(_draw(workdir / "loss.png", [losses]))
    if scores:
        drawn.append(_draw(workdir / "scores.png", [{name: curve} for name, curve in scores.items()]))
    return tuple(drawn)


def _curves(records: list[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    return curves


def _draw(path: Path, panels: list[dict[str, tuple[list[int], list[float]]]]) -> Path:
    """One panel per group of curves; scores have panels of their own, for their scales differ."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    # A Figure of its own, not pyplot: no window system, no state shared between calls.
    figure = Figure(figsize=(max(6.0, 4.0 * columns), 3.5 * rows), layout="constrained")
    for index, curves in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        for name, (steps, values) in curves.items():
            axes.plot(steps, values, label=name, linewidth=1.2, marker="o" if len(steps) < 30 else None, markersize=3)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    return path
