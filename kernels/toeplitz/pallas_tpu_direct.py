"""The Toeplitz product on TPUs by its blocks: a matrix product for each pair of 128 tokens, O(T²), any dtype safe.

The block between tokens I and J of 128 is one of look-back I − J alone, so a head has 2T/128 of them. They stand side by side in
a skewed table, which is made on the chip once for each head from the 2T values that the head has:

    S[a, 128 d + b] = h[128 d + b − a]           y_I = Σ_J x_J S[:, 128 (I − J) : 128 (I − J) + 128]

with tokens along the lanes and the rows of batch and channels, which share the table, along the sublanes. Neighbouring I read
neighbouring columns, so that a product is as wide as wanted, from an aligned slice. The gradient of the table is gathered in an
array of the same form, dS[:, …] += x_Jᵀ dy_I, and summed along its diagonals at the end: a fixed order, no atomics.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels import mosaic_tpu

LONGEST = 8192  # beyond, the skewed table leaves no room on the chip

_BLOCK = 128
_WIDEST = 4  # blocks of tokens in one product
_ROWS = 128
_SUBLANES = 16  # of a tile of bfloat16; float32 has 8
_BUDGET = 10 * 2**20  # bytes of the skewed table and what stands beside it; the smallest chip has 16 MiB


@dataclass(frozen=True)
class Plan:
    """Sizes of a call, `rows` = B · C. `reach` says which look-backs the table has: "all", "past" or "future"."""

    length: int
    rows: int
    reach: str
    dtype: jnp.dtype
    interpret: mosaic_tpu.Interpret = False

    @property
    def chunks(self) -> int:
        return -(-self.length // (_BLOCK * _WIDEST))

    @property
    def wide(self) -> int:
        """Blocks of a chunk of tokens."""
        return -(-self.length // (_BLOCK * self.chunks))

    @property
    def blocks(self) -> int:
        return self.chunks * self.wide

    @property
    def lags(self) -> range:
        """The look-backs of blocks that the skewed table holds; the first or last of a causal one are zero, so that chunks fit."""
        least = 1 - self.wide if self.reach == "past" else 1 - self.blocks
        return range(least, self.wide if self.reach == "future" else self.blocks)

    @property
    def steps(self) -> int:
        """Products of a block of tokens with as many blocks of the table as a chunk has, for a block of rows."""
        all_chunks = self.chunks * self.blocks
        return all_chunks if self.reach == "all" else (all_chunks + self.blocks) // 2

    @property
    def line(self) -> int:
        """Entries of the table as a line: those of all its blocks, and 128 before them that the first ones reach back to."""
        return _BLOCK * (len(self.lags) + 1)

    @property
    def row_block(self) -> int:
        """Rows of one program: as many as a matrix unit takes, fewer where the table leaves them no room."""
        table = _BLOCK * _BLOCK * len(self.lags) * 4
        per_row = 4 * self.blocks * _BLOCK * self.dtype.itemsize
        room = max(_SUBLANES, (_BUDGET - table) // per_row // _SUBLANES * _SUBLANES)
        most = min(_ROWS, room)
        return _up(-(-self.rows // -(-self.rows // most)), _SUBLANES)

    @property
    def row_blocks(self) -> int:
        return -(-self.rows // self.row_block)

    @property
    def precision(self) -> jax.lax.Precision | None:
        return None if self.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST


def convolve(plan: Plan, x: Float[Array, "N W T"], h: Float[Array, "N _"]) -> Float[Array, "N W T"]:
    """y_i = Σ_n h[n] x_{i−n}, with h from n = −(T − 1) on."""
    heads, size = x.shape[0], plan.wide * _BLOCK
    whole = (1, plan.row_block, plan.blocks * _BLOCK)
    run = mosaic_tpu.kernel(
        functools.partial(_convolve, plan),
        name="toeplitz_direct",
        grid=(heads, plan.row_blocks, plan.chunks),
        sequential=2,
        inputs=[
            pl.BlockSpec((1, 1, plan.line), lambda n, w, i: (n, 0, 0)),
            pl.BlockSpec(whole, lambda n, w, i: (n, w, 0)),
        ],
        outputs=[pl.BlockSpec((1, plan.row_block, size), lambda n, w, i: (n, w, i))],
        shapes=[_rows_shape(plan, heads)],
        scratch=[pltpu.VMEM((_BLOCK, _BLOCK * len(plan.lags)), plan.dtype)],
        interpret=plan.interpret,
    )
    (y,) = run(_line(plan, h), _padded(plan, x))
    return y[:, : plan.rows, : plan.length]


def correlate(plan: Plan, x: Float[Array, "N W T"], dy: Float[Array, "N W T"]) -> Float[Array, "N _"]:
    """dh[n] = Σ_{w,i} dy_i x_{i−n} from n = −(T − 1) on, zero beyond the plan's reach."""
    heads = x.shape[0]
    whole = pl.BlockSpec((1, plan.row_block, plan.blocks * _BLOCK), lambda n, w: (n, w, 0))
    run = mosaic_tpu.kernel(
        functools.partial(_correlate, plan),
        name="toeplitz_direct_table",
        grid=(heads, plan.row_blocks),
        sequential=1,
        inputs=[whole, whole],
        outputs=[pl.BlockSpec((1, 1, plan.line), lambda n, w: (n, 0, 0))],
        shapes=[jax.ShapeDtypeStruct((heads, 1, plan.line), jnp.float32)],
        scratch=[pltpu.VMEM((_BLOCK, _BLOCK * len(plan.lags)), jnp.float32)],
        interpret=plan.interpret,
    )
    (line,) = run(_padded(plan, x), _padded(plan, dy))
    before, after = _beside(plan)
    found = jax.lax.pad(line[:, 0], jnp.float32(0), ((0, 0, 0), (-before, -after, 0)))
    n = jnp.arange(1 - plan.length, plan.length)[None]
    return found if plan.reach == "all" else jnp.where((n >= 0) == (plan.reach == "past"), found, 0)


