"""Which lane gives what to which, run on arrays of 32 lanes: interpretation does not come to it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from kernels.attention.mosaic_diagonals import FIRST, of_a_warp

LANES = SimpleNamespace(
    zero=np.zeros(32), add=np.add, where=np.where, take=lambda x, sources: x[sources]
)  # x[lane] is what the lane has


@pytest.mark.parametrize("columns", [64, 128])
def test_every_diagonal_of_a_warp_is_in_one_lane(columns):
    tile = np.random.default_rng(0).standard_normal((16, columns))
    row, pair = np.arange(32) // 4, np.arange(32) % 4
    pairs = [
        [tuple(tile[row + 8 * s, 8 * g + 2 * pair + e] for e in range(2)) for g in range(columns // 8)]
        for s in range(2)
    ]
    found = np.stack(of_a_warp(LANES, pairs))
    assert sorted(FIRST) == list(range(32))
    for place in np.ndindex(found.shape):
        i, lane = place
        expected = np.trace(tile, offset=FIRST[lane] + 32 * i - 16) if FIRST[lane] + 32 * i < columns + 16 else 0
        np.testing.assert_allclose(found[place], expected, atol=1e-12)
