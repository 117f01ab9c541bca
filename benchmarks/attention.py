"""How fast is attention with relative positions, beside the same kernel without them and beside what libraries have?

    python -m benchmarks.attention                              # our best implementation for this device
    python -m benchmarks.attention --head-dim=128 --lengths=512,8192 --json=runs/attention.jsonl
    python -m benchmarks.attention --peers=none --implementation=xla
    python -m benchmarks.attention --compile-for=v5e            # bundles of the TPU kernels, without a TPU; needs libtpu

Forward, and forward with all gradients (also that of the table), bfloat16 on a GPU or TPU and float32 on a CPU, a constant number of
tokens, so that a length halves the batch. The peers are `jax.nn.dot_product_attention` by cuDNN and by XLA, without a bias
and with the table's bias materialised as `[1, N, T, T]`; on a TPU JAX's flash attention, likewise, and its splash attention; where torch is installed with a GPU, also scaled-dot-product attention,
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
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention_memory import terms_of
from benchmarks.bundles import Compiler, all_of_it
from benchmarks.chips import TPUS
from benchmarks.report import surroundings, table
from kernels.attention import (
    AttentionMask,
    Dense,
    LogBuckets,
    Multiply,
    PiecewiseLinear,
    Relative,
    Reverse,
    RowColumn,
    Table,
    Term,
    Toeplitz,
    attention,
)
from zoo.command_line import Parser, run_main
from zoo.encodings.fire import Fire, FireNetwork, fire_bias

FORWARD, BOTH = 4.0, 14.0  # products of B · N · T² · H
PEERS = ("none", "fused", "jax", "all")


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
    platform = jax.default_backend()
    fast, own = platform != "cpu", {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}.get(platform, "xla")
    parser = Parser(prog="benchmarks.attention", description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="512,2048,8192" if fast else "256,512", help="T = S, between commas")
    parser.add_argument("--tokens", type=int, default=16384 if fast else 1024, help="B · T")
    parser.add_argument("--heads", type=int, default=12 if fast else 4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--implementation", default=own, help="ours")
    parser.add_argument("--peers", choices=PEERS, default="all", help="fused: without a bias; all: torch's, too")
    parser.add_argument("--repeats", type=int, default=5, help="measurements, of which the median is taken")
    parser.add_argument("--json", type=Path, help="a line for each figure is appended to this file")
    parser.add_argument("--compile-for", choices=tuple(TPUS), help="count bundles instead of time")
    flags = parser.read(argv)
    logging.disable(logging.INFO)
    if flags.compile_for:
        print(
            table(
                ("terms", "kernel", "width", "bundles of a tile of two heads of 64 or one of 128"),
                list(counted(flags.compile_for)),
            )
        )
        print(
            f"\nCompiled for {flags.compile_for}, not run; 512 × 512, bfloat16. "
            + surroundings("jax", "jaxlib", "libtpu")
        )
        return
    dtype = "bfloat16" if fast else "float32"
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
    calls = {
        f"ours ({implementation}), {name}": functools.partial(ours, setting, implementation, terms)
        for name, terms in {
            **terms_of(setting.N, setting.H),
            **deberta(setting.N, setting.H),
            **fire(setting.N, setting.B, setting.T),
        }.items()
    }
    if peers in ("jax", "all"):
        calls[f"ours ({implementation}), bias [1, N, T, T] (Dense)"] = functools.partial(dense, setting, implementation)
    if peers != "none":
        calls |= peers_in_jax(setting, fused=peers == "fused")
    yield from in_jax(setting, calls, repeats)
    if peers == "all" and jax.default_backend() == "gpu" and importlib.util.find_spec("torch"):
        from benchmarks import attention_torch

        yield from attention_torch.measured(setting, repeats)


def peers_in_jax(setting: Setting, fused: bool) -> dict[str, Callable[..., jax.Array]]:
    """`fused`: those alone that hold no scores in memory."""
    on_tpu = jax.default_backend() == "tpu"
    calls: dict[str, Callable[..., jax.Array]] = {}
    for library in ("flash", "xla") if on_tpu else ("cudnn", "xla"):
        for bias in (False, True):
            if fused and (bias or library == "xla"):
                continue
            peer = of_flash if library == "flash" else functools.partial(of_jax, library)
            name = "jax flash attention" if library == "flash" else f"jax.nn ({library})"
            calls[f"{name}, {'bias [1, N, T, T]' if bias else 'none'}"] = functools.partial(peer, setting, bias)
    if on_tpu:
        calls["jax splash attention, none"] = functools.partial(of_splash, setting)
    return calls


def ours(
    setting: Setting, implementation: str, terms: tuple, q: jax.Array, k: jax.Array, v: jax.Array, values: jax.Array
) -> jax.Array:
    terms = tuple(with_values(term, values) for term in terms)
    mask = AttentionMask(causal=setting.causal)
    return attention(q, k, v, terms=terms, mask=mask, implementation=implementation)


def with_values(term: Term, values: jax.Array) -> Term:
    """The term with what is learned from `values`, by which the call is differentiated."""
    match term:
        case Toeplitz():
            return Toeplitz(values)
        case PiecewiseLinear():
            return dataclasses.replace(term, slopes=values[:, : term.knots.shape[0]])
        case Relative(query=Table(), key=Table()):
            rows = jnp.broadcast_to(
                jnp.tile(values.T, (2, 1))[: len(term.query.values), :, None], term.query.values.shape
            )
            return Relative(*(dataclasses.replace(table, values=rows) for table in (term.query, term.key)))
    return term


def dense(
    setting: Setting, implementation: str, q: jax.Array, k: jax.Array, v: jax.Array, values: jax.Array
) -> jax.Array:
    terms, mask = (Dense(materialised(setting, values).astype(q.dtype)),), AttentionMask(causal=setting.causal)
    return attention(q, k, v, terms=terms, mask=mask, implementation=implementation)


def of_jax(
    library: str, setting: Setting, bias: bool, q: jax.Array, k: jax.Array, v: jax.Array, values: jax.Array
) -> jax.Array:
    given = materialised(setting, values).astype(q.dtype) if bias else None
    return jax.nn.dot_product_attention(q, k, v, bias=given, is_causal=setting.causal, implementation=library)


def of_flash(setting: Setting, bias: bool, q: jax.Array, k: jax.Array, v: jax.Array, values: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    given = None
    if bias:  # which it wants for every row of the batch
        given = jnp.broadcast_to(materialised(setting, values), (setting.B, setting.N, setting.T, setting.T))
    out = flash_attention(q, k, v, given, causal=setting.causal, sm_scale=setting.H**-0.5)
    return jnp.swapaxes(out, 1, 2)


def of_splash(setting: Setting, q: jax.Array, k: jax.Array, v: jax.Array, values: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    kind = splash_attention_mask.CausalMask if setting.causal else splash_attention_mask.FullMask
    mask = splash_attention_mask.MultiHeadMask([kind((setting.T, setting.T))] * setting.N)
    kernel = splash_attention_kernel.make_splash_mha_single_device(mask)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * setting.H**-0.5, k, v))
    return jnp.swapaxes(jax.vmap(kernel)(q, k, v), 1, 2) + 0 * jnp.sum(values).astype(q.dtype)


def materialised(setting: Setting, values: jax.Array) -> jax.Array:
    """The table's bias `[1, N, T, T]`."""
    r = np.arange(setting.T)[None, :] - np.arange(setting.T)[:, None]
    return values[:, np.clip(r + 128, 0, 256)][None]


