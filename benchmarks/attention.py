"""How fast is attention with relative positions, beside the same kernel without them and beside what libraries have?

    python -m benchmarks.attention                              # our best implementation for this device
    python -m benchmarks.attention --head-dim=128 --lengths=512,8192 --json=runs/attention.jsonl
    python -m benchmarks.attention --peers=none --implementation=xla

Forward, and forward with all gradients (also that of the table), bfloat16 on a GPU and float32 on a CPU, a constant number of
tokens, so that a length halves the batch. The peers are `jax.nn.dot_product_attention` by cuDNN and by XLA, without a bias
and with the table's bias materialised as `[1, N, T, T]`; where torch is installed with a GPU, also scaled-dot-product attention,
the same with the bias, and FlexAttention with the bias looked up in the table. Each is run many times between two looks at the
clock; a figure is the median of several. TFLOP/s counts the matrix products 4 · B · N · T² · H of the forward and 2.5 times as many of
the backward, causal or not. Memory is what XLA has planned beside inputs and outputs.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention_memory import terms_of
from benchmarks.report import surroundings, table
from kernels.attention import AttentionMask, Toeplitz, attention
from zoo.command_line import Parser, run_main

FORWARD, BOTH = 4.0, 14.0  # products of B · N · T² · H
PEERS = ("none", "jax", "all")


@dataclass(frozen=True)
class Setting:
    """One call: B rows of T tokens, N heads of width H."""

    B: int
    T: int
    N: int
    H: int
    causal: bool
    dtype: str

    def arrays(self) -> list[np.ndarray]:
        """q, k, v, the output's cotangent, and a table of T5's size."""
        rng = np.random.default_rng(0)
        made = [rng.standard_normal((self.B, self.T, self.N, self.H), np.float32) for _ in range(4)]
        return [*made, rng.standard_normal((self.N, 2 * 128 + 1), np.float32)]

    def flops(self, factor: float) -> float:
        return factor * self.B * self.N * self.T**2 * self.H


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call and MiB of temporary memory (None where the library does not say), or why there is none."""

    forward: float = 0.0
    both: float = 0.0
    memory: float | None = None
    failed: str = ""


