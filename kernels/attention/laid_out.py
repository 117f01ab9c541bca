"""Tables of `Relative` terms with one row for each distance, as fused kernels that look into them take them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention.fused import BAND, Call
from kernels.attention.skew import expand
from kernels.attention.terms import Relative, Table, Term


def tables_of(terms: tuple[Term, ...]) -> dict[str, list[Table]]:
    """The tables of all `Relative` terms by what they meet, "query", "key" and "value"."""
    relative = [term for term in terms if isinstance(term, Relative)]
    found = {side: [getattr(term, side) for term in relative] for side in BAND}
    return {side: [table for table in tables if table is not None] for side, tables in found.items()}


def bands_of(
    call: Call, tables: dict[str, list[Table]], dtype: jnp.dtype, *, start: int, rows: int
) -> dict[str, jax.Array]:
    """By side the sum of its tables, `[R, N or K or 1, H]`, as wide as the call's q; row x is of the distance start + x of array indices."""
    r = np.arange(rows) + start - call.offset
    heads = {side: call.kv_heads if side == "key" else call.heads for side in tables}
    return {
        side: _laid_out(several, r, heads[side], call.width).astype(dtype)
        for side, several in tables.items()
        if several
    }


def of_band(found: jax.Array, band: jax.Array) -> jax.Array:
    """The gradient of a band from that of each head, `[R, N or K, H]`, which a band of one head is read by all of."""
    return (jnp.sum(found, axis=1, keepdims=True) if band.shape[1] == 1 else found).astype(band.dtype)


def _laid_out(tables: list[Table], r: np.ndarray, heads: int, width: int) -> jax.Array:
    def one(table: Table) -> jax.Array:
        span = table.rows.span
        rows = expand(table.values.astype(jnp.float32), table.rows.lookup()[np.clip(r, -span, span) + span], axis=0)
        own = rows.shape[1]
        return rows if own in (1, heads) else jnp.repeat(rows, heads // own, axis=1)

    several = [one(table) for table in tables]
    most = max(x.shape[1] for x in several)
    total = functools.reduce(
        jnp.add, (jnp.broadcast_to(x, (x.shape[0], most, x.shape[2])) if len(several) > 1 else x for x in several)
    )
    return jnp.pad(total, ((0, 0), (0, 0), (0, width - total.shape[2])))
