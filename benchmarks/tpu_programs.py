"""What a published model's training step needs of a TPU that is not there: its compiled program, by attention kernel and length.

    python -m benchmarks.tpu_programs --model=bert-base,nezha-base --generation=v5e,v6e --length=512,2048,8192

Nothing is run or timed: libtpu compiles for a topology (`pip install -e '.[tpu-aot]'`, JAX_PLATFORMS=cpu). A step is the update of train.py with LAMB in
bfloat16, dropout as in the preset, rows of two documents; its memory is one chip's, state and batch included. `scores` says
whether an array of all queries by all keys is in the program.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from benchmarks.bundles import GENERATIONS
from benchmarks.report import surroundings, table
from benchmarks.training import Training, random_batch
from configs.base import base
from zoo.command_line import Parser, run_main
from zoo.config import plain
from zoo.errors import UserError, near
from zoo.models import presets
from zoo.tasks.masked_lm import MaskedLM
from zoo.training.sharding import make_mesh

# Of libtpu: ask no cloud where this machine is, and let other processes use it at the same time.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

DOCUMENTS = 2
KERNELS = ("attention_forward", "attention_dq", "attention_dkv")


def main(argv: list[str]) -> int:
    """Prints a table with a row for each combination."""
    parser = Parser(prog="python -m benchmarks.tpu_programs", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="bert-base,nezha-base,deberta-v3-base", help="presets, with commas between them"
    )
    parser.add_argument("--generation", default="v5e,v6e", help=f"of {', '.join(GENERATIONS)}")
    parser.add_argument("--length", default="512,2048,8192", help="tokens of a row")
    parser.add_argument("--implementation", default="pallas_tpu,xla", help="of attention")
    parser.add_argument("--tokens", type=int, default=8192, help="of a batch, at every length")
    parser.add_argument("--layers", type=int, help="instead of the preset's")
    parser.add_argument("--json", type=Path, help="file to append a JSON object to for each row")
    flags = parser.read(argv)
    rows = []
    for model in flags.model.split(","):
        if model not in presets.names():
            raise UserError(f"--model={model}: {near(model, presets.names())}")
        for generation in flags.generation.split(","):
            if generation not in GENERATIONS:
                raise UserError(f"--generation={generation}: give some of {', '.join(GENERATIONS)}")
            for length in map(int, flags.length.split(",")):
                for implementation in flags.implementation.split(","):
                    found = program(model, generation, length, implementation, flags.tokens, flags.layers)
                    rows.append(found)
                    print(found, file=sys.stderr, flush=True)
                    if flags.json:
                        with flags.json.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(found) + "\n")
    columns = (
        "model",
        "chip",
        "tokens",
        "attention",
        "rows",
        "memory, GiB",
        "of it temporary",
        "kernels",
        "scores",
        "compiling, s",
    )
    print(table(columns, [row_of(found) for found in rows]))
    print("\n" + surroundings("jax", "libtpu"))
    return 0


def program(
    model: str, generation: str, length: int, implementation: str | None, tokens: int, layers: int | None = None
) -> dict[str, Any]:
    """Facts of one compiled update, or why there is none. implementation: None lets the kernels choose, for the platform of the mesh."""
    tree = plain(base(model, dtype="bfloat16", pooler=False, max_length=length))
    tree["mixer"]["implementation"] = implementation
    if layers is not None:
        tree["model"]["num_layers"] = layers
    task = MaskedLM(max_length=length, max_predictions=5 * length // 32)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=GENERATIONS[generation]).devices
    training = Training.of(tree, task, "lamb", make_mesh(devices=devices[:1]))
    batch = random_batch(task, tree["model"]["vocab_size"], max(1, tokens // length), DOCUMENTS)
    facts = {
        "model": model,
        "chip": generation,
        "tokens": length,
        "attention": implementation,
        "rows": max(1, tokens // length),
    }
    begin = time.perf_counter()
    try:
        compiled = training.compiled_for_tpu(batch)
    except jax.errors.JaxRuntimeError as error:
        return facts | {"failed": str(error).splitlines()[0][:200]}
    text, memory = compiled.as_text(), compiled.memory_analysis()
    total = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return facts | {
        "bytes": total - memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "kernels": sorted(name for name in KERNELS if name in text),
        "scores": bool(re.search(rf"\b(?:bf16|f32|pred|s32)\[(?:\d+,)*{length},{length}[,\]]", text)),
        "compile_seconds": round(time.perf_counter() - begin, 1),
    }


def row_of(found: dict[str, Any]) -> tuple[str | float, ...]:
    start = tuple(found[name] for name in ("model", "chip", "tokens", "attention", "rows"))
    if "failed" in found:
        return (*start, "", "", f"failed: {found['failed']}", "", "")
    kernels = ", ".join(name.removeprefix("attention_") for name in found["kernels"]) or "none"
    memory = found["bytes"] / 2**30, found["temporary_bytes"] / 2**30
    return (*start, *memory, kernels, "yes" if found["scores"] else "no", found["compile_seconds"])


if __name__ == "__main__":
    sys.exit(run_main(main))
