"""Memory of chunked attention (`xla`) with relative positions against the reference, which holds `[B, N, T, S]`.

    python -m benchmarks.attention_memory
    python -m benchmarks.attention_memory --length=8192 --dtype=bfloat16

Peak temporary memory is what XLA's compiler has planned for the program, inputs and outputs not counted. Nothing is run, so
that a length is no trouble at which the reference would not fit. One row of a batch, as many heads as are asked for.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.report import surroundings, table
from kernels.attention import Clip, Relative, Table, Term, Toeplitz, Wave, attention
from zoo.command_line import Parser, run_main

PEER, OURS = "reference", "xla"
T5_MAX_DISTANCE = 128


def main(argv: list[str]) -> None:
    """Prints a table: a line per term and pass."""
    parser = Parser(prog="benchmarks.attention_memory", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--length", type=int, default=4096, help="T = S; half of it is compiled, too, to show the growth"
    )
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    flags = parser.read(argv)
    logging.disable(logging.INFO)
    shape = (1, flags.length, flags.heads, flags.head_dim)
    half = (1, flags.length // 2, *shape[2:])
    lines = []
    for name, terms in terms_of(flags.heads, flags.head_dim).items():
        for pass_name, program in (("forward", forward), ("forward and backward", backward)):
            peer, ours = (mebibytes(program(i), shape, flags.dtype, terms) for i in (PEER, OURS))
            growth = [now / mebibytes(program(i), half, flags.dtype, terms) for now, i in ((peer, PEER), (ours, OURS))]
            lines.append((name, pass_name, peer, ours, peer / ours, *growth))
    print(
        f"T = {flags.length}, {flags.heads} heads of width {flags.head_dim}, {flags.dtype}; MiB of temporary memory.\n"
    )
    grows = f"T {half[1]} → {shape[1]}"
    columns = ("term", "pass", PEER, OURS, f"{PEER} ÷ {OURS}", f"{PEER}, {grows}", f"{OURS}, {grows}")
    print(table(columns, lines))
    print("\n" + surroundings("jax", "jaxlib"))


def terms_of(heads: int, head_dim: int) -> dict[str, tuple[Term, ...]]:
    """The terms as the encodings `t5` (learned) and `nezha` (a fixed sinusoid at queries and values) make them."""
    clip, wave = Clip(64), Wave(10000.0, 0.0)
    t5 = Toeplitz(jnp.zeros((heads, 2 * T5_MAX_DISTANCE + 1), jnp.float32))
    rows = Table(jnp.asarray(wave.table(clip.num_rows, head_dim))[:, None, :], clip, wave)
    return {"none": (), "t5 (Toeplitz)": (t5,), "nezha (Relative)": (Relative(query=rows, value=rows),)}


def forward(implementation: str) -> Callable[..., jax.Array]:
    """(q, k, v, terms) → the output."""
    return lambda q, k, v, terms: attention(q, k, v, terms=terms, implementation=implementation)


def backward(implementation: str) -> Callable[..., tuple]:
    """(q, k, v, terms) → the gradients by all four."""

    def loss(*arguments: object) -> jax.Array:
        return jnp.square(forward(implementation)(*arguments)).astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1, 2, 3))


def mebibytes(program: Callable[..., object], shape: tuple[int, ...], dtype: str, terms: tuple[Term, ...]) -> float:
    """Temporary memory that the compiled program has planned."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    return jax.jit(program).lower(x, x, x, terms).compile().memory_analysis().temp_size_in_bytes / 2**20


if __name__ == "__main__":
    sys.exit(run_main(main))