def counted(generation: str) -> Iterator[tuple[str, str, float, float]]:
    """Bundles of the three kernels for each kind of term: of a call of one tile, on the diagonal; a knot once."""
    compiler, length = Compiler(), 512
    try:
        for width in (64, 128):
            heads = 128 // width
            q = jax.ShapeDtypeStruct((1, length, heads, width), jnp.bfloat16)
            cases = terms_of(heads, width) | further_terms(heads, width, length) | {"none, dropout": ()}
            for name, terms in cases.items():
                leaves, tree = jax.tree.flatten(terms)
                dropout = (0.1, jax.random.key(0)) if "dropout" in name else None

                def gradients(q, k, v, *leaves, tree=tree, dropout=dropout):
                    def call(q, k, v, leaves):
                        terms = jax.tree.unflatten(tree, leaves)
                        return attention(q, k, v, terms=terms, dropout=dropout, implementation="pallas_tpu")

                    out, pull = jax.vjp(call, q, k, v, leaves)
                    return pull(out)

                shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
                found = compiler.bundles(generation, gradients, q, q, q, *shapes, count=all_of_it)
                yield from ((name, kernel, float(width), float(bundles)) for kernel, bundles in found.items())
    finally:
        compiler.forget()


def further_terms(heads: int, width: int, length: int) -> dict[str, tuple]:
    """As the encodings `deberta` and `fire` make them, and the other kinds."""
    numbers = jnp.zeros((1, heads, length))
    return {
        **deberta(heads, width),
        **fire(heads, 1, length),
        "Multiply": (Multiply(jnp.zeros((heads, 2 * length - 1))),),
        "RowColumn": (RowColumn(numbers, numbers),),
    }


