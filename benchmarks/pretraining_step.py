"""How fast does a published model pretrain on this device? A step of masked LM, its share of the device's peak, its memory.

    python -m benchmarks.pretraining_step                                    # bert-base and bert-large, 128 and 512 tokens
    python -m benchmarks.pretraining_step --model=nezha-base --implementation=xla,pallas_gpu --length=512
    python -m benchmarks.pretraining_step --model=bert-base --length=512 --kernels=40   # where a GPU's time goes
    python -m benchmarks.pretraining_step --layers=laid_out                  # one after another instead of in a loop
    python -m benchmarks.pretraining_step --config.model.remat=full --tokens=65536

A step is the compiled update of train.py: forward and backward with the preset's dropout (0.1), gradients clipped to a norm of 1,
LAMB; activations in bfloat16, state in float32. The rows are random tokens, full, of two documents each that do not see each
other; 5 of 32 tokens are masked, and the head sees those alone. A batch lies on the device before anything is timed. The peer is the
device itself: MFU is model FLOPs (arXiv:2204.02311, appendix B; recomputation does not count) over its peak in bfloat16.

Lists make a row for each combination. `--config.…` sets any value of the model and its parts (`--config.encoding=rope`). A batch that
does not fit is halved until it does, which is said.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

from benchmarks.profile import profile
from benchmarks.report import surroundings, table
from benchmarks.training import Training, random_batch
from configs.base import base
from zoo.command_line import Parser, run_main, split_overrides
from zoo.config import plain
from zoo.errors import UserError, near
from zoo.models import presets
from zoo.overrides import apply
from zoo.tasks.masked_lm import MaskedLM
from zoo.training.flops import peak_flops
from zoo.training.host_memory import keep_freed_memory
from zoo.training.step import TrainState

DEFAULT = "default"
LAYERS = {"loop": 1, "laid_out": sys.maxsize}  # `model.unroll`
OPTIMIZER = "lamb"
DOCUMENTS = 2
WARM_UP = 3
# Activations that the backward pass is given, bytes for each token, layer and unit of the width: 33 for bert-large, 34 for bert-base on a GPU.
ACTIVATION_BYTES = 36
# What a step does once for a whole batch, LAMB above all, is a small part of it by then.
MOST_TOKENS = 2**17
ROWS_OF_UNKNOWN_MEMORY = 8
COLUMNS = (
    *(
        "model",
        "tokens",
        "attention",
        "layers",
        "batch",
        "step, ms",
        "rounds, ms",
        "sequences/s",
        "tokens/s",
        "TFLOP/s",
        "MFU, %",
    ),
    *("memory, GiB", "compiling, s"),
)


@dataclass(frozen=True)
class Cell:
    """One row of the table: a preset, a length T, the attention by name, and whether layers are a loop (`model.unroll`)."""

    model: str
    length: int
    implementation: str
    layers: str


@dataclass(frozen=True)
class Measured:
    """A cell's figures. `step_seconds` has one for each round; `planned_bytes` is what the compiled program needs, state and batch
    included; `peak_bytes` the most that the device has held since the process began, None where it does not say."""

    cell: Cell
    batch: int
    step_seconds: tuple[float, ...]
    flops: float
    compile_seconds: float
    planned_bytes: int
    peak_bytes: int | None

    @property
    def seconds(self) -> float:
        return statistics.median(self.step_seconds)

    @property
    def mfu(self) -> float | None:
        """Of all devices together."""
        peak = peak_flops(jax.devices()[0].device_kind)
        return None if peak is None else self.flops / self.seconds / (peak * jax.device_count())


class DoesNotFit(Exception):
    """The batch needs more memory than the device has."""


def main(argv: list[str]) -> int:
    """Prints a line for each row as it is measured, and the table."""
    arguments, overrides = split_overrides(argv)
    parser = Parser(prog="benchmarks.pretraining_step", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bert-base,bert-large", help="presets, with commas between them")
    parser.add_argument("--length", default="128,512", help="tokens of a row, at most 512")
    parser.add_argument(
        "--implementation", default=DEFAULT, help="attention: default (the kernels choose), xla, reference, pallas_gpu"
    )
    parser.add_argument("--layers", default="loop", help="loop, laid_out or both, with a comma between them")
    parser.add_argument(
        "--tokens", type=int, help="of a batch, at every length; else what the device's memory should hold"
    )
    parser.add_argument("--rounds", type=int, default=4, help="of which the median counts")
    parser.add_argument("--steps", type=int, default=4, help="of a round; the host waits for the last alone")
    parser.add_argument("--json", type=Path, help="file to append a JSON object to for each row")
    parser.add_argument("--kernels", type=int, default=0, help="on a GPU: so many of a step's longest, by name")
    flags = parser.read(arguments)
    cells = list(cells_of(flags))
    logging.disable(logging.INFO)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    measured, failed = [], 0
    for _, group in itertools.groupby(cells, key=lambda cell: cell.model):
        state: list[TrainState] = []  # of one model, whose parameters do not hang on the length or the kernel
        for cell in group:
            try:
                found = measure(cell, overrides, flags, state)
            except UserError:
                raise
            except (
                Exception
            ) as error:  # the device may be lent by the minute: what fails must not take the other rows along
                failed += 1
                print(f"{cell}: failed: {type(error).__name__}: {str(error)[:2000]}", file=sys.stderr, flush=True)
                state.clear()
                continue
            measured.append(found)
            print(f"{cell}: {1e3 * found.seconds:.1f} ms a step of {found.batch} rows", file=sys.stderr, flush=True)
            if flags.json:
                with flags.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record(found, overrides)) + "\n")
    settings = "".join(f", {path}={text}" for path, text in overrides)
    print(
        f"Masked LM with {OPTIMIZER}, bfloat16, dropout as in the preset{settings}; {flags.rounds} rounds of {flags.steps} steps.\n"
    )
    print(table(COLUMNS, [row_of(found) for found in measured]))
    print("\n" + surroundings("jax", "flax"))
    return int(failed > 0)


def cells_of(flags: Any) -> Iterator[Cell]:
    given = flags.model, flags.length, flags.implementation, flags.layers
    models, lengths, kernels, layers = (value.split(",") for value in given)
    for name in models:
        if name not in presets.names():
            raise UserError(f"--model={name}: {near(name, presets.names())}")
    for name in layers:
        if name not in LAYERS:
            raise UserError(f"--layers={name}: {near(name, LAYERS)}")
    for length in lengths:
        if not (length.isdecimal() and 8 <= int(length) <= 512):
            raise UserError(f"--length={length}: give numbers of tokens from 8 to 512, such as 128,512")
    if min(flags.rounds, flags.steps) < 1:
        raise UserError("--rounds and --steps are at least 1")
    if flags.tokens is not None and flags.tokens < max(map(int, lengths)):
        raise UserError(f"--tokens={flags.tokens} is no row of {max(map(int, lengths))}")
    for model, length, kernel, arrangement in itertools.product(models, lengths, kernels, layers):
        yield Cell(model, int(length), kernel, arrangement)


def config_of(cell: Cell, overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The preset in bfloat16 and without a pooler, which masked LM alone does not need."""
    tree = plain(base(cell.model, dtype="bfloat16", pooler=False, unroll=LAYERS[cell.layers]))
    apply(tree, overrides)
    if cell.implementation != DEFAULT:
        tree["mixer"]["implementation"] = cell.implementation
    return tree


