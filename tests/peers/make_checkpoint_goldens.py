"""Writes tests/interop/golden/<family>.npz: what the source library computes at random weights, one small model per family.

    make venv-peers && .venv/bin/python -m tests.peers.make_checkpoint_goldens [FAMILY …]

A file holds config.json as text and `input/…`, `weight/<their name>`, `output/…`. Run again it holds the same inputs and weights
(NumPy's seeds); outputs may differ in the last digits on another processor.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.peers import checkpoints
from zoo.interop.weights import open_weights

GOLDEN = Path(__file__).parents[1] / "interop" / "golden"


def main(families: list[str]) -> None:
    for name in families or [name for name in checkpoints.CASES if "," not in name]:
        made = checkpoints.make(checkpoints.CASES[name])
        with tempfile.TemporaryDirectory() as directory:
            made.model.save_pretrained(directory)
            config = (Path(directory) / "config.json").read_bytes()
            with open_weights(Path(directory)) as weights:
                tensors = {f"weight/{tensor}": weights.read(tensor) for tensor in weights.names()}
        arrays = {"config.json": np.frombuffer(config, np.uint8), **tensors}
        arrays |= {f"input/{key}": array.astype(np.int32) for key, array in made.inputs.items()}
        arrays |= {f"output/{key}": array for key, array in made.outputs.items()}
        GOLDEN.mkdir(exist_ok=True)
        path = GOLDEN / f"{name}.npz"
        np.savez_compressed(path, **arrays)
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
