"""The curves of a run as PNG, drawn from `metrics.jsonl` alone."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from zoo.atomic import write_atomically
from zoo.training.records import METRICS, read_records

MANY = 30  # points from which on a curve is drawn without markers, under its mean


def plot_curves(workdir: str | Path) -> tuple[Path, ...]:
    """Draws `loss.png` (`loss`, `<split>/loss`, and `loss/<name>` where there are several) and `scores.png` (every other
    `<split>/<score>` that was taken more than once). A noisy curve is drawn faintly under its moving mean.

    Returns the files drawn: none where there is nothing to draw.

    Raises:
      UserError: a line of metrics.jsonl is not a record.
    """
    workdir = Path(workdir)
    curves = _curves(read_records(workdir / METRICS))
    losses = {name: curve for name, curve in curves.items() if "loss" in name.split("/")}
    scores = {n: curve for n, curve in curves.items() if "/" in n and n not in losses and len(curve[0]) > 1}
    parts = [name for name in losses if name.startswith("loss/")]
    if len(parts) == 1:
        del losses[parts[0]]  # the only part is the whole
    drawn = []
    if losses:
        drawn.append(_draw(workdir / "loss.png", [losses], "loss (nats)"))
    if scores:
        drawn.append(_draw(workdir / "scores.png", [{name: curve} for name, curve in scores.items()], "score"))
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


def _moving_mean(values: list[float]) -> list[float]:
    """The mean of each value and those before it, over a twentieth of the curve."""
    window = max(1, len(values) // 20)
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def _draw(path: Path, panels: list[dict[str, tuple[list[int], list[float]]]], axis: str) -> Path:
    """One panel per group of curves; scores have panels of their own, for their scales differ."""
    from matplotlib.figure import Figure  # a quarter of what train.py imports, and wanted only at its end

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    # A Figure of its own, not pyplot: no window system, no state shared between calls.
    figure = Figure(figsize=(max(6.0, 4.0 * columns), 3.5 * rows), layout="constrained")
    for index, curves in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        for name, (steps, values) in curves.items():
            if len(steps) < MANY:
                axes.plot(steps, values, label=name, linewidth=1.2, marker="o", markersize=3)
                continue
            (faint,) = axes.plot(steps, values, linewidth=0.8, alpha=0.3)
            axes.plot(steps, _moving_mean(values), label=name, linewidth=1.4, color=faint.get_color())
        axes.set_xlabel("step")
        axes.set_ylabel(axis)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())
    return path
