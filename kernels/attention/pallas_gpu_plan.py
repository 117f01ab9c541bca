"""How the passes of `pallas_gpu` are divided into tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.attention.fused import Call

WARPGROUP_ROWS = 64  # of a tile, what WGMMA multiplies at a time
MULTIPROCESSORS = 132  # of an H100; of these programs each runs one at a time


@dataclass(frozen=True)
class Blocks:
    """Columns of one warpgroup's tile, and how many warpgroups compute."""

    columns: int
    warpgroups: int = 2

    @property
    def rows(self) -> int:
        """Rows of one warpgroup's tile."""
        return WARPGROUP_ROWS

    @property
    def program(self) -> int:
        """Rows of one program."""
        return self.rows * self.warpgroups


@dataclass(frozen=True)
class Plan(Call):
    """A call, and how its passes are divided into tiles."""

    column_bias: bool
    dense_bytes: int  # of an entry of a `Dense` term, 0 without
    curved: bool  # by a `PiecewiseLinear` term
    met: bool  # tables by queries or keys, in products of 64 columns

    @property
    def growth(self) -> float:
        """By how much dropout multiplies what it keeps."""
        return 1 / (1 - self.rate)

    @property
    def wide(self) -> bool:
        return max(self.width, self.value_width) > 64

    # As many columns as fit the registers without a spill (tests/aot); wider tiles are faster (docs/kernels.md).

    @property
    def forward(self) -> Blocks:
        return self._blocks(self.dense_bytes == 4)

    @property
    def dq(self) -> Blocks:
        return self._blocks(self.dense_bytes == 4)

    @property
    def dkv(self) -> Blocks:
        masked = self.left is not None or self.right is not None or self.past_or_prefix
        biased = self.column_bias or self.dense_bytes > 0
        return self._blocks(masked or biased or self.rate > 0)

    def _blocks(self, narrow: bool) -> Blocks:
        return Blocks(64 if narrow or self.wide or self.curved or self.met else 128)

    def parts(self, blocks: int) -> int:
        """Among how many programs dq divides the blocks of queries of a head where a table's gradient is summed.

        The fewest that take the least time; at most two for each multiprocessor, so that memory is linear in length.
        """

        def rounds(parts: int) -> int:
            return -(-self.heads * parts // MULTIPROCESSORS) * -(-blocks // parts)

        return min(range(1, max(min(2 * MULTIPROCESSORS // self.heads, blocks), 1) + 1), key=rounds)


@dataclass(frozen=True)
class Diagonals:
    """The windows of a table of relative positions that tiles look into: one for all tiles on a diagonal.

    Programs own `rows` queries (or keys: `transposed`) and meet tiles of `columns` of the other side; `rows` is a multiple of
    `columns`. Window c holds `rows + columns` values in turn, from relative position c · columns + `plan.least` on.
    """

    plan: Plan
    rows: int
    columns: int
    transposed: bool = False

    @property
    def step(self) -> int:
        """Diagonals between a program and the next."""
        return self.rows // self.columns

    @property
    def before(self) -> int:
        """Diagonals left of the one through the first program and its first tile."""
        if self.transposed:
            return self.plan.queries // self.columns - 1
        return (self.plan.queries // self.rows - 1) * self.step

    @property
    def count(self) -> int:
        if self.transposed:
            return self.before + (self.plan.keys // self.rows - 1) * self.step + 1
        return self.before + self.plan.keys // self.columns

    def of(self, program: Any, tile: Any) -> Any:
        """The diagonal on which a program meets a tile."""
        return self.before + (program * self.step - tile if self.transposed else tile - program * self.step)

    def parts(self, windows: dict[str, Any], warpgroup: Any) -> dict[str, Any]:
        """What of a program's windows the tile of one warpgroup looks into."""
        before = warpgroup * WARPGROUP_ROWS
        start = before if self.transposed else self.rows - WARPGROUP_ROWS - before
        here = pl.ds(start, WARPGROUP_ROWS + self.columns)
        return {name: window.at[here] for name, window in windows.items()}

    def windows(self, table: jax.Array) -> jax.Array:
        """`[N, count, rows + columns]` of a table `[N, T + S − 1]` whose first column is the smallest relative position."""
        length = (self.count + self.step) * self.columns
        blocks = jnp.pad(table, ((0, 0), (0, length - table.shape[1]))).reshape(table.shape[0], -1, self.columns)
        return jnp.concatenate([blocks[:, s : s + self.count] for s in range(self.step + 1)], axis=-1)
