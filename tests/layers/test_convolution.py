"""The convolution beside a block, against a loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import AttentionMask, Positions
from zoo.encodings import Dims, Place
from zoo.layers.convolution import Convolution
from zoo.mixers import Style

DIMS = Dims(model_dim=6, num_heads=1, num_kv_heads=1, head_dim=6, num_layers=1, max_length=16)
X = np.random.default_rng(0).normal(size=(1, 10, 6)).astype(np.float32)
# Documents end in the row, at padding, and where a position is left out.
SEGMENTS, TOKEN = jnp.array([[1, 1, 1, 2, 2, 2, 2, 2, 0, 0]]), jnp.array([[0, 1, 2, 0, 1, 5, 6, 7, 0, 0]])
RUNS = ([0, 1, 2], [3, 4], [5, 6, 7])
PARAMS = {
    "kernel": jax.random.normal(jax.random.key(1), (5, 3, 6)),
    "bias": jnp.arange(6) / 4,
}


def apply(part, train=False, **style):
    mask = AttentionMask(query_segments=SEGMENTS, key_segments=SEGMENTS)
    module = part.module(DIMS, Style(**style))
    rngs = {"dropout": jax.random.key(0)}
    return np.asarray(module.apply({"params": PARAMS}, X, mask, Place(Positions(TOKEN), train=train), rngs=rngs))[0]


def by_loop():
    """Before dropout and activation, of the tokens that are real."""
    kernel, bias = (np.asarray(PARAMS[name], np.float64) for name in ("kernel", "bias"))
    out = np.zeros((8, 6))
    for run in RUNS:
        for at, i in enumerate(run):
            out[i] = bias
            for d in range(-2, 3):
                for group in (slice(0, 3), slice(3, 6)):
                    if 0 <= at + d < len(run):
                        out[i, group] += X[0, run[at + d], group] @ kernel[d + 2][:, group]
    return out


def test_windows_keep_to_documents_and_groups_and_dropout_comes_before_the_activation():
    part = Convolution(kernel=5, groups=2, activation="tanh")
    np.testing.assert_allclose(apply(part)[:8], np.tanh(by_loop()), atol=1e-5)
    dropped = apply(part, train=True, dropout=0.5)[:8]
    kept = dropped != 0
    assert 0.25 < kept.mean() < 0.75
    np.testing.assert_allclose(dropped[kept], np.tanh(2 * by_loop())[kept], atol=1e-5)
    narrow = apply(part, dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    # 8 bits of each factor, sums of 15 products of size one in float32.
    np.testing.assert_allclose(np.float32(narrow)[:8], np.tanh(by_loop()), atol=0.05)
