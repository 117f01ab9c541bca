"""`python -m zoo selfcheck`: versions, devices, and every kernel that this device can run against its plain twin."""

from __future__ import annotations

import platform
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from zoo.command_line import Parser

PACKAGES = ("encoder-zoo", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")

# In float32 with matmul precision "highest", relative to the largest entry. The gradient of a table's row sums up to
# 600 x 600 entries, in another order in every implementation; everything else agrees ten times closer.
TOLERANCE = 3e-4
# Of kernels that multiply in bfloat16: rounded are their operands, probabilities and results, and of a row's gradients the sum
# that is zero in exact arithmetic.
BFLOAT16 = {"pallas_gpu": 2e-2}


def main(argv: list[str]) -> int:
    """Prints what is installed and a table of largest differences; 1 where an implementation disagrees, else 0."""
    Parser(prog="python -m zoo selfcheck", description=__doc__).read(argv)
    print(f"{'python':<18}{platform.python_version()}  {sys.platform} {platform.machine()}")
    for name in PACKAGES:
        print(f"{name:<18}{_version(name)}")

    import jax

    devices = jax.devices()
    print(f"{'devices':<18}{len(devices)} x {devices[0].device_kind} ({devices[0].platform})\n")
    print(f"{'attention with, or':<28}{'implementation':<16}{'forward':>10}{'gradients':>12}")
    rows, absent = [], {}
    for row in compare_all():
        rows.append(row)
        if row.absent and row.absent == absent.get(row.implementation):
            continue  # the same reason for every case is said once
        absent[row.implementation] = row.absent
        print(row, flush=True)
    wrong = [row for row in rows if row.wrong]
    agree = "all agree" if not wrong else f"{len(wrong)} disagree"
    bound = ", ".join(f"{name} to {tolerance:g}" for name, tolerance in BFLOAT16.items())
    print(f"\n{agree} with the plain reference, to {TOLERANCE:g} of the largest entry ({bound}, in bfloat16)")
    return 1 if wrong else 0


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True)
class Row:
    """One implementation on one case: the largest differences from the reference, or why it cannot run here."""

    case: str
    implementation: str
    forward: float = 0.0
    gradients: float = 0.0
    absent: str = ""

    @property
    def wrong(self) -> bool:
        # Written so that NaN counts as wrong.
        tolerance = BFLOAT16.get(self.implementation, TOLERANCE)
        return not self.absent and not (self.forward <= tolerance and self.gradients <= tolerance)

    def __str__(self) -> str:
        if self.absent:
            return f"{'':<28}{self.implementation:<16}  {self.absent}"
        start = f"{self.case:<28}{self.implementation:<16}"
        return f"{start}{self.forward:>10.1e}{self.gradients:>12.1e}" + ("  WRONG" if self.wrong else "")


def compare_all() -> Iterator[Row]:
    """Every implementation beside the reference: attention on every kind of term and mask, PaTH attention, Toeplitz products."""
    import jax
    import jax.numpy as jnp

    from kernels.attention.api import Implementation

    others = [name for name in typing.get_args(Implementation) if name != "reference"]
    with jax.default_matmul_precision("highest"):
        for case, (arrays, terms, mask) in cases().items():
            for name in others:
                absent = _not_here(name)
                if absent:
                    yield Row(case, name, absent=absent)
                    continue
                given = jax.tree.map(jnp.bfloat16, arrays) if name in BFLOAT16 else arrays
                yield _compare(case, name, given, terms, mask)
        for case, (arrays, call) in other_cases().items():
            expected = _value_and_gradients(call, arrays, {"implementation": "reference"})
            for name in ("xla", "pallas_tpu"):
                absent = _not_here(name)
                if absent:
                    yield Row(case, name, absent=absent)
                    continue
                found = _value_and_gradients(call, arrays, {"implementation": name})
                yield Row(case, name, _distance(found[0], expected[0]), _distance(found[1], expected[1]))


def _not_here(name: str) -> str:
    import jax

    from kernels.attention.api import on_hopper

    if name == "pallas_gpu" and not on_hopper():
        return "runs on a Hopper GPU alone"
    return "runs on a TPU alone" if name == "pallas_tpu" and jax.default_backend() != "tpu" else ""


def _compare(case: str, name: str, arrays: Any, terms: Any, mask: Any) -> Row:
    import jax
    import jax.numpy as jnp

    try:
        found = _run(name, arrays, terms, mask)
    except ValueError as error:  # what a named implementation raises where it cannot run
        if name == "xla":  # runs everywhere, so a refusal is a fault
            raise
        reason = str(error).removeprefix(f"attention implementation {name!r}: ")
        return Row(case, name, absent=reason.partition("; those that exist")[0].partition(". implementation=")[0])
    expected = _run("reference", jax.tree.map(jnp.float32, arrays), terms, mask)
    return Row(case, name, _distance(found[0], expected[0]), _distance(found[1], expected[1]))


