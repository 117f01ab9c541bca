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

import numpy as np

import zoo
from tests.interop import published_models
from tests.peers import checkpoints, differences
from zoo.atomic import write_atomically
from zoo.interop.weights import open_weights

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "checkpoints.jsonl"


def main(names: list[str]) -> None:
    lines = (
        {row["case"]: row for row in map(json.loads, RESULTS.read_text("utf-8").splitlines())}
        if RESULTS.exists()
        else {}
    )
    for name in names or [*checkpoints.CASES, *published_models.MODELS]:
        lines[name] = measured(name) if name in checkpoints.CASES else measured_of_published(name)
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


def measured_of_published(name: str) -> dict:
    """Of a family that no library has: against its published code in NumPy, without gradients."""
    made = published_models.published(name)
    expected = made.compute(made.tensors)
    with tempfile.TemporaryDirectory() as folder:
        made.write(Path(folder))
        ours = zoo.load_pretrained(folder)
        found = ours.apply(**made.inputs)._asdict()
        with open_weights(zoo.export(ours, Path(folder) / "exported")) as weights:
            again = made.compute({tensor: weights.read(tensor) for tensor in weights.names()})
    real = made.inputs["attention_mask"] > 0

    def apart(outputs: dict) -> float:
        pairs = ((np.asarray(outputs[output]), array) for output, array in expected.items())
        rows = ((a[real], b[real]) if a.shape[:2] == real.shape else (a, b) for a, b in pairs)
        return max(float(np.abs(a - b).max()) for a, b in rows)

    return {
        "case": name,
        "family": ours.architecture,
        "class": made.config["architectures"][0],
        "source": published_models.SOURCE,
        "outputs": apart(found),
        "exported": apart(again),
        "date": datetime.date.today().isoformat(),
        "jax": version("jax"),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
