"""How fast is the Toeplitz product beside an FFT written plainly and beside the dense matrix?

    python -m benchmarks.toeplitz                              # our best implementation for this device
    python -m benchmarks.toeplitz --lengths=512,65536 --channels=1 --causal
    python -m benchmarks.toeplitz --compile-for=v5e            # bundles of the TPU kernels, without a TPU; needs libtpu

Forward, and forward with the gradients of t and x, in the dtype given and a constant number of tokens, so that a length halves the batch.
The FFT is irfft(rfft(t) · rfft(x)) at twice the length, as one would write it, differentiated by JAX; the dense product is the
definition, where its matrices fit. Each is run many times between two looks at the clock; a figure is the median of several. Memory is what
XLA has planned beside inputs and outputs; what is kept is what a forward pass hands to its backward pass.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention import Timing, clocked
from benchmarks.bundles import Compiler
from benchmarks.chips import TPUS
from benchmarks.report import surroundings, table
from kernels.toeplitz import pallas_tpu, toeplitz_matmul
from zoo.command_line import Parser, run_main

_DENSE_ENTRIES = {"cpu": 2**24}  # of the matrices of all heads; on other platforms 2²⁸


@dataclass(frozen=True)
class Setting:
    """One call: B rows of T tokens, N heads of C channels."""

    B: int
    T: int
    N: int
    C: int
    causal: bool
    dtype: str

    def arrays(self) -> list[jax.Array]:
        """t, x and the output's cotangent."""
        rng = np.random.default_rng(0)
        t = rng.standard_normal((self.N, self.T if self.causal else 2 * self.T - 1), np.float32)
        x, dy = (rng.standard_normal((self.B, self.T, self.N, self.C), np.float32) for _ in range(2))
        return [jnp.asarray(t), jnp.asarray(x, self.dtype), jnp.asarray(dy, self.dtype)]


