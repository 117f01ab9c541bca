"""What does PaTH cost beside attention without positions?

    python -m benchmarks.path                                          # on whatever device is here
    python -m benchmarks.path --head-dim=128 --lengths=8192,32768
    python -m benchmarks.path --lengths= --compiled=v5e,v6e --bundles  # where there is no TPU, but libtpu

Forward, and forward with all gradients, causal, bfloat16 on a TPU or GPU and float32 on a CPU, a constant number of tokens, so
that a length halves the batch. Every implementation of PaTH that runs here, without and with a forget gate, beside our own
attention without terms and `jax.nn.dot_product_attention`; the last column is the time with gradients by that of our attention
in the same run. Each is run many times between two looks at the clock; a figure is the median of several.

Where there is no TPU but libtpu is installed, the TPU kernels are compiled ahead of time for the generations named by
`--compiled`: the memory on the chip that each takes, the bytes of the program, and, with `--bundles`, the words of the final
schedule of its body, each loop counted once. Nothing of that is a measurement of time.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention import Timing, clocked
from benchmarks.chips import chip
from benchmarks.report import surroundings, table
from kernels.attention import AttentionMask, attention
from kernels.path import path_attention
from zoo.command_line import Parser, run_main

CAUSAL = AttentionMask(causal=True)


def main(argv: list[str]) -> None:
    """Prints a table for each length, then one for each generation compiled for."""
    platform = jax.default_backend()
    fused, small = platform in ("tpu", "gpu"), platform == "cpu"
    compilable = platform != "tpu" and importlib.util.find_spec("libtpu") is not None
    parser = Parser(prog="benchmarks.path", description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="256,512" if small else "2048,8192,32768", help="T = S, between commas")
    parser.add_argument("--tokens", type=int, default=1024 if small else 32768, help="B · T")
    parser.add_argument("--heads", type=int, default=2 if small else 12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="measurements, of which the median is taken")
    parser.add_argument("--compiled", default="v5e" if compilable else "", help="generations of TPUs, between commas")
    parser.add_argument(
        "--bundles", action="store_true", help="count the words of each kernel (about 1 GB of temporary files)"
    )
    flags = parser.read(argv)
    logging.disable(logging.INFO)
    dtype = "bfloat16" if fused else "float32"
    for length in map(int, filter(None, flags.lengths.split(","))):
        shape = (max(1, flags.tokens // length), length, flags.heads, flags.head_dim)
        rows, plain = [], None
        for name, timing in measured(shape, dtype, flags.repeats):
            plain = plain or timing
            rows.append(line(name, timing, plain))
        print(f"T = {length}, B = {shape[0]}, {flags.heads} heads of width {flags.head_dim}, {dtype}, causal\n")
        print(table(("", "forward, ms", "with gradients, ms", "÷ attention", "MiB"), rows) + "\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if flags.bundles:  # libtpu reads it when it is loaded
            os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        for generation in filter(None, flags.compiled.split(",")):
            print(f"{generation}, compiled ahead of time, not run: T = 8192, one head of {flags.head_dim}, bfloat16\n")
            facts, size = compiled(generation, flags.head_dim, Path(folder))
            print(table(("kernel", "memory on the chip, MiB", "bundles"), facts))
            print(f"\nprogram: {size / 2**20:.2f} MiB\n")
    print(surroundings("jax", "jaxlib"))


def line(name: str, timing: Timing, plain: Timing) -> tuple[str | float, ...]:
    if timing.failed:
        return (f"{name}: {timing.failed}", "", "", "", "")
    ratio = "" if plain.failed else timing.both / plain.both
    return (name, timing.forward, timing.both, ratio, "" if timing.memory is None else timing.memory)


def measured(shape: tuple[int, ...], dtype: str, repeats: int) -> Iterator[tuple[str, Timing]]:
    """(name, timing): our attention without terms first."""
    plain = functools.partial(attention, mask=CAUSAL)
    of_jax = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    yield "attention without terms", timed(lambda q, k, v, *_: plain(q, k, v), shape, dtype, repeats)
    yield "jax.nn.dot_product_attention", timed(lambda q, k, v, *_: of_jax(q, k, v), shape, dtype, repeats)
    for implementation in ["pallas_tpu", "xla"] if jax.default_backend() == "tpu" else ["xla"]:
        for gate in (False, True):
            call = functools.partial(path, implementation, gate)
            yield f"PaTH ({implementation}){', forget gate' if gate else ''}", timed(call, shape, dtype, repeats)


def path(implementation: str, gate: bool, *arrays: jax.Array) -> jax.Array:
    *given, forget = arrays
    return path_attention(*given, log_forget=forget if gate else None, implementation=implementation)


def timed(call: Callable[..., jax.Array], shape: tuple[int, ...], dtype: str, repeats: int) -> Timing:
    given = arrays(shape, dtype)
    cotangent = given[0]

    def loss(*given):
        return jnp.sum(call(*given).astype(jnp.float32) * cotangent.astype(jnp.float32))

    try:
        programs = [jax.jit(f).lower(*given).compile() for f in (call, jax.grad(loss, argnums=range(len(given))))]
        memory = programs[1].memory_analysis().temp_size_in_bytes / 2**20
        times = [clocked(lambda p=p: p(*given), jax.block_until_ready, repeats) for p in programs]
    except Exception as error:  # whatever a library says is its line in the table
        return Timing(failed=" ".join(str(error).split())[:100] or type(error).__name__)
    return Timing(*times, memory)


def arrays(shape: tuple[int, ...], dtype: str) -> list[jax.Array]:
    """q, k, v, w, β and the forget gate."""
    rng = np.random.default_rng(0)
    q, k, v, w = (rng.standard_normal(shape, np.float32) for _ in range(4))
    beta, forget = (rng.standard_normal(shape[:3], np.float32) for _ in range(2))
    wide = (w / np.linalg.norm(w, axis=-1, keepdims=True), 2 / (1 + np.exp(-beta)), -np.abs(forget) / 8)
    return [*(jnp.asarray(x, dtype) for x in (q, k, v)), *map(jnp.asarray, wide)]


def compiled(generation: str, width: int, folder: Path) -> tuple[list[tuple[str | float, ...]], int]:
    """([(kernel, MiB, bundles)], bytes of the program) of the gradients of PaTH with a forget gate, on one chip."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    sharding = NamedSharding(Mesh(np.array([chip(generation)]), ("x",)), PartitionSpec())
    given = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arrays((1, 8192, 1, width), "bfloat16")]

    def loss(*given):
        return jnp.sum(path("pallas_tpu", True, *given).astype(jnp.float32))

    gradients = jax.jit(jax.grad(loss, argnums=range(6)))
    program = gradients.trace(*given).lower(lowering_platforms=("tpu",)).compile()
    counts, rows = words(folder), []
    call = r"%(\w*path\w*?)_*\.\d+ = .*tpu_custom_call.*\"used_scoped_memory_configs\":\[\{[^}]*\"size\":\"(\d+)\""
    for name, memory in re.findall(call, program.as_text()):
        kernel = name[name.index("path_") :]
        rows.append((kernel, int(memory) / 2**20, counts.get(kernel, "")))
    return rows, program.memory_analysis().generated_code_size_in_bytes


def words(folder: Path) -> dict[str, int]:
    """The bundles of each kernel, from what the compiler wrote into the folder, which is emptied."""
    found = {}
    for file in folder.iterdir():
        if match := re.search(r"(path_\w*?)_*\.\d+-\d+-schedule-analysis_final_bundles", file.name):
            found[match[1]] = int(re.search(r"total scheduled bundles: *(\d+)", file.read_text(errors="replace"))[1])
        file.unlink()
    return found


if __name__ == "__main__":
    sys.exit(run_main(main))
