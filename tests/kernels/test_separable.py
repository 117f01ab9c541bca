"""A clipped table is the product of its two sides, and the rows at its ends are those beyond."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import Clip, LogBuckets, Relative, Reverse, Table, Wave
from kernels.attention.separable import Basis

T, S, FIRST = 40, 70, 30  # query i stands at key i + FIRST


def tables(kind):
    rng = np.random.default_rng(0)
    learned = rng.standard_normal((17, 2, 12)).astype(np.float32)
    wave = Wave(100.0, 3.0, "halves" if kind == "halves" else "interleaved")
    return {
        "learned": Table(learned, Clip(8)),
        "reversed": Table(learned, Reverse(Clip(8))),
        "shared": Table(learned[:, :1], Clip(8)),
        "interleaved": Table(wave.table(17, 12)[:, None], Clip(8), wave),
        "halves": Table(wave.table(17, 12)[:, None], Clip(8), wave),
    }[kind]


@pytest.mark.parametrize("kind", ["learned", "reversed", "shared", "interleaved", "halves"])
def test_products_of_both_sides_are_the_table(kind):
    table = tables(kind)
    basis = Basis.of(Relative(query=table))
    assert basis.width == (12 if kind in ("interleaved", "halves") else 16)
    rng = np.random.default_rng(1)
    q = rng.standard_normal((1, T, 2, 12)).astype(np.float32)
    p = rng.random((1, 2, T, S)).astype(np.float32)
    r = np.arange(S)[None, :] - np.arange(T)[:, None] - FIRST
    rows = table.rows.lookup()[np.clip(r, -8, 8) + 8]
    entries = np.broadcast_to(table.values[rows], (T, S, 2, 12))
    inside = np.abs(r) < 8
    table, g = jax.tree.map(jnp.asarray, table), basis.of_keys(S)
    f = basis.to_queries(table, jnp.asarray(q), FIRST)
    scores = np.einsum("btng,sg->bnts", f, g)
    wanted = np.einsum("btnh,tsnh->bnts", q, entries)
    chex.assert_trees_all_close(scores * inside, wanted * inside, rtol=1e-4, atol=1e-4)
    w = np.einsum("bnts,sg->btng", p * inside, g)
    values = basis.from_keys(table, jnp.asarray(w), FIRST)
    chex.assert_trees_all_close(values, np.einsum("bnts,tsnh->btnh", p * inside, entries), rtol=1e-4, atol=2e-4)
    chex.assert_trees_all_close(basis.beyond(table, 2), (entries[0, -1], entries[-1, 0]))


def test_two_tables_share_a_basis_or_have_none():
    learned, wave = tables("learned"), tables("interleaved")
    assert Basis.of(Relative(query=wave, value=wave)).wave is not None
    assert Basis.of(Relative(query=learned, value=wave)) == Basis(8, 16)
    assert Basis.of(Relative(query=learned, value=Table(np.zeros((9, 1, 12)), Clip(4)))) is None
    assert Basis.of(Relative(query=Table(np.zeros((16, 1, 12)), LogBuckets(8, 16)))) is None
    assert Basis.of(Relative(key=learned)) is None
