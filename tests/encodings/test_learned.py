"""Learned positions beyond the length of their table, by interpolation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import AttentionMask, Positions
from tests.encodings.table import tiny_model, tokens
from tests.encodings.test_golden import close
from zoo.encodings import Dims, Place, registry
from zoo.encodings.learned import stretched
from zoo.errors import UserError


def test_golden_values():
    table = jnp.array([[0.0, 10.0], [1.0, 20.0], [4.0, 0.0]])
    close(stretched(table, 6), [[0, 10], [0.5, 15], [1, 20], [2.5, 10], [4, 0], [4, 0]])
    chex.assert_trees_all_equal(stretched(table, 3), table)


def test_old_positions_are_kept_at_any_length():
    """Exactly: A'[s·m] = A[m], also where p / s in floating point would fall below the row."""
    table = jax.random.normal(jax.random.key(0), (49, 2))
    for times in (3, 7, 10):
        chex.assert_trees_all_equal(stretched(table, 49 * times)[::times], table)


def test_a_trained_table_serves_a_longer_model():
    """The parameters of a model of 16 positions, in one of 32, at every other position; the offset's rows stay."""
    short = registry.build({"name": "learned", "offset": 2}).embedding(Dims(4, 1, 1, 4, 1, 16))
    long = registry.build({"name": "learned", "offset": 2, "interpolate": 16}).embedding(Dims(4, 1, 1, 4, 1, 32))

    def run(module, length):
        x = jnp.zeros((1, length, 4))
        return module.init_with_output(jax.random.key(1), x, Place(Positions.arange(length)), AttentionMask(), None)

    (one, _), params = run(short, 16)
    (two, _), same = run(long, 32)
    chex.assert_trees_all_equal(params, same)
    np.testing.assert_array_equal(one[0], two[0, ::2])


def test_a_table_longer_than_the_model_is_refused():
    model = tiny_model({"name": "learned", "interpolate": 33})
    with pytest.raises(UserError, match="interpolate=33, the rows to stretch to max_length=32"):
        model.init(jax.random.key(0), tokens(1, 4))