def deberta(heads: int, width: int) -> dict[str, tuple[Relative]]:
    """As version 3 has it: query and key tables for each head, 256 log buckets to either side."""
    rows, buckets = jnp.zeros((512, heads, width)), LogBuckets(256, 512)
    return {"deberta (Relative)": (Relative(query=Table(rows, buckets), key=Table(rows, Reverse(buckets))),)}


def fire(heads: int, batch: int, length: int) -> dict[str, tuple[PiecewiseLinear]]:
    """As the encoding makes it before it is trained."""
    encoding = Fire()
    net, _ = FireNetwork(encoding, heads).init_with_output(jax.random.key(0), None)
    place = jnp.broadcast_to(jnp.arange(length), (batch, length))
    return {"fire (PiecewiseLinear)": (fire_bias(net, encoding.transform, place, length - 1),)}


def in_jax(setting: Setting, calls: dict[str, Callable[..., jax.Array]], repeats: int) -> Iterator[tuple[str, Timing]]:
    """(name, timing) of each: all are compiled side by side first, and timed one after another."""
    *arrays, values = setting.arrays()
    q, k, v, cotangent = (jnp.asarray(x, setting.dtype) for x in arrays)
    given = q, k, v, jnp.asarray(values), cotangent

    def compiled(call: Callable[..., jax.Array]) -> list[Any]:
        def loss(q, k, v, values, cotangent):
            return jnp.sum(call(q, k, v, values).astype(jnp.float32) * cotangent)

        def forward(q, k, v, values, _):
            return call(q, k, v, values)

        return [jax.jit(f).lower(*given).compile() for f in (forward, jax.grad(loss, argnums=(0, 1, 2, 3)))]

    with ThreadPoolExecutor() as threads:
        pending = {name: threads.submit(compiled, call) for name, call in calls.items()}
        wait(pending.values())
    for name, programs in pending.items():
        try:
            forward, both = programs.result()
            memory = both.memory_analysis().temp_size_in_bytes / 2**20
            times = [clocked(lambda p=p: p(*given), jax.block_until_ready, repeats) for p in (forward, both)]
            yield name, Timing(*times, memory)
        except Exception as error:  # whatever a library says is its line in the table
            yield name, Timing(failed=" ".join(str(error).split())[:100] or type(error).__name__)


def clocked(call: Callable[[], object], finish: Callable[[object], object], repeats: int) -> float:
    """Milliseconds of one call: the median over `repeats` of the mean of as many calls as take a twentieth of a second."""
    finish(call())
    began = time.perf_counter()
    finish(call())
    count = int(np.clip(0.05 / (time.perf_counter() - began), 1, 200))
    means = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(count):
            result = call()
        finish(result)
        means.append((time.perf_counter() - began) / count * 1000)
    return statistics.median(means)


if __name__ == "__main__":
    sys.exit(run_main(main))
