"""What a published model's training step needs of a TPU or GPU that is not there: its compiled program's memory, kernels and bytes moved.

    python -m benchmarks.programs --model=bert-base,nezha-base --chip=v5e,v6e --length=512,2048,8192
    python -m benchmarks.programs --chip=h100 --tokens=32768 --layers=loop,laid_out --operations=30   # what moves most bytes
    python -m benchmarks.programs --chip=h100 --layers=loop --config.model.remat=dots

Nothing is run or timed; `benchmarks.chips` says what compiles. A step is that of `benchmarks.pretraining_step`: the update of train.py with LAMB
in bfloat16, dropout as in the preset, rows of two documents. Memory is one chip's, state and batch included. `scores` says whether an array of
all queries by all keys is in the program. Of a program for a GPU the last columns are what its operations read and write
(`benchmarks.traffic`), in GB: matrix products, fused kernels, and all that XLA makes itself.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.chips import CHIPS, GPUS, TPUS, chip
from benchmarks.pretraining_step import DOCUMENTS, LAYERS, OPTIMIZER, Cell, config_of
from benchmarks.report import surroundings, table
from benchmarks.traffic import KERNELS, PRODUCTS, REST, Traffic, by_kind, traffic
from benchmarks.training import Training, random_batch
from zoo.command_line import Parser, run_main, split_overrides
from zoo.errors import UserError, near
from zoo.models import presets
from zoo.tasks.masked_lm import MaskedLM
from zoo.training.sharding import make_mesh

COLUMNS = (
    *("model", "chip", "tokens", "attention", "layers", "rows", "memory, GiB", "of it temporary", "kernels", "scores"),
    *("compiling, s", "products, GB", "kernels, GB", "the rest, GB"),
)
FUSED = "fused"  # the kernels of the chip's platform
_CALL = re.compile(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu\w*)"')


def main(argv: list[str]) -> int:
    """Prints a table with a row for each combination."""
    arguments, overrides = split_overrides(argv)
    parser = Parser(prog="python -m benchmarks.programs", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bert-base,nezha-base,deberta-v3-base", help="presets, with commas between")
    parser.add_argument("--chip", default="v5e,v6e,h100", help=f"of {', '.join(CHIPS)}")
    parser.add_argument("--length", default="512,2048,8192", help="tokens of a row")
    parser.add_argument(
        "--implementation", default="fused,xla", help="of attention: fused (the chip's kernels), xla, …"
    )
    parser.add_argument("--layers", default="loop", help="loop, laid_out or both")
    parser.add_argument("--tokens", type=int, default=8192, help="of a batch, at every length")
    parser.add_argument("--operations", type=int, default=0, help="of a program for a GPU: so many that move most")
    parser.add_argument("--json", type=Path, help="file to append a JSON object to for each row")
    flags = parser.read(arguments)
    for option, known in (("model", presets.names()), ("chip", CHIPS), ("layers", LAYERS)):
        for name in getattr(flags, option).split(","):
            if name not in known:
                raise UserError(f"--{option}={name}: {near(name, known)}")
    rows = []
    lists = flags.model, flags.chip, flags.length, flags.implementation, flags.layers
    for model, target, length, implementation, layers in itertools.product(*(value.split(",") for value in lists)):
        cell = Cell(model, int(length), implementation, layers)
        found, operations = program(cell, target, flags.tokens, overrides)
        rows.append(found)
        print(found, file=sys.stderr, flush=True)
        if flags.json:
            with flags.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found | {"config": dict(overrides)}) + "\n")
        if flags.operations and operations:
            print(f"{cell}, {target}\n\n{of_operations(operations[: flags.operations])}\n")
    print(table(COLUMNS, [row_of(found) for found in rows]))
    compilers = ("libtpu",) if set(flags.chip.split(",")) & set(TPUS) else ()
    print("\n" + surroundings("jax", *compilers))
    return 0


def program(
    cell: Cell, target: str, tokens: int, overrides: Sequence[tuple[str, str]] = ()
) -> tuple[dict[str, Any], list[Traffic]]:
    """Facts of one compiled update, or why there is none, and of one for a GPU what its operations move."""
    length, kernels = cell.length, "pallas_gpu" if target in GPUS else "pallas_tpu"
    implementation = kernels if cell.implementation == FUSED else cell.implementation
    tree = config_of(
        Cell(cell.model, length, implementation, cell.layers), [("model.max_length", str(length)), *overrides]
    )
    task = MaskedLM(max_length=length, max_predictions=5 * length // 32)
    training = Training.of(tree, task, OPTIMIZER, make_mesh(devices=[chip(target)]))
    rows = max(1, tokens // length)
    batch = random_batch(task, tree["model"]["vocab_size"], rows, DOCUMENTS)
    facts = {
        **{"model": cell.model, "chip": target, "tokens": length, "attention": cell.implementation},
        **{"layers": cell.layers, "rows": rows},
    }
    begin = time.perf_counter()
    try:
        compiled = training.compiled_for_mesh(batch)
    except jax.errors.JaxRuntimeError as error:
        return facts | {"failed": str(error).splitlines()[0][:200]}, []
    seconds = time.perf_counter() - begin
    text, memory = compiled.as_text(), compiled.memory_analysis()
    total = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    operations = traffic(text) if target in GPUS else []
    return facts | {
        "bytes": total - memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "kernels": len(_CALL.findall(text)),
        "scores": bool(re.search(rf"\b(?:bf16|f32|pred|s32)\[(?:\d+,)*{length},{length}[,\]]", text)),
        "compile_seconds": round(seconds, 1),
        "moved": by_kind(operations) if operations else {},
    }, operations


def row_of(found: dict[str, Any]) -> tuple[str | float, ...]:
    start = tuple(found[name] for name in ("model", "chip", "tokens", "attention", "layers", "rows"))
    if "failed" in found:
        return (*start, "", "", "", f"failed: {found['failed']}", *[""] * 4)
    memory = found["bytes"] / 2**30, found["temporary_bytes"] / 2**30
    moved = [found["moved"][kind] / 1e9 if found["moved"] else "" for kind in (PRODUCTS, KERNELS, REST)]
    facts = found["kernels"], "yes" if found["scores"] else "no", found["compile_seconds"]
    return (*start, *memory, *facts, *moved)


def of_operations(operations: list[Traffic]) -> str:
    columns = ("MB", "read", "written", "runs", "kind", "name", "made from")
    return table(
        columns,
        [
            (x.bytes / 1e6, x.read / 1e6, x.written / 1e6, x.runs, x.kind, x.name[:50], x.operation[-70:])
            for x in operations
        ],
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
