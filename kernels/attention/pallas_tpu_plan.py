"""How a call is laid out for the TPU kernels: heads in blocks of lanes, tables by blocks of heads.

Operands stay `[B, T, heads · width]`: a program has one block of at least 128 lanes, with one head of it or several side by side, and no
array is transposed or padded to 128 lanes a head in the device's memory. A head's product contracts all lanes of the block with those of
other heads set to zero, which costs the matrix unit the same as the padding would.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from kernels.attention.fused import Call, Given
from kernels.attention.pallas_tpu_bands import Band, Gradient

LANES = 128


@dataclass(frozen=True)
class Clipped:
    """Tables that are constant from |r| = limit on, as products of `parts` times a head's width; whether one meets queries, and values."""

    limit: int
    parts: int
    scores: bool
    values: bool

    def beyond(self, r: int, side: int) -> bool:
        """Whether a square whose corner is at r has no |r| < limit."""
        inside = side - 1
        return r - inside >= self.limit or r + inside <= -self.limit


@dataclass(frozen=True)
class Plan(Call):
    """A call, the side of its square tiles, and where its tables of relative positions are not constant, as bands or as products.

    q, k and v have heads of one width, which divides 128 or is a multiple of it.
    """

    block: int
    band: Band | None
    clipped: Clipped | None

    @property
    def shifts(self) -> list[int]:
        """How many tiles its keys are ahead of its queries, of every tile in which clipped tables are not constant."""
        every = range(1 - self.queries // self.block, self.keys // self.block)
        return [s for s in every if self.clipped and not self.clipped.beyond(s * self.block - self.offset, self.block)]

    @property
    def lanes(self) -> int:
        """Lanes of one block of heads."""
        return max(self.width, LANES)

    @property
    def per(self) -> int:
        """Heads in one block of lanes."""
        return self.lanes // self.width

    @property
    def kv_blocks(self) -> int:
        return -(-self.kv_heads // self.per)

    @property
    def blocks(self) -> int:
        """Blocks of query heads: those that read the first block of key heads with their first query head, and so on."""
        return self.group * self.kv_blocks

    def by_group(self, x: jax.Array, axis: int) -> jax.Array:
        """Query (or key) heads along `axis` as blocks of heads: axes [blocks, heads of a block], missing heads zero.

        Head n of a block meets head n of the block of keys, so query heads are ordered by their place in their group first.
        """
        group = x.shape[axis] // self.kv_heads
        x = x.reshape(*x.shape[:axis], self.kv_heads, group, *x.shape[axis + 1 :])
        x = jnp.moveaxis(x, axis + 1, axis)
        missing = [(0, 0)] * x.ndim
        missing[axis + 1] = (0, self.kv_blocks * self.per - self.kv_heads)
        x = jnp.pad(x, missing)
        return x.reshape(*x.shape[:axis], group * self.kv_blocks, self.per, *x.shape[axis + 2 :])

    def by_head(self, x: jax.Array, axis: int) -> jax.Array:
        """The inverse of `by_group`."""
        group = x.shape[axis] // self.kv_blocks
        x = x.reshape(*x.shape[:axis], group, self.kv_blocks * self.per, *x.shape[axis + 2 :])
        x = jnp.moveaxis(lax.slice_in_dim(x, 0, self.kv_heads, axis=axis + 1), axis, axis + 1)
        return x.reshape(*x.shape[:axis], group * self.kv_heads, *x.shape[axis + 2 :])

    def packed(self, x: jax.Array) -> jax.Array:
        """`[B, T, heads, width]` → `[B, T, blocks · lanes]`."""
        return self.by_group(x, 2).reshape(*x.shape[:2], -1)

    def parts(self, x: jax.Array) -> list[jax.Array]:
        """x `[…, parts · width]`, a part after the other."""
        return jnp.split(x, x.shape[-1] // self.width, axis=-1)

    def unpacked(self, x: jax.Array) -> jax.Array:
        return self.by_head(x.reshape(*x.shape[:2], -1, self.per, self.width), 2)

    def only(self, head: int, x: jax.Array, axis: int = 1) -> jax.Array:
        """x `[length, lanes]` with the lanes of all other heads zero; `axis` says where the lanes are."""
        if self.per == 1:
            return x
        lane = lax.broadcasted_iota(jnp.int32, x.shape, axis)
        return jnp.where((lane >= head * self.width) & (lane < (head + 1) * self.width), x, jnp.zeros_like(x))

    def side_by_side(self, numbers: list[jax.Array]) -> jax.Array:
        """Of each head `[block, 128]` with a value in all of a row → `[block, lanes]`, each in the lanes of its head."""
        shape = self.block, self.lanes
        out, *others = (jnp.tile(x, (1, self.lanes // LANES)) for x in numbers)
        for head, own in enumerate(others, start=1):
            out = jnp.where(lax.broadcasted_iota(jnp.int32, shape, 1) >= head * self.width, own, out)
        return out

    def across(self, column: jax.Array) -> jax.Array:
        """`[block, 128]` with a value in all of a row → `[block, block]`."""
        return jnp.concatenate([column] * (self.block // LANES), axis=1)

    def lines(self, given: Given) -> dict[str, jax.Array]:
        """`[blocks, per, T + S]` each: column T is that of r = −offset, where a query and the key of its index meet."""
        padding = ((0, 0), (1, 0))  # the first column is of no pair
        return {name: self.by_group(jnp.pad(x, padding), 0) for name, x in given.lines.items()}

    def bands(self, given: Given) -> dict[str, jax.Array]:
        """`[blocks or 1, R, lanes]` each, of tables `[R, heads, width]`."""
        return {
            name: jnp.tile(x[:, 0], (1, self.per))[None]
            if x.shape[1] == 1
            else jnp.moveaxis(self.packed(x[None])[0].reshape(x.shape[0], -1, self.lanes), 1, 0)
            for name, x in given.bands.items()
        }

    def of_bands(self, gradients: dict[str, Gradient]) -> dict[str, jax.Array]:
        """`[R, heads, width]` each, of gradients `[blocks, lanes, R]`, `[blocks, 8, lanes]`."""

        def one(gradient: Gradient) -> jax.Array:
            x = jnp.transpose(gradient.table, (2, 0, 1))
            x = x.at[jnp.array([0, -1])].add(jnp.moveaxis(gradient.ends[:, :2], 0, 1))
            return self.unpacked(x.reshape(1, x.shape[0], -1))[0]

        return {name: one(gradient) for name, gradient in gradients.items()}