def measure(cell: Cell, overrides: Sequence[tuple[str, str]], flags: Any, state: list[TrainState]) -> Measured:
    """The figures of a cell. `state` holds one training state or none, before and after."""
    config = config_of(cell, overrides)
    task = MaskedLM(max_length=cell.length, max_predictions=5 * cell.length // 32)
    training = Training.of(config, task, OPTIMIZER)
    # A fused kernel is one operation to the tracer, so the arithmetic is counted in the same model without.
    counted = Training.of(config_of(replace(cell, implementation="xla", layers="loop"), overrides), task, OPTIMIZER)
    rows = flags.tokens // cell.length if flags.tokens else rows_that_should_fit(config["model"], cell.length)
    while True:
        batch = training.put(random_batch(task, config["model"]["vocab_size"], rows, DOCUMENTS))
        try:
            timed = functools.partial(time_steps, training, batch, state, flags)
            seconds, compiling, planned = without_memory_errors(timed)
            break
        except DoesNotFit as error:
            state.clear()
            if rows == 1:
                raise
            print(f"{cell}: {rows} rows do not fit, trying {rows // 2} ({error})", file=sys.stderr, flush=True)
            rows //= 2
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return Measured(cell, rows, seconds, counted.flops(batch), compiling, planned, peak)


def rows_that_should_fit(model: Any, length: int) -> int:
    """A power of two, from the device's memory."""
    limit = memory_limit()
    if limit is None:
        return ROWS_OF_UNKNOWN_MEMORY
    tokens = min(MOST_TOKENS, limit / (ACTIVATION_BYTES * model["num_layers"] * model["model_dim"]))
    rows = max(1, int(tokens / length))
    return 2 ** (rows.bit_length() - 1) * jax.device_count()


def memory_limit() -> int | None:
    """Bytes that JAX may take of one device; None where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def time_steps(
    training: Training, batch: Any, state: list[TrainState], flags: Any
) -> tuple[tuple[float, ...], float, int]:
    """(seconds of a step in each round, seconds of compiling, bytes that the program needs)."""
    begin = time.perf_counter()
    update = training.compiled(batch)
    compiling = time.perf_counter() - begin
    memory = update.memory_analysis()
    planned = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    planned -= memory.alias_size_in_bytes
    limit = memory_limit()
    if limit is not None and planned > limit:
        raise DoesNotFit(f"the program needs {planned / 2**30:.1f} GiB of {limit / 2**30:.1f}")
    held = state.pop() if state else training.fresh()
    seconds = []
    for count in (WARM_UP, *(flags.steps,) * flags.rounds):
        begin = time.perf_counter()
        for _ in range(count):
            held, metrics = update(held, batch)
        finite = bool(metrics["finite"])
        seconds.append((time.perf_counter() - begin) / count)
        if not finite:
            raise RuntimeError("a step was not finite")
    state.append(held)
    if flags.kernels:
        print_kernels(update, batch, state, flags.kernels)
    return tuple(seconds[1:]), compiling, planned


def print_kernels(update: Any, batch: Any, state: list[TrainState], count: int) -> None:
    def step() -> Any:
        held, metrics = update(state.pop(), batch)
        state.append(held)
        return metrics

    kernels = profile(step, 2, update.as_text())
    rows = [(k.milliseconds, k.runs, k.name[:60], k.operation[-60:]) for k in kernels[:count]]
    print(table(("ms a step", "runs", f"of {sum(k.milliseconds for k in kernels):.1f} ms", "made from"), rows) + "\n")


def without_memory_errors(function: Callable[[], Any]) -> Any:
    """What `function()` returns; what XLA raises for lack of memory becomes `DoesNotFit`, without the frames that hold arrays."""
    try:
        return function()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        said = str(error).splitlines()[0][:200]
    raise DoesNotFit(said)


def row_of(found: Measured) -> tuple[str | float, ...]:
    cell, rate = found.cell, found.batch / found.seconds
    rounds = f"{1e3 * min(found.step_seconds):.4g} … {1e3 * max(found.step_seconds):.4g}"
    mfu = "" if found.mfu is None else 100 * found.mfu
    return (
        *(cell.model, cell.length, cell.implementation, cell.layers, found.batch, 1e3 * found.seconds, rounds),
        *(rate, rate * cell.length, found.flops / found.seconds / 1e12, mfu),
        *(found.planned_bytes / 2**30, found.compile_seconds),
    )


def record(found: Measured, overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """All of a row, for a machine."""
    return {
        **asdict(found.cell),
        **{name: value for name, value in asdict(found).items() if name != "cell"},
        "mfu": found.mfu,
        "config": dict(overrides),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    sys.exit(run_main(main))
