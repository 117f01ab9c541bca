"""Values printed in papers, code and hand calculations, to their digits."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo.encodings
from kernels.attention import AttentionMask, Positions, attention, logits
from zoo.encodings import Dims, Place, Project, Site, registry
from zoo.encodings.alibi import slopes
from zoo.encodings.sinusoidal import Sinusoidal, sinusoids
from zoo.encodings.t5 import T5, bucket

ROWS, C = np.meshgrid(np.arange(4), np.arange(4), indexing="ij")
Q = np.sin(0.3 * ROWS + 0.7 * C + 0.1)
K = np.cos(0.2 * ROWS - 0.5 * C + 0.4)
V = np.sin(0.11 * (ROWS + 1) * (C + 1))
DIMS = Dims(model_dim=4, num_heads=1, num_kv_heads=1, head_dim=4, num_layers=1, max_length=16)

PLACE = Place(Positions.arange(4), span=3)
SITE = Site(None, None, {}, Project(None, None, None), PLACE, AttentionMask())


def encode(config, params=None):
    """q, k, v, terms and scale of the golden input, one head, no projections."""
    part = registry.build(config)
    shared = part.shared(DIMS)
    made = None if shared is None else shared.apply({"params": params or {}}, PLACE)
    return part.layer(DIMS).apply({}, made, *(jnp.asarray(a, jnp.float32)[None, :, None, :] for a in (Q, K, V)), SITE)


def scores(config, params=None):
    q, k = (jnp.asarray(a, jnp.float32)[None, :, None, :] for a in (Q, K))
    return np.asarray(zoo.encodings.logits(config, q, k, params=params and {"shared": params}))[0, 0]


def outputs(config, causal=False, params=None):
    e = encode(config, params)
    mask = AttentionMask(causal=causal)
    return np.asarray(attention(e.q, e.k, e.v, terms=e.terms, scale=e.scale, mask=mask))[0, :, 0]


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_nezha():
    close(scores({"name": "nezha"})[1], [2.160889, 2.123128, 1.710699, 1.330103])
    close(outputs({"name": "nezha"})[1], [0.751251, 0.633755, 1.214248, 1.530133])
    close(scores({"name": "nezha", "phase": "paper"})[1], [1.531595, 1.983412, 1.976136, 1.546310])


def test_nezha_table_is_that_of_the_released_code():
    dims = Dims(64, 1, 1, 64, 1, 16)
    (term,) = registry.build("nezha").shared(dims).apply({}, PLACE)
    table = np.asarray(term.query.values)[:, 0]
    assert table.shape == (129, 64)
    close(table[0, :4], [0, 1, 0, 1])
    close(table[64, :4], [0.920026, 0.391857, -0.763903, -0.645331])
    close(table[65, :4], [0.826829, -0.562454, -0.998827, 0.048419])
    close(table[128, :4], [0.721038, -0.692896, 0.985941, -0.167095])
    close(table[64, 62:], [0.008534, 0.999964])
    assert term.value is term.query and term.key is None


@pytest.mark.parametrize(
    ("layout", "row"),
    [
        ("interleaved", [-0.585311, -0.013516, 0.811113, 1.018435]),
        ("half", [-0.145807, 0.336885, 0.979357, 1.018435]),
    ],
)
def test_rope(layout, row):
    close(scores({"name": "rope", "layout": layout})[3], row)


def test_rope_rotates_the_interleaved_golden_query_and_keeps_norms():
    e = encode({"name": "rope", "layout": "interleaved"})
    close(e.q[0, 3, 0], [-0.972994, -0.862992, 0.673912, 0.061823])
    close(np.linalg.norm(e.q[0, :, 0], axis=-1), np.linalg.norm(Q, axis=-1))
    close(e.q[0, 0, 0], Q[0])


def test_rope_layouts_are_one_encoding_up_to_a_permutation_of_channels():
    half = encode({"name": "rope", "layout": "half"})
    order = np.array([0, 2, 1, 3])  # channel m and m + 2 become neighbours
    part = registry.build({"name": "rope", "layout": "interleaved"})
    tables = part.shared(DIMS).apply({}, PLACE)
    q, k, v = (jnp.asarray(a[:, order], jnp.float32)[None, :, None] for a in (Q, K, V))
    other = part.layer(DIMS).apply({}, tables, q, k, v, SITE)
    close(logits((), half.q, half.k), logits((), other.q, other.k))


def test_rope_refuses_an_odd_rotary_width():
    with pytest.raises(ValueError, match="must be even"):
        registry.build({"name": "rope", "fraction": 0.75}).shared(DIMS)


def test_t5_biases_and_buckets():
    small = {"name": "t5", "num_buckets": 8, "max_distance": 16, "scale": None}
    table = (0.1 * np.cos(np.arange(8)))[:, None].astype(np.float32)
    close(scores(small, {"table": table})[1], [1.214355, 1.338573, 1.295809, 1.341801])
    one_way = {**small, "bidirectional": False}
    close(scores(one_way, {"table": table})[3], [1.070051, 1.122983, 1.167747, 1.118435])
    assert encode({"name": "t5"}, {"table": np.zeros((32, 1), np.float32)}).scale == 1.0


def test_t5_bucket_starts():
    r = np.array([0, 1, 7, 8, 9, 10, 12, 16, 20, 32, 64, 127, 128, 1000, -1, -7, -8, -16, -64, -128, -1000])
    expected = [0, 17, 23, 24, 24, 24, 25, 26, 26, 28, 30, 31, 31, 31, 1, 7, 8, 10, 14, 15, 15]
    np.testing.assert_array_equal(bucket(r, T5()), expected)
    one_way = bucket(np.array([-1, -15, -16, -20, -32, -64, -127, 5]), T5(bidirectional=False))
    np.testing.assert_array_equal(one_way, [1, 15, 16, 17, 21, 26, 31, 0])
    causal = bucket(-np.arange(200), T5(bidirectional=False))
    starts = np.flatnonzero(np.diff(causal)) + 1
    np.testing.assert_array_equal(starts[-15:], [19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113])


def test_t5_saturates_at_max_distance():
    assert len(set(bucket(np.arange(128, 5000), T5()))) == 1
    assert len(set(bucket(-np.arange(128, 5000), T5()))) == 1


def test_alibi():
    eight = 2.0 ** -np.arange(1, 9)
    np.testing.assert_allclose(slopes(8), eight)
    close(slopes(6), [0.25, 0.0625, 0.015625, 0.003906, 0.5, 0.125])
    close(slopes(12), [*eight, 0.707107, 0.353553, 0.176777, 0.088388])
    close(slopes(1), [0.003906])


def test_alibi_forms():
    causal = scores({"name": "alibi", "form": "causal"})
    symmetric = scores({"name": "alibi"})
    base = scores({"name": "rope", "theta": 1e30, "fraction": 0.5}) * 0 + 0.5 * Q @ K.T
    slope, distance = slopes(1)[0], np.abs(ROWS - C)
    close(symmetric, base - slope * distance)
    lower = np.tril_indices(4)
    close(causal[lower], symmetric[lower])


def test_sinusoids():
    three = jnp.array([3])
    close(sinusoids(Sinusoidal(), three, 4)[0], [0.141120, -0.989992, 0.029996, 0.999550])
    close(
        sinusoids(Sinusoidal(), three, 8)[0],
        [0.141120, -0.989992, 0.295520, 0.955336, 0.029996, 0.999550, 0.003000, 0.999996],
    )
    t2t = Sinusoidal(layout="halves", frequencies="tensor2tensor")
    close(sinusoids(t2t, three, 4)[0], [0.141120, 0.000300, -0.989992, 1.000000])
    waves = sinusoids(Sinusoidal(), jnp.arange(7), 4)
    close(waves[5] @ waves[2], 0.009558)
    close(waves[6] @ waves[3], 0.009558)
    assert sinusoids(Sinusoidal(), three, 5).shape == (1, 5)
    assert float(sinusoids(Sinusoidal(), three, 5)[0, 4]) == 0


def test_learned_positions_refuse_a_longer_sequence():
    part = registry.build("learned")
    module = part.embedding(DIMS)
    x = jnp.zeros((1, 17, 4))
    with pytest.raises(ValueError, match="max_length=16 positions, the sequence has 17"):
        jax.eval_shape(lambda: module.init(jax.random.key(0), x, Place(Positions.arange(17)), AttentionMask(), None))
    table = {"params": {"table": jnp.zeros((16, 4))}}
    for position in (16, -1):
        outside, _ = module.apply(table, x[:, :1], Place(Positions(jnp.array([[position]]))), AttentionMask(), None)
        assert jnp.all(jnp.isnan(outside)), "a position outside the table is neither clamped nor counted from its end"
    chex.assert_shape(outside, (1, 1, 4))
