"""Dropout of hidden states: its share, its key, its gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.layers.dropout import Dropout


def drop(x, seed=0, rate=0.25):
    return Dropout(rate).apply({}, x, deterministic=False, rngs={"dropout": jax.random.key(seed)})


@pytest.mark.parametrize("shape", [(64, 48), (16, 12, 24), (2, 8, 12, 24)], ids=str)
def test_dropout_keeps_its_share_and_the_mean(shape):
    out = np.asarray(drop(jnp.ones(shape)))
    assert set(np.unique(out)) == {np.float32(0), np.float32(1 / 0.75)}
    # 3,072 entries or more: a standard deviation of the share of at most 0.008.
    np.testing.assert_allclose((out > 0).mean(), 0.75, atol=0.04)
    kept = (out > 0).reshape(-1, shape[-1])
    assert kept.mean(0).min() > 0 and kept.mean(0).max() < 1
    assert len({row.tobytes() for row in kept}) > 0.95 * len(kept)


def test_dropout_is_a_function_of_key_and_place():
    x = jnp.ones((6, 5, 16))
    assert np.array_equal(drop(x), drop(x))
    assert not np.array_equal(drop(x), drop(x, seed=1))
    assert np.array_equal(drop(x)[:3], drop(x[:3]))


def test_dropout_sends_the_gradient_where_it_kept():
    x = jnp.ones((6, 16))
    np.testing.assert_array_equal(jax.grad(lambda x: drop(x).sum())(x), drop(x))


def test_no_dropout_needs_no_key():
    x = jnp.ones((3, 4))
    assert np.array_equal(Dropout(0.5).apply({}, x, deterministic=True), x)
    assert np.array_equal(Dropout(0.0).apply({}, x, deterministic=False), x)
