"""Measures how far every architecture is from its source library, and writes it to docs/results/checkpoints.jsonl.

    make venv-peers && .venv/bin/python -m tests.peers.measure_checkpoints [CASE …]

A line per case: the family, the class, and the largest differences of outputs, of gradients (relative to the largest gradient) and of what
the library computes from our export. Cases that are not measured keep their lines.
"""

from __future__ import annotations

import datetime
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import zoo
from tests.peers import checkpoints, differences
from zoo.atomic import write_atomically

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "checkpoints.jsonl"


def main(names: list[str]) -> None:
    lines = (
        {row["case"]: row for row in map(json.loads, RESULTS.read_text("utf-8").splitlines())}
        if RESULTS.exists()
        else {}
    )
    for name in names or checkpoints.CASES:
        lines[name] = measured(name)
        print(lines[name])
    text = "".join(f"{json.dumps(lines[name])}\n" for name in sorted(lines))
    write_atomically(RESULTS, text.encode())


def measured(name: str) -> dict:
    made = checkpoints.make(checkpoints.CASES[name], seed=len(name))
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "checkpoint"
        made.model.save_pretrained(directory)
        ours = zoo.load_pretrained(directory)
        return {
            "case": name,
            "family": ours.architecture,
            "class": checkpoints.CASES[name].model,
            "source": f"transformers {version('transformers')}",
            "outputs": differences.of_outputs(made, ours),
            "gradients": differences.of_gradients(made, ours),
            "exported": differences.of_export(made, ours, directory, Path(folder) / "exported"),
            "date": datetime.date.today().isoformat(),
            "jax": version("jax"),
        }


if __name__ == "__main__":
    main(sys.argv[1:])
