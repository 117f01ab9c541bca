"""What `python -m zoo compare` found, as tables, CSV and pictures; made from the finished cells alone."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from zoo.atomic import write_atomically
from zoo.errors import UserError

# A language model that has learnt less than this over single tokens has learnt nothing of their order worth comparing.
LEARNT = 1.0  # nats below the unigram


@dataclass(frozen=True)
class Cell:
    """One run; `encoding` as on the command line, such as `t5:num_buckets=16`."""

    objective: str
    encoding: str
    seed: int

    @property
    def folder(self) -> str:
        return "_".join((self.objective, "".join(c if c.isalnum() else "-" for c in self.encoding), str(self.seed)))


class Line(NamedTuple):
    """An encoding under an objective, over its seeds.

    Attributes:
      metric: what `values` are: "loss", or "accuracy" where a unigram knows nothing of the task.
      values: length → the value of each seed; an empty tuple where the encoding refuses the length.
      speeds: updates per second relative to no encoding at all, of each seed.
      program_bytes: what an update needs.
      learnt: how far the loss at the training length is below the unigram's, of the worst seed; None for accuracies.
      failed: why a seed ended early.
    """

    objective: str
    encoding: str
    seeds: tuple[int, ...]
    parameters: int
    speeds: tuple[float, ...]
    program_bytes: int | None
    metric: str
    values: dict[int, tuple[float, ...]]
    learnt: float | None
    failed: str

    @property
    def trained_at(self) -> int:
        return min(self.values, default=0)

    @property
    def note(self) -> str:
        """What is wrong with it, empty for nothing."""
        return self.failed or ("failed: learnt too little" if (self.learnt or LEARNT) < LEARNT else "")


def read(results: Path) -> list[dict[str, Any]]:
    """The finished cells, in order.

    Raises:
      UserError: a line that is none; says which.
    """
    if not results.exists():
        return []
    rows = []
    for number, line in enumerate(results.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
            Cell(**rows[-1]["cell"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{results}:{number}: not a finished cell: {error}") from error
    return rows


def report(rows: Sequence[Mapping[str, Any]], folder: Path, console: Console) -> None:
    """Prints a table for each objective and writes `<objective>.csv`, `.md` and `.png` into `folder`."""
    for objective in dict.fromkeys(row["cell"]["objective"] for row in rows):
        lines = lines_of(rows, objective)
        header, cells = table(lines)
        shown = Table(title=f"{objective}: {lines[0].metric} on held-out rows, by their length")
        for k, name in enumerate(header):
            shown.add_column(name, justify="left" if k == 0 else "right")
        for row in cells:
            shown.add_row(*row)
        console.print(shown)
        paths = [folder / f"{objective}.{kind}" for kind in ("csv", "md", "png")]
        for path, data in zip(paths, (as_csv(rows, objective), markdown(lines).encode(), picture(lines)), strict=True):
            write_atomically(path, data)
        console.print(f"  {', '.join(map(str, paths))}", highlight=False, soft_wrap=True)


def lines_of(rows: Sequence[Mapping[str, Any]], objective: str) -> list[Line]:
    """The rows of an objective by encoding, the best at the longest length first, those that refuse it or failed last."""
    of_encoding: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["cell"]["objective"] == objective:
            of_encoding.setdefault(row["cell"]["encoding"], []).append(row)
    lines = [_line(objective, encoding, found) for encoding, found in of_encoding.items()]
    longest = max((length for line in lines for length in line.values), default=0)

    def rank(line: Line) -> tuple[bool, bool, float]:
        found, trained = line.values.get(longest, ()), line.values.get(line.trained_at, ())
        value = mean(found or trained or (0.0,))
        return bool(line.note), not found, -value if line.metric == "accuracy" else value

    return sorted(lines, key=rank)


def _line(objective: str, encoding: str, rows: Sequence[Mapping[str, Any]]) -> Line:
    whole = [row for row in rows if "failed" not in row]
    words = all(row["unigram_loss"] is not None for row in whole)
    metric, key = ("loss", "losses") if words else ("accuracy", "accuracies")
    lengths = sorted({int(length) for row in whole for length in row["losses"]})
    values = {}
    for length in lengths:
        found = [row[key].get(str(length)) for row in whole]
        values[length] = tuple(value for value in found if isinstance(value, float))
    failed = "; ".join(dict.fromkeys(row["failed"] for row in rows if "failed" in row))
    return Line(
        objective,
        encoding,
        tuple(sorted(row["cell"]["seed"] for row in rows)),
        whole[0]["parameters"] if whole else 0,
        tuple(row["relative_speed"] for row in whole),
        whole[0]["program_bytes"] if whole else None,
        metric,
        values,
        min((row["unigram_loss"] - row["losses"][str(lengths[0])] for row in whole), default=0.0) if words else None,
        f"failed: {failed}" if failed else "",
    )


def table(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of texts. Of several seeds the mean and the range are shown, of speeds the mean.

    "learnt" is how far below the unigram's the loss at the training length is.
    """
    lengths = sorted({length for line in lines for length in line.values})
    header = ["encoding", "seeds", "parameters", "speed", "MiB", "learnt", *map(str, lengths), ""]
    rows = []
    for line in lines:
        rows.append(
            [
                line.encoding,
                str(len(line.seeds)),
                f"{line.parameters:,}",
                f"{mean(line.speeds):.2f}" if line.speeds else "",
                "" if line.program_bytes is None else f"{line.program_bytes / 2**20:.1f}",
                "" if line.learnt is None else f"{line.learnt:.2f}",
                *(spread(line.values.get(length, ())) for length in lengths),
                line.note,
            ]
        )
    return header, rows