def main(argv: list[str]) -> None:
    """Prints a table for each length."""
    gpu = jax.default_backend() == "gpu"
    parser = Parser(prog="benchmarks.attention", description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="512,2048,8192" if gpu else "256,512", help="T = S, between commas")
    parser.add_argument("--tokens", type=int, default=16384 if gpu else 1024, help="B · T")
    parser.add_argument("--heads", type=int, default=12 if gpu else 4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--implementation", default="pallas_gpu" if gpu else "xla", help="ours")
    parser.add_argument("--peers", choices=PEERS, default="all", help="all: those in torch as well, where it is")
    parser.add_argument("--repeats", type=int, default=5, help="measurements, of which the median is taken")
    parser.add_argument("--json", type=Path, help="a line for each figure is appended to this file")
    flags = parser.read(argv)
    logging.disable(logging.INFO)
    dtype = "bfloat16" if gpu else "float32"
    for length in map(int, flags.lengths.split(",")):
        batch = max(1, flags.tokens // length)
        setting = Setting(batch, length, flags.heads, flags.head_dim, flags.causal, dtype)
        rows, plain = [], None
        for name, timing in measured(setting, flags.implementation, flags.peers, flags.repeats):
            plain = plain or timing
            rows.append(line(setting, name, timing, plain))
            if flags.json:
                with flags.json.open("a", encoding="utf-8") as file:
                    row = {"name": name, **dataclasses.asdict(setting), **dataclasses.asdict(timing)}
                    file.write(json.dumps(row | {"device": jax.devices()[0].device_kind}) + "\n")
        causal = ", causal" if flags.causal else ""
        print(f"T = {length}, B = {batch}, {flags.heads} heads of width {flags.head_dim}, {dtype}{causal}\n")
        columns = ("attention", "forward, ms", "TFLOP/s", "with gradients, ms", "TFLOP/s", "÷ ours, none", "MiB")
        print(table(columns, rows) + "\n", flush=True)
    print(surroundings("jax", "jaxlib", *(["torch"] if importlib.util.find_spec("torch") else [])))


def line(setting: Setting, name: str, timing: Timing, plain: Timing) -> tuple[str | float, ...]:
    if timing.failed:
        return (f"{name}: {timing.failed}", "", "", "", "", "", "")
    speed = [setting.flops(n) / t / 1e9 for n, t in ((FORWARD, timing.forward), (BOTH, timing.both))]
    memory = "" if timing.memory is None else timing.memory
    return (name, timing.forward, speed[0], timing.both, speed[1], timing.both / plain.both, memory)


def measured(setting: Setting, implementation: str, peers: str, repeats: int) -> Iterator[tuple[str, Timing]]:
    """(name, timing) of ours without terms, ours with them, then the peers."""
    for name, terms in terms_of(setting.N, setting.H).items():
        call = functools.partial(ours, setting, implementation, terms)
        yield f"ours ({implementation}), {name}", in_jax(setting, call, repeats)
    if peers == "none":
        return
    for library in ("cudnn", "xla"):
        for bias in (False, True):
            call = functools.partial(of_jax, setting, library, bias)
            yield f"jax.nn ({library}), {'bias [1, N, T, T]' if bias else 'none'}", in_jax(setting, call, repeats)
    if peers == "all" and jax.default_backend() == "gpu" and importlib.util.find_spec("torch"):
        from benchmarks import attention_torch

        yield from attention_torch.measured(setting, repeats)


def ours(
    setting: Setting, implementation: str, terms: tuple, q: jax.Array, k: jax.Array, v: jax.Array, values: jax.Array
) -> jax.Array:
    terms = (Toeplitz(values),) if any(isinstance(term, Toeplitz) for term in terms) else terms
    mask = AttentionMask(causal=setting.causal)
    return attention(q, k, v, terms=terms, mask=mask, implementation=implementation)


def of_jax(
    setting: Setting, library: str, bias: bool, q: jax.Array, k: jax.Array, v: jax.Array, values: jax.Array
) -> jax.Array:
    given = None
    if bias:
        r = np.arange(setting.T)[None, :] - np.arange(setting.T)[:, None]
        given = values[:, np.clip(r + 128, 0, 256)][None].astype(q.dtype)
    return jax.nn.dot_product_attention(q, k, v, bias=given, is_causal=setting.causal, implementation=library)


def in_jax(setting: Setting, call: Callable[..., jax.Array], repeats: int) -> Timing:
    *arrays, values = setting.arrays()
    q, k, v, cotangent = (jnp.asarray(x, setting.dtype) for x in arrays)

    def loss(q, k, v, values, cotangent):
        return jnp.sum(call(q, k, v, values).astype(jnp.float32) * cotangent)

    def forward(q, k, v, values, _):
        return call(q, k, v, values)

    try:
        functions = (forward, jax.grad(loss, argnums=(0, 1, 2, 3)))
        programs = [jax.jit(f).lower(q, k, v, values, cotangent).compile() for f in functions]
        memory = programs[1].memory_analysis().temp_size_in_bytes / 2**20
        times = [clocked(lambda p=p: p(q, k, v, values, cotangent), jax.block_until_ready, repeats) for p in programs]
    except Exception as error:  # whatever a library says is its line in the table
        return Timing(failed=" ".join(str(error).split())[:100] or type(error).__name__)
    return Timing(*times, memory)


def clocked(call: Callable[[], object], wait: Callable[[object], object], repeats: int) -> float:
    """Milliseconds of one call: the median over `repeats` of the mean of as many calls as take a twentieth of a second."""
    wait(call())
    began = time.perf_counter()
    wait(call())
    count = int(np.clip(0.05 / (time.perf_counter() - began), 1, 200))
    means = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(count):
            result = call()
        wait(result)
        means.append((time.perf_counter() - began) / count * 1000)
    return statistics.median(means)


if __name__ == "__main__":
    sys.exit(run_main(main))
