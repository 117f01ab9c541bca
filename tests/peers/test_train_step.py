"""The benchmark of a training step runs at a tiny size and compares what it says."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("torch", reason="needs the extra peers: make venv-peers")
pytest.importorskip("transformers", reason="needs the extra peers: make venv-peers")

from benchmarks import train_step

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(
    "encoding, names",
    [
        ("learned", ["transformers, as it comes", "transformers, masked positions", "ours, learned"]),
        ("nezha", ["ours, learned", "ours, nezha"]),
    ],
)
def test_every_row_has_its_times_and_ratios(encoding, names, capsys):
    train_step.main(["--size=test", "--rounds=3", f"--encoding={encoding}"])
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if "|" in line
    ]
    columns, _, *rows = rows
    assert [row[0] for row in rows] == names
    ratios = [index for index, column in enumerate(columns) if column.startswith("÷")]
    assert len(ratios) == 2 * (len(names) - 1)
    for row in rows:
        numbers = [float(cell.replace(",", "")) for cell in row[1:] if "…" not in cell]
        assert len(numbers) == 2 + len(ratios) and min(numbers) > 0
        assert all(
            re.fullmatch(r"[\d.]+ … [\d.]+", row[index])
            for index, column in enumerate(columns)
            if column == "quartiles"
        )
    assert float(rows[0][ratios[0]]) == 1, "the first is measured by itself"


def test_ratios_are_of_rounds_not_of_medians():
    measured = {"a": [(1.0, 1.0), (10.0, 1.0), (2.0, 1.0)], "b": [(2.0, 3.0), (20.0, 3.0), (1.0, 3.0)]}
    columns, rows = train_step.rows_of(measured)
    assert columns == ("what", "clock, ms", "quartiles", "÷ a", "processor, ms", "quartiles", "÷ a")
    assert rows[1][3] == 2.0 and rows[1][6] == 3.0