def spread(values: Sequence[float]) -> str:
    """The mean, of several the range with it; a dash for none."""
    if not values:
        return "–"
    shown = f"{mean(values):.3f}"
    return shown if len(values) == 1 else f"{shown} [{min(values):.3f}, {max(values):.3f}]"


def markdown(lines: Sequence[Line]) -> str:
    """The table as GitHub writes it."""
    header, rows = table(lines)

    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |\n"

    return row(header) + row(["---", *["---:"] * (len(header) - 2), "---"]) + "".join(map(row, rows))


def as_csv(rows: Sequence[Mapping[str, Any]], objective: str) -> bytes:
    """A line for every cell and length, with everything the table leaves out."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fields = ("parameters", "steps", "tokens", "relative_speed", "program_bytes", "unigram_loss", "seconds", "failed")
    writer.writerow(["objective", "encoding", "seed", "length", "loss", "accuracy", "refused", *fields])
    for row in rows:
        cell = row["cell"]
        for length, loss in row.get("losses", {"": ""}).items() if cell["objective"] == objective else ():
            accuracy = row.get("accuracies", {}).get(length, "")
            found = (loss, accuracy, "") if isinstance(loss, float) else ("", "", loss)
            values = (row.get(field, "") for field in fields)
            writer.writerow([cell["objective"], cell["encoding"], cell["seed"], length, *found, *values])
    return text.getvalue().encode()


def picture(lines: Sequence[Line]) -> bytes:
    """Each line's values by length, and how they differ from that at the training length, as PNG."""
    from matplotlib.figure import Figure  # slow to import, and wanted only here

    drawn = [line for line in lines if any(line.values.values())]
    lengths = sorted({length for line in drawn for length in line.values})
    absolute = [[mean(line.values.get(n) or (math.nan,)) for n in lengths] for line in drawn]
    change = [[value - row[0] for value in row] for row in absolute]
    known = sorted(value for row in absolute for value in row if not math.isnan(value)) or [0.0]
    figure = Figure(figsize=(9.0, max(3.0, 0.24 * len(drawn) + 1.2)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    metric = drawn[0].metric if drawn else ""
    # What has run away at the longest rows shall not take the colours from the rest.
    middle = known[len(known) // 2]
    ranges = ((known[0], min(known[-1], 2 * middle - known[0]), "viridis_r"), (-0.5, 0.5, "RdYlGn_r"))
    if metric == "accuracy":
        ranges = ((0.0, 1.0, "viridis"), (-0.5, 0.5, "RdYlGn"))
    titles = (metric, f"change of the {metric} from {lengths[0] if lengths else 0}")
    for axes, title, values, (low, high, colours) in zip(panels, titles, (absolute, change), ranges, strict=True):
        axes.imshow(values or [[0.0]], aspect="auto", cmap=colours, vmin=low, vmax=high, alpha=0.7)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set_xlabel("tokens in a row")
        axes.set_yticks(range(len(drawn)), [line.encoding for line in drawn], fontsize=7)
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                shown = "–" if math.isnan(value) else f"{value:+.2f}" if axes is panels[1] else f"{value:.2f}"
                axes.text(x, y, shown, ha="center", va="center", fontsize=6)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    return data.getvalue()
