"""Seconds from the command to the first finished step of `train.py`: with an empty compilation cache, with a full one, and
when a run is resumed.

    python -m benchmarks.startup
    python -m benchmarks.startup --config=configs/nezha.py:pretrain,size=tiny --config.data.train=corpus.txt …

The cache is JAX's own (`JAX_COMPILATION_CACHE_DIR`). The clock is read from outside, by the files that a run writes: its
prepared data, `config.json` when everything is compiled, the first line of `metrics.jsonl`. Beside the clock stands the time of
all processors, which other users of the machine do not change. Linux only.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.report import surroundings, table
from zoo.command_line import Parser, run_main
from zoo.errors import UserError
from zoo.run import CONFIG, DATA
from zoo.training.records import METRICS, read_records
from zoo.training.signals import STOPPED_EXIT_CODE

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("imports", "data, model", "compilation", "first step")
KINDS = ("new run, empty cache", "new run, full cache", "resumed run, full cache")
NEVER = 1800.0  # seconds after which a start counts as hung


class Moment(NamedTuple):
    """How far a start has come, in seconds since the command."""

    clock: float
    processors: float


def main(argv: list[str]) -> None:
    """Prints two tables: a line per kind of start; `--config.…` goes to `train.py` as it is."""
    parser = Parser(prog="benchmarks.startup", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/demo.py:pretrain")
    parser.add_argument("--repeats", type=int, default=3)
    overrides = [argument for argument in argv if argument.startswith("--config.")]
    flags = parser.read([argument for argument in argv if argument not in overrides])
    command = [sys.executable, "train.py", f"--config={flags.config}", "--config.train.log_every=1", *overrides]
    starts: dict[str, list[tuple[Moment, ...]]] = {kind: [] for kind in KINDS}
    for _ in range(flags.repeats):
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
            imports = moment_of_imports()
            for kind, workdir in zip(KINDS, ("first", "second", "second"), strict=True):
                workdir = Path(folder) / workdir
                starts[kind].append((imports, *moments([*command, f"--workdir={workdir}"], workdir, environment)))
    print(f"{flags.config}: from the command to the first finished step; medians of {flags.repeats}.\n")
    for measure in Moment._fields:
        print(f"{measure}:\n\n{_table(starts, measure)}\n")
    print(surroundings("jax", "flax", "orbax-checkpoint", "grain"))


def _table(starts: dict[str, list[tuple[Moment, ...]]], measure: str) -> str:
    values = {
        kind: [statistics.median(getattr(moment, measure) for moment in column) for column in zip(*rows, strict=True)]
        for kind, rows in starts.items()
    }
    cold = values[KINDS[0]][-1]
    lines = []
    for kind, (imports, data, compiled, first) in values.items():
        # What a resumed run needs is there from the beginning, and says nothing of when it was read.
        stages = ("",) * 3 if kind == KINDS[-1] else (data - imports, compiled - data, first - compiled)
        lines.append((kind, imports, *stages, first, first / cold))
    return table(("start", *STAGES, "total", f"÷ {KINDS[0].partition(', ')[2]}"), lines)


def moments(command: list[str], workdir: Path, environment: dict[str, str]) -> tuple[Moment, Moment, Moment]:
    """When the data are prepared, when everything is compiled, and when a step more than before is done; of the first two,
    the beginning, if they were before. The process is then stopped, which saves its step.
    """
    metrics = workdir / METRICS
    before = max((record["step"] for record in read_records(metrics)), default=0) if metrics.exists() else 0
    begin = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE)

    def moment(condition: Callable[[], bool]) -> Moment:
        while not condition():
            if process.poll() is not None or time.monotonic() > begin + NEVER:
                process.kill()
                raise UserError(f"train.py did not come to its first step:\n{process.communicate()[1]}")
            time.sleep(0.01)
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])  # in user and in kernel mode, of all threads
        return Moment(time.monotonic() - begin, ticks / os.sysconf("SC_CLK_TCK"))

    data = moment(lambda: any((workdir / DATA).glob("train-*")))
    compiled = moment((workdir / CONFIG).exists)
    first = moment(lambda: metrics.exists() and any(record["step"] > before for record in read_records(metrics)))
    process.send_signal(signal.SIGTERM)
    printed = process.communicate()[1]
    if process.returncode not in (0, STOPPED_EXIT_CODE):
        raise UserError(f"train.py failed:\n{printed}")
    return data, compiled, first


def moment_of_imports() -> Moment:
    """When a process has imported all that `train.py` imports; such a process does nothing else."""
    begin, used = time.monotonic(), os.times()
    subprocess.run([sys.executable, "-c", "import train"], cwd=ROOT, check=True)
    now = os.times()
    processor = now.children_user + now.children_system - used.children_user - used.children_system
    return Moment(time.monotonic() - begin, processor)


if __name__ == "__main__":
    sys.exit(run_main(main))