def _run(implementation: str, arrays: Any, terms: Any, mask: Any) -> tuple[Any, Any]:
    from kernels.attention import attention

    def call(*arrays: Any, terms: Any) -> Any:
        return attention(*arrays, terms=terms, mask=mask, implementation=implementation)

    return _value_and_gradients(lambda arrays, terms: call(*arrays, terms=terms), (arrays, terms), {})


def _value_and_gradients(call: Callable[..., Any], arrays: Any, static: dict[str, Any]) -> tuple[Any, Any]:
    """(output, gradients in every array given) of one weighted sum of the output."""
    import jax
    import jax.numpy as jnp

    def loss(arrays: Any) -> tuple[jax.Array, jax.Array]:
        out = call(*arrays, **static)
        wide = out.astype(jnp.float32)
        return jnp.sum(wide * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return out, gradients


def _distance(found: Any, expected: Any) -> float:
    """The largest difference between two trees of arrays, each relative to its largest entry, or to 1 where that is smaller."""
    import jax
    import numpy as np

    def one(a: Any, b: Any) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.max(np.abs(a - b)) / max(1.0, np.max(np.abs(b))))

    return max(jax.tree.leaves(jax.tree.map(one, found, expected)))


@dataclass(frozen=True)
class SquaredDistance:
    """A bias for the `Pairwise` case: −rate[n] · (i − j)² / 1000."""

    def __call__(self, rate: Any, queries: Any, keys: Any) -> Any:
        return -rate[:, None, None] * (queries - keys) ** 2 / 1000


def cases(batch: int = 1, length: int = 600, heads: int = 2, width: int = 16) -> dict[str, tuple[Any, Any, Any]]:
    """Name → ((q, k, v), terms, mask): one case per kind of term, and the masks; long enough that a chunked kernel needs several chunks."""
    import jax.numpy as jnp
    import numpy as np

    from kernels.attention import (
        AttentionMask,
        Clip,
        Dense,
        Multiply,
        Pairwise,
        PiecewiseLinear,
        Relative,
        RowColumn,
        Table,
        Toeplitz,
    )

    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    def table() -> Any:
        return Table(normal(17, 1, width) / 4, Clip(8))

    shape = (batch, length, heads, width)
    arrays = (normal(*shape), normal(*shape), normal(*shape))
    segments = jnp.repeat(jnp.array([[1, 2, 0]], jnp.int32), length // 3, axis=1).repeat(batch, axis=0)
    full = AttentionMask()
    distance = np.log1p(np.abs(np.arange(1 - length, length))).astype(np.float32)
    line = PiecewiseLinear(distance, 1 + normal(batch, length) ** 2, normal(3), normal(heads, 3), normal(heads, 2))
    bias = Dense(normal(1, heads, length, length))
    return {
        "no term": (arrays, (), full),
        "causal, window, segments": (arrays, (), AttentionMask(True, (40, 0), None, segments, segments)),
        "Toeplitz": (arrays, (Toeplitz(normal(heads, 65)),), full),
        "Relative, query and key": (arrays, (Relative(query=table(), key=table()),), full),
        "Relative, value": (arrays, (Relative(value=table()),), full),
        "Multiply": (arrays, (Multiply(normal(heads, 65)),), full),
        "Multiply, per channel": (arrays, (Multiply(normal(heads, 65, width)),), full),
        "RowColumn": (arrays, (RowColumn(normal(batch, heads, length), normal(batch, heads, length)),), full),
        "PiecewiseLinear": (arrays, (line,), full),
        "Pairwise": (arrays, (Pairwise(np.ones(heads, np.float32), SquaredDistance()),), full),
        "Dense": (arrays, (bias,), full),
    }


def other_cases(length: int = 300, heads: int = 2, width: int = 16) -> dict[str, tuple[Any, Callable[..., Any]]]:
    """Name → (arrays, a function of them and of `implementation`); long enough for several blocks."""
    import numpy as np

    from kernels.path import path_attention
    from kernels.toeplitz import toeplitz_matmul

    rng = np.random.default_rng(1)
    q, k, v, w = (rng.standard_normal((1, length, heads, width), np.float32) for _ in range(4))
    beta, log_forget = (
        2 * rng.random((1, length, heads), np.float32),
        np.log(rng.random((1, length, heads), np.float32)),
    )
    table = rng.standard_normal((heads, 2 * length - 1), np.float32)

    def path(q: Any, k: Any, v: Any, w: Any, beta: Any, log_forget: Any, implementation: Any) -> Any:
        return path_attention(q, k, v, w, beta, log_forget=log_forget, implementation=implementation)

    def causal(t: Any, x: Any, implementation: Any) -> Any:
        return toeplitz_matmul(t, x, causal=True, implementation=implementation)

    return {
        "PaTH, with a forget gate": (
            (q, k, v, w / np.linalg.norm(w, axis=-1, keepdims=True), beta, log_forget),
            path,
        ),
        "Toeplitz product": ((table, v), toeplitz_matmul),
        "Toeplitz product, causal": ((table[:, :length], v), causal),
    }