def main(argv: list[str]) -> None:
    """Prints a table for each length, or one of bundles."""
    accelerated = jax.default_backend() != "cpu"
    parser = Parser(prog="benchmarks.toeplitz", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--lengths", default="512,4096,65536" if accelerated else "256,2048,16384", help="between commas"
    )
    parser.add_argument("--tokens", type=int, default=2**18 if accelerated else 16384, help="B · T")
    parser.add_argument("--heads", type=int, default=8 if accelerated else 4)
    parser.add_argument("--channels", type=int, default=64 if accelerated else 16, help="of a head")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if accelerated else "float32")
    parser.add_argument("--repeats", type=int, default=5, help="measurements, of which the median is taken")
    parser.add_argument("--compile-for", choices=tuple(TPUS), help="count bundles instead of time")
    flags = parser.read(argv)
    logging.disable(logging.INFO)
    if flags.compile_for:
        print(table(("kernel", "dtype", "one turn of its loop", "bundles"), list(counted(flags.compile_for))) + "\n")
        print(f"Compiled for {flags.compile_for}, not run. " + surroundings("jax", "jaxlib", "libtpu"))
        return
    for length in map(int, flags.lengths.split(",")):
        batch = max(1, flags.tokens // length)
        setting = Setting(batch, length, flags.heads, flags.channels, flags.causal, flags.dtype)
        timings = list(measured(setting, flags.repeats))
        rows = [line(name, timing, timings[0][1], kept) for name, timing, kept in timings]
        causal = ", causal" if flags.causal else ""
        print(f"T = {length}, B = {batch}, {flags.heads} heads of {flags.channels} channels, {flags.dtype}{causal}\n")
        columns = ("product", "forward, ms", "÷ ours", "with gradients, ms", "÷ ours", "MiB", "kept ÷ x")
        print(table(columns, rows) + "\n", flush=True)
    print(surroundings("jax", "jaxlib"))


def line(name: str, timing: Timing, ours: Timing, kept: float) -> tuple[str | float, ...]:
    if timing.failed:
        return (f"{name}: {timing.failed}", "", "", "", "", "", "")
    ratios = timing.forward / ours.forward, timing.both / ours.both
    return (name, timing.forward, ratios[0], timing.both, ratios[1], timing.memory, kept)


def measured(setting: Setting, repeats: int) -> Iterator[tuple[str, Timing, float]]:
    """(name, timing, what is kept ÷ x) of ours, then of the peers."""
    ours = "pallas_tpu" if jax.default_backend() == "tpu" else "xla"
    products = {
        f"ours ({ours})": functools.partial(toeplitz_matmul, causal=setting.causal, implementation=ours),
        "jnp.fft, plainly": functools.partial(plain_fft, causal=setting.causal),
    }
    if ours != "xla":
        products["ours (xla)"] = functools.partial(toeplitz_matmul, causal=setting.causal, implementation="xla")
    if _DENSE_ENTRIES.get(jax.default_backend(), 2**28) >= setting.N * setting.T**2:
        products["dense"] = functools.partial(toeplitz_matmul, causal=setting.causal, implementation="reference")
    for name, product in products.items():
        t, x, _ = setting.arrays()
        kept = jax.tree.leaves(jax.eval_shape(lambda t, x, product=product: jax.vjp(product, t, x)[1], t, x))
        yield name, in_jax(setting, product, repeats), sum(a.size * a.dtype.itemsize for a in kept) / x.nbytes


def plain_fft(t: jax.Array, x: jax.Array, *, causal: bool) -> jax.Array:
    length = x.shape[1]
    past, future = (t, t[:, :0]) if causal else (t[:, length - 1 :: -1], t[:, : length - 1 : -1])
    gap = jnp.zeros((t.shape[0], 2 * length - t.shape[1]), t.dtype)
    kernel = jnp.fft.rfft(jnp.concatenate([past, gap, future], axis=1), axis=1)
    spectrum = jnp.fft.rfft(x.astype(jnp.float32), n=2 * length, axis=1) * kernel.T[None, :, :, None]
    return jnp.fft.irfft(spectrum, n=2 * length, axis=1)[:, :length].astype(x.dtype)


def in_jax(setting: Setting, product: Callable[[jax.Array, jax.Array], jax.Array], repeats: int) -> Timing:
    arrays = setting.arrays()

    def both(t, x, dy):
        y, pull = jax.vjp(product, t, x)
        return y, *pull(dy)

    try:
        programs = [jax.jit(f).lower(*arrays).compile() for f in (lambda t, x, dy: product(t, x), both)]
        memory = programs[1].memory_analysis().temp_size_in_bytes / 2**20
        times = [clocked(lambda p=p: p(*arrays), jax.block_until_ready, repeats) for p in programs]
    except Exception as error:  # whatever a library says is its line in the table
        return Timing(failed=" ".join(str(error).split())[:100] or type(error).__name__)
    return Timing(*times, memory)


def counted(generation: str) -> Iterator[tuple[str, str, str, int]]:
    """Bundles of the kernels of both forms: of 128 rows and of 64, of circles of 4,096 and of 16,384 points."""
    compiler = Compiler()
    try:
        for dtype in ("bfloat16", "float32"):
            for form, length, rows in (
                ("direct", 2048, 128),
                ("direct", 2048, 64),
                ("dft", 2048, 16),
                ("dft", 8192, 16),
            ):
                shapes = ((1, 2 * length - 1), jnp.float32), *(((1, length, 1, rows), dtype),) * 2
                product = functools.partial(pallas_tpu.toeplitz_matmul, causal=False, form=form)
                found = compiler.bundles(
                    generation,
                    lambda t, x, dy, product=product: (*jax.vjp(product, t, x)[1](dy), product(t, x)),
                    *(jax.ShapeDtypeStruct(*shape) for shape in shapes),
                )
                what = f"{rows} rows, 128 tokens by 512" if form == "direct" else f"a pair of {length} tokens"
                yield from ((name, dtype, what, bundles) for name, bundles in found.items())
    finally:
        compiler.forget()


if __name__ == "__main__":
    sys.exit(run_main(main))