def _convolve(plan: Plan, line, x, y, skewed) -> None:
    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
        _fill(plan, line, skewed)

    chunk = pl.program_id(2)

    def add(j, total):
        tokens = x[0, :, _aligned(j, 1)]
        table = skewed[:, _aligned(chunk * plan.wide - j - plan.lags.start, plan.wide)]
        return total + jnp.dot(tokens, table, precision=plan.precision, preferred_element_type=jnp.float32)

    first = chunk * plan.wide if plan.reach == "future" else 0
    last = (chunk + 1) * plan.wide if plan.reach == "past" else plan.blocks
    total = jnp.zeros((plan.row_block, plan.wide * _BLOCK), jnp.float32)
    y[0] = jax.lax.fori_loop(first, last, add, total).astype(y.dtype)


def _correlate(plan: Plan, x, dy, line, skewed) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _():
        skewed[...] = jnp.zeros_like(skewed)

    def from_block(j, _):
        tokens = x[0, :, _aligned(j, 1)]

        def add(chunk, _):
            met = jax.lax.dot_general(
                tokens,
                dy[0, :, _aligned(chunk * plan.wide, plan.wide)],
                (((0,), (0,)), ((), ())),
                precision=plan.precision,
                preferred_element_type=jnp.float32,
            )
            skewed[:, _aligned(chunk * plan.wide - j - plan.lags.start, plan.wide)] += met

        own = jax.lax.div(j, plan.wide)  # `//` asks for the sign, and lowering that for the chip that is there
        first = own if plan.reach == "past" else 0
        last = own + 1 if plan.reach == "future" else plan.chunks
        jax.lax.fori_loop(first, last, add, None)

    jax.lax.fori_loop(0, plan.blocks, from_block, None)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        _sum_diagonals(plan, skewed, line)


def _fill(plan: Plan, line, skewed) -> None:
    """S[a, 128 d + b] = line[128 (d + 1) + b − a]: every row reads its block and the one before from its own offset."""
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (_BLOCK, _BLOCK), axis) for axis in (0, 1))

    def fill(d, _):
        before, own = (jnp.broadcast_to(line[0, :, _aligned(d + k, 1)], row.shape) for k in (0, 1))
        source = jnp.where(lane >= _BLOCK - row, before, own)
        block = jnp.take_along_axis(source, (lane - row) & (_BLOCK - 1), axis=1)
        skewed[:, _aligned(d, 1)] = block.astype(skewed.dtype)

    jax.lax.fori_loop(0, len(plan.lags), fill, None)


def _sum_diagonals(plan: Plan, skewed, line) -> None:
    """The transpose of `_fill`."""
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (_BLOCK, _BLOCK), axis) for axis in (0, 1))

    def gather(d, carried):
        source = jnp.take_along_axis(skewed[:, _aligned(d, 1)], (lane + row) & (_BLOCK - 1), axis=1)
        before, own = (
            jnp.sum(jnp.where(here, source, 0.0), axis=0, keepdims=True)
            for here in (lane >= _BLOCK - row, lane < _BLOCK - row)
        )
        line[0, :, _aligned(d, 1)] = carried + before
        return own

    last = jax.lax.fori_loop(0, len(plan.lags), gather, jnp.zeros((1, _BLOCK), jnp.float32))
    line[0, :, _aligned(len(plan.lags), 1)] = last


def _aligned(block, count: int) -> pl.Slice:
    """The lanes of `count` blocks of 128."""
    return pl.ds(pl.multiple_of(block * _BLOCK, _BLOCK), count * _BLOCK)


def _beside(plan: Plan) -> tuple[int, int]:
    """Zeros before and after h that make it the table's line; negative where the line is shorter."""
    before = -(plan.length - 1) - _BLOCK * (plan.lags.start - 1)
    return before, plan.line - before - (2 * plan.length - 1)


def _line(plan: Plan, h: Array) -> Array:
    before, after = _beside(plan)
    return jax.lax.pad(h.astype(jnp.float32), jnp.float32(0), ((0, 0, 0), (before, after, 0)))[:, None]


def _rows_shape(plan: Plan, heads: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((heads, plan.row_blocks * plan.row_block, plan.blocks * _BLOCK), plan.dtype)


def _padded(plan: Plan, x: Array) -> Array:
    shape = _rows_shape(plan, x.shape[0]).shape
    return jnp.pad(x, [(0, whole - size) for whole, size in zip(shape, x.shape, strict=True)])


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
