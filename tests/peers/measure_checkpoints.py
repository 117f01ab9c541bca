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
from flax.traverse_util import flatten_dict

import zoo
from tests.interop import nezha_golden, published_models
from tests.peers import checkpoints, differences, ours
from zoo.atomic import write_atomically
from zoo.config import plain
from zoo.interop.weights import open_weights

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "checkpoints.jsonl"
NEZHA = {f"nezha, {case}": case for case in nezha_golden.CASES}


def main(names: list[str]) -> None:
    lines = (
        {row["case"]: row for row in map(json.loads, RESULTS.read_text("utf-8").splitlines())}
        if RESULTS.exists()
        else {}
    )
    for name in names or [*checkpoints.CASES, *published_models.MODELS, *NEZHA]:
        measure = (
            measured if name in checkpoints.CASES else measured_of_golden if name in NEZHA else measured_of_published
        )
        lines[name] = measure(name)
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
    return {
        "case": name,
        "family": ours.architecture,
        "class": made.config["architectures"][0],
        "source": published_models.SOURCE,
        "outputs": differences.of_arrays(found, expected, real),
        "exported": differences.of_arrays(again, expected, real),
        "date": datetime.date.today().isoformat(),
        "jax": version("jax"),
    }


def measured_of_golden(name: str) -> dict:
    """NEZHA, which the library no longer has. Its export is the file that was loaded, or there is no figure for it."""
    case = NEZHA[name]
    golden = nezha_golden.read(case)
    with tempfile.TemporaryDirectory() as folder:
        directory, gradients = Path(folder) / "checkpoint", Path(folder) / "gradients"
        for into, kind in ((directory, "weight"), (gradients, "gradient")):
            into.mkdir()
            nezha_golden.write(case, into, golden[kind])
        loaded = zoo.load_pretrained(directory)
        theirs = flatten_dict(zoo.load_pretrained(gradients).params)
        with open_weights(zoo.export(loaded, Path(folder) / "exported")) as weights:
            same = set(weights) == set(golden["weight"]) and all(
                np.array_equal(weights.read(tensor), array) for tensor, array in golden["weight"].items()
            )
    inputs, expected = golden["input"], dict(golden["output"])
    expected["hidden"] = expected.pop("hidden_states")[-1]
    del expected["loss"]
    found = loaded.apply(*(inputs[array] for array in ("input_ids", "attention_mask", "token_type_ids")))._asdict()
    its = flatten_dict(ours.run(plain(loaded.config), inputs, loaded.params).gradients)
    assert set(its) == set(theirs)
    return {
        "case": name,
        "family": loaded.architecture,
        "class": nezha_golden.CASES[case]["architectures"][0],
        "source": nezha_golden.SOURCE,
        "outputs": differences.of_arrays(found, expected, inputs["attention_mask"] > 0),
        "gradients": max(float(np.abs(its[leaf] - theirs[leaf]).max()) for leaf in theirs)
        / max(float(np.abs(leaf).max()) for leaf in theirs.values()),
        "exported": 0.0 if same else None,
        "date": datetime.date.today().isoformat(),
        "jax": version("jax"),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
