"""What a run writes down: `metrics.jsonl` with deterministic values only, `timing.jsonl` with those of the clock.

Both hold one JSON object a line with `step` first. Two equal runs write the same bytes into `metrics.jsonl`; a resume cuts both
files back to the checkpoint's step and goes on writing what the unbroken run would have written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from zoo.atomic import write_atomically
from zoo.errors import UserError, writing

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"


class Records:
    """The two files of a run, and TensorBoard's beside them.

    Order of a loop that can be killed anywhere: metrics of all steps up to the checkpoint's, its evaluation included, then
    `sync`, then the save. `primary=False` (processes other than the first) writes nothing.

    Every method that writes raises `WriteFailed`, naming the file, when it cannot; a resume drops what it left half-written.
    """

    def __init__(self, workdir: str | Path, *, tensorboard: bool = True, primary: bool = True):
        self.workdir = Path(workdir)
        self._primary = primary
        self._files: dict[str, BinaryIO] = {}
        self._tensorboard = tensorboard and primary
        self._writer: Any = None
        self._first_step = 0

    def cut(self, step: int | None) -> None:
        """Drops what is later than `step`, the checkpoint's; None (no checkpoint: the run starts anew) drops everything.

        A last line without its end, as a kill leaves it, is dropped. Each file is replaced in one go.

        Raises:
          UserError: a line is not a record; says which.
        """
        if self._files or self._writer is not None:
            raise ValueError("records are cut back before anything is written")
        self._first_step = 0 if step is None else step + 1
        if not self._primary:
            return
        for name in (METRICS, TIMING):
            path = self.workdir / name
            if not path.exists():
                continue
            kept = [] if step is None else [line for line, record in _lines(path) if record["step"] <= step]
            write_atomically(path, b"".join(kept))

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of values that depend on config, seed and data alone: numbers, booleans and host or device scalars.

        fp32 values are written in their shortest form; a value that is not finite becomes null.
        """
        self._write(METRICS, step, values)

    def timing(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of values of the clock and the machine: seconds, tokens/s."""
        self._write(TIMING, step, values)

    def sync(self) -> None:
        """Makes everything written so far durable. Call it before the save of a checkpoint."""
        for name, file in self._files.items():
            with writing(self.workdir / name):
                os.fsync(file.fileno())
        if self._writer is not None:
            with writing(self._writer.path):
                self._writer.flush()

    def close(self) -> None:
        files, writer = self._files, self._writer
        try:
            self.sync()
        finally:
            self._files, self._writer = {}, None
            for file in files.values():
                file.close()
            if writer is not None:
                with writing(writer.path):
                    writer.close()

    def report_nonfinite(
        self, step: int, epochs: Sequence[int], example_indices: Sequence[int], values: Mapping[str, Any]
    ) -> Path:
        """Writes `nonfinite_step_<step>.json`: the examples in the batch of the step and the epoch of each, which says
        how text was packed into rows; and `values`, such as the step's metrics.
        """
        path = self.workdir / f"nonfinite_step_{step:08d}.json"
        report = {
            "step": int(step),
            "epochs": [int(epoch) for epoch in np.asarray(epochs).ravel()],
            "example_indices": [int(index) for index in np.asarray(example_indices).ravel()],
            "metrics": {name: plain(value) for name, value in values.items()},
        }
        if self._primary:
            self.workdir.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(report, indent=1, allow_nan=False).encode() + b"\n")
        return path

    def _write(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        if not self._primary:
            return
        record = {"step": int(step)} | {key: plain(value) for key, value in values.items()}
        if record["step"] != int(step):
            raise ValueError(f"a record of step {step} brings a step of its own: {record['step']}")
        line = memoryview(json.dumps(record, allow_nan=False).encode() + b"\n")
        with writing(self.workdir / name):
            if name not in self._files:
                self.workdir.mkdir(parents=True, exist_ok=True)
                # Unbuffered, one write a line: a kill can only shorten the last line.
                self._files[name] = open(self.workdir / name, "ab", buffering=0)  # noqa: SIM115
            while line:  # a disk that becomes full takes a part of the line, and raises at the next write only
                line = line[self._files[name].write(line) :]
        if self._tensorboard:
            self._to_tensorboard(record)

    def _to_tensorboard(self, record: dict[str, Any]) -> None:
        if self._writer is None:
            from zoo.training.tensorboard import EventFile  # half a second that a run without it need not spend

            with writing(self.workdir / "tensorboard"):
                self._writer = EventFile(self.workdir / "tensorboard", first_step=self._first_step)
        curves = {name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)}
        with writing(self._writer.path):
            self._writer.scalars(record["step"], curves)


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of one file, without a half-written last line.

    Raises:
      UserError: a line is not a record; says which.
    """
    return [record for _, record in _lines(Path(path))]


def plain(value: Any) -> bool | int | float | str | None:
    """A scalar as JSON has it, the same text for the same value: fp32 by its shortest digits, non-finite values as None."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if not isinstance(value, float):
        array = np.asarray(value)
        if array.ndim:
            raise ValueError(f"a record holds scalars, not an array of shape {array.shape}")
        scalar = array[()]
        if isinstance(scalar, np.bool_ | np.integer):
            return scalar.item()
        value = float(str(scalar)) if array.dtype == np.float32 else float(scalar)
    return float(value) if math.isfinite(value) else None


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    found = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise ValueError("its step is no whole number")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: not a record with a step ({error})") from error
        found.append((line, record))
    return found
