"""Values printed in papers, code and hand calculations, to their digits."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo.encodings
from kernels.attention import AttentionMask, Positions, attention, logits
from zoo.encodings import Dims, Place, Project, Site, registry, rope_scaling
from zoo.encodings.alibi import slopes
from zoo.encodings.irpe import piecewise
from zoo.encodings.sinusoidal import Sinusoidal, sinusoids
from zoo.encodings.t5 import T5, bucket

ROWS, C = np.meshgrid(np.arange(4), np.arange(4), indexing="ij")
Q = np.sin(0.3 * ROWS + 0.7 * C + 0.1)
K = np.cos(0.2 * ROWS - 0.5 * C + 0.4)
V = np.sin(0.11 * (ROWS + 1) * (C + 1))
DIMS = Dims(model_dim=4, num_heads=1, num_kv_heads=1, head_dim=4, num_layers=1, max_length=16)

PLACE = Place(Positions.arange(4), span=3)
X = jnp.zeros((1, 4, 4))
IDENTITY = Project(*(lambda h: h[..., None, :] for _ in range(3)))
SITE = Site(X, X, {}, IDENTITY, PLACE, AttentionMask())


def encode(config, params=None, layer=None):
    """q, k, v, terms and scale of the golden input, one head, no projections; parameters of the shared module and the layer's."""
    part = registry.build(config)
    shared = part.shared(DIMS)
    made = None if shared is None else shared.apply({"params": params or {}}, PLACE)
    variables = {"params": layer or {}}
    return part.layer(DIMS).apply(
        variables, made, *(jnp.asarray(a, jnp.float32)[None, :, None, :] for a in (Q, K, V)), SITE
    )


def scores(config, params=None, layer=None):
    q, k = (jnp.asarray(a, jnp.float32)[None, :, None, :] for a in (Q, K))
    given = {name: tree for name, tree in (("shared", params), ("layer", layer)) if tree is not None}
    return np.asarray(zoo.encodings.logits(config, q, k, params=given or None))[0, 0]


def outputs(config, causal=False, params=None, layer=None):
    e = encode(config, params, layer)
    mask = AttentionMask(causal=causal)
    out = attention(e.q, e.k, e.v, terms=e.terms, scale=e.scale, mask=mask)
    part = registry.build(config)
    module = part.shared(DIMS)
    shared = None if module is None else module.apply({"params": params or {}}, PLACE)
    return np.asarray(part.layer(DIMS).apply({}, out, shared, {}, SITE, method="back")[0])[0, :, 0]


def tab(rows, a=0.1):
    """The reference's table, one head: a cos(r + 2c)."""
    r, c = np.meshgrid(np.arange(rows), np.arange(4), indexing="ij")
    return jnp.asarray(a * np.cos(r + 2 * c), jnp.float32)[:, None]


def eight_heads(config, params=None):
    """The scores of the first of eight equal heads."""
    q, k = (jnp.tile(jnp.asarray(a, jnp.float32)[None, :, None, :], (1, 1, 8, 1)) for a in (Q, K))
    return np.asarray(zoo.encodings.logits(config, q, k, params=params and {"shared": params}))[0, 0]


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


def test_alibi_with_a_slope_of_a_half():
    causal = eight_heads({"name": "alibi", "form": "causal"})
    close(causal[3], [-0.330949, 0.164598, 0.613717, 1.018435])
    close(softmax_of(causal)[3], [0.324580, 0.602698, 0.795628, 0.878741])
    close(eight_heads({"name": "alibi"})[1], [0.660324, 1.238573, 0.767443, 0.245784])


def softmax_of(logits):
    """The output of a causal softmax over V."""
    weights = np.exp(np.where(ROWS >= C, logits, -np.inf))
    return (weights / weights.sum(-1, keepdims=True)) @ V


def bias_of(config, distances, params=None):
    """What a Toeplitz encoding with one head adds at given look-backs."""
    shared = registry.build(config).shared(DIMS)
    (term,) = shared.apply({"params": params or {}}, Place(Positions.arange(4), span=1000))
    return np.asarray(term.values)[0, 1000 - np.array(distances)]


def test_kerple():
    log = {"r1": jnp.array([1.0]), "r2": jnp.array([0.5])}
    power = {"r1": jnp.array([0.5]), "r2": jnp.array([1.5])}
    distances = [0, 1, 2, 5, 100]
    close(bias_of("kerple_log", distances, log), [0, -0.405465, -0.693147, -1.252763, -3.931826])
    close(scores("kerple_log", log)[3], [0.252760, 0.471451, 0.708252, 1.018435])
    np.testing.assert_allclose(
        bias_of("kerple_power", distances, power), [0, -0.5, -1.414214, -5.590170, -500], atol=2e-6, rtol=1e-5
    )


def test_sandwich():
    def sums(first):
        dims = Dims(4, 8, 8, 4, 1, 16)  # c_1 = 1 for eight heads
        part = registry.build({"name": "sandwich", "first_index": first})
        (term,) = part.shared(dims).apply({}, Place(Positions.arange(4), span=1000))
        return np.asarray(term.values)[0, 1000 + np.array([0, 1, 2, 10, 100, 1000])]

    close(sums(0), [64, 62.093684, 57.381861, 42.820023, 30.543455, 10.177728])
    close(sums(1), [64, 62.553381, 58.798007, 44.659094, 30.681086, 10.610353])
    close(eight_heads({"name": "sandwich", "width": 4})[3], [1.178608, 1.748251, 2.653969, 3.018435])


FIRE = {
    "hidden_kernel": [[1, -1, 0.5, 2]],
    "hidden_bias": [0, 0.5, 0.1, -1],
    "output_kernel": [[-1], [0.3], [-2], [0.7]],
    "output_bias": [0.1],
    "c": 0.1,
    "threshold": 1.0,
}


def fire_bias(threshold, positions=None):
    """What FIRE adds with the reference's network, for one head."""
    network = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), FIRE, is_leaf=lambda v: isinstance(v, list))
    config = {"name": "fire", "width": 4, "threshold": threshold}
    nothing = jnp.zeros((1, 4 if positions is None else len(positions), 1, 4))
    found = zoo.encodings.logits(config, nothing, nothing, positions, {"layer": {"network": network}})
    return np.asarray(found)[0, 0]


def test_fire():
    close(fire_bias(512.0)[3], [-0.102573, -0.056025, -0.005426, 0.050000])
    near = fire_bias(2.0)
    close(near[1, :2], [-1.113653, 0.05])
    close(near[2, :3], [-1.399997, -1.113653, 0.05])
    close(near[3], [-1.399998, -1.216949, -0.785528, 0.05])
    close(np.diag(near), [0.05] * 4)
    far = fire_bias(512.0, jnp.array([0, 500, 999, 1000]))
    close(far[3, :3], [-1.400000, -1.311166, 0.002501])


def test_rope_scalings():
    linear = {"name": "rope", "layout": "interleaved", "scaling": {"name": "linear", "factor": 2.0}}
    close(scores(linear)[3], [0.314528, 0.787981, 1.048115, 1.018435])
    np.testing.assert_allclose(rope_scaling.raised(1e4, 4, 128), 40889.942432)
    np.testing.assert_allclose(rope_scaling.raised(1e4, 8, 128), 82684.622641)
    dynamic = rope_scaling.DynamicNtk(2.0, 4096)
    longer = rope_scaling.plain_frequencies(30527.736749, 128)
    np.testing.assert_allclose(dynamic.frequencies(1e4, 128, 8192), longer, rtol=1e-9)
    np.testing.assert_array_equal(dynamic.frequencies(1e4, 128, 4096), rope_scaling.plain_frequencies(1e4, 128))


def test_yarn():
    code = rope_scaling.Yarn(16.0, 4096)
    paper = rope_scaling.Yarn(16.0, 4096, ramp="rotations")
    assert code.ends(1e4, 128) == (20, 46)
    np.testing.assert_allclose(code.temperature, 1.277259, rtol=1e-6)
    at = [21, 30, 40, 45, 63]
    np.testing.assert_allclose(
        code.frequencies(1e4, 128, 1)[at],
        [0.0469408600, 0.00852684377, 0.000881788963, 0.000151771605, 7.2173874e-06],
        rtol=1e-7,
    )
    np.testing.assert_allclose(
        paper.frequencies(1e4, 128, 1)[at],
        [0.0483217292, 0.00393598859, 0.000299155725, 0.0000964259155, 7.2173874e-06],
        rtol=1e-7,
    )


def test_llama3_frequencies():
    found = rope_scaling.Llama3().frequencies(5e5, 128, 1)
    expected = [0.00321144599, 0.00216657076, 0.000524846161, 9.55621235e-05, 3.06892599e-07]
    np.testing.assert_allclose(found[[28, 29, 32, 35, 63]], expected, rtol=1e-7)


def test_xpos():
    lower = np.tril_indices(4)
    published = scores({"name": "xpos"})
    close(published[3], [-0.579649, -0.012416, 0.809683, 1.018435])
    close(scores({"name": "xpos", "scale_base": 4.0})[3], [-0.133171, 0.080369, 0.650402, 1.018435])
    # With a huge gamma every power is one.
    plain = scores({"name": "rope", "layout": "interleaved"})
    close(scores({"name": "xpos", "gamma": 1e9})[lower], plain[lower])


def test_pia():
    paper = {"name": "pia", "layout": "interleaved", "frequencies": "paper"}
    close(scores(paper)[3], [1.501993, 1.992719, 2.060837, 1.675166])
    close(outputs(paper, causal=True)[3], [0.276307, 0.520997, 0.707090, 0.816111])


def test_gta():
    found = outputs("gta", causal=True)
    close(found[1], [0.227289, 0.279180, 0.508718, 0.643164])
    close(found[3], [0.454615, 0.269144, 0.821728, 0.892972])
    close(found[0], V[0])
    close(scores({"name": "gta"}), scores({"name": "rope", "layout": "interleaved"}))
    rope = {"name": "rope", "layout": "interleaved"}
    close(outputs({"name": "gta", "transform_values": False}), outputs(rope))


def test_fox():
    x = jnp.zeros((1, 4, 4)).at[0, :, 0].set(jnp.array([2.0, 1.0, 0.0, -1.0]))
    gate = {"kernel": jnp.eye(4)[:, :1], "bias": jnp.zeros(1)}
    q, k = (jnp.asarray(a, jnp.float32)[None, :, None, :] for a in (Q, K))
    found = np.asarray(zoo.encodings.logits("fox", q, k, params={"layer": {"gate": gate}}, x=x))[0, 0]
    close(found[3], [-1.150620, -0.841811, -0.199545, 1.018435])
    close(softmax_of(found)[3], [0.362964, 0.666357, 0.861244, 0.918002])
    close((found - 0.5 * Q @ K.T)[3], [-2.319671, -2.006409, -1.313262, 0])


def test_bipe():
    positions = Positions(jnp.arange(4)[None], sentence=jnp.array([[0, 0, 1, 1]]), within=jnp.array([[0, 1, 0, 1]]))
    q, k = (jnp.asarray(a, jnp.float32)[None, :, None, :] for a in (Q, K))
    rotary = zoo.encodings.logits({"name": "bipe_rope", "layout": "interleaved"}, q, k, positions)
    close(rotary[0, 0, 3], [0.733434, 0.787981, 1.113717, 1.018435])
    linear = zoo.encodings.logits({"name": "bipe_alibi", "slope_factor": 128.0}, q, k, positions)
    close(linear[0, 0, 3], [0.669051, 0.664598, 1.113717, 1.018435])


def test_tupe():
    table = jnp.asarray(np.cos(ROWS + 2 * C), jnp.float32)
    identity = {"kernel": jnp.eye(4)}
    plain = {"table": table, "query": identity, "key": identity}
    tied = {"name": "tupe", "form": "paper", "untie_cls": False}
    close(scores(tied, plain)[1], [1.347531, 1.554924, 1.103021, 0.425254])
    untied = scores({"name": "tupe", "form": "paper"}, {**plain, "cls": jnp.array([[0.3], [-0.2]])})
    content = Q @ K.T / 8**0.5
    close((untied - content)[0], [0.3] * 4)
    close((untied - content)[1:, 0], [-0.2] * 3)
    close((untied - content)[1:, 1:], (scores(tied, plain) - content)[1:, 1:])


def test_shaw():
    tables, config = {"keys": tab(5), "values": tab(5, 0.2)}, {"name": "shaw", "limit": 2}
    close(scores(config, layer=tables)[1], [1.163102, 1.243742, 1.270252, 1.243650])
    close(outputs(config, layer=tables)[1], [0.192585, 0.497406, 0.787297, 0.733184])
    close(outputs(config, causal=True, layer=tables)[3], [0.375984, 0.372035, 0.658850, 0.907826])


def test_music():
    found = 2 * scores({"name": "music", "length": 4}, layer={"table": tab(4)}) - Q @ K.T
    expected = [0.012002, 0.010339, 0.005618, -0.013011, -0.013213, -0.001268]
    expected += [0.002721, -0.030414, -0.035586, -0.008040]
    close(found[np.tril_indices(4)], expected)
    close(found[np.triu_indices(4, 1)], 0)


def test_transformer_xl():
    biases = {
        "content": jnp.asarray(0.1 * np.cos(np.arange(4)))[None],
        "position": jnp.asarray(0.1 * np.sin(np.arange(4) + 1))[None],
    }
    given = {
        "params": {"biases": jax.tree.map(lambda x: x.astype(jnp.float32), biases)},
        "layer": {"position": {"kernel": jnp.eye(4)}},
    }
    close(scores("transformer_xl", **given)[3], [0.925527, 1.453938, 1.680203, 1.332649])
    close(outputs("transformer_xl", causal=True, **given)[3], [0.285999, 0.537937, 0.726831, 0.833014])


def test_deberta():
    v1 = {"name": "deberta", "buckets": None, "max_distance": 2, "share_projections": False, "norm": False}
    offset = registry.build(v1).rows.lookup()[np.clip(C - ROWS, -2, 2) + 2]
    np.testing.assert_array_equal(offset, [[2, 1, 0, 0], [3, 2, 1, 0], [3, 3, 2, 1], [3, 3, 3, 2]])
    twice = {"key": {"kernel": jnp.eye(4)}, "query": {"kernel": 2 * jnp.eye(4), "bias": jnp.zeros(4)}}
    table = {"table": tab(4)[:, 0]}
    close(scores(v1, table, twice)[1], [0.647249, 0.706533, 0.749833, 0.739022])
    close(scores({**v1, "p2c": "paper"}, table, twice)[1], [0.676656, 0.706533, 0.711611, 0.698854])


def test_deberta_buckets():
    rows = registry.build("deberta").rows
    at = np.array([127, 128, 129, 130, 135, 150, 200, 256, 300, 400, 500, 511])
    expected = np.array([127, 128, 129, 130, 133, 143, 169, 192, 207, 233, 254, 255])
    np.testing.assert_array_equal(rows.lookup()[rows.span - at] - 256, expected)
    np.testing.assert_array_equal(rows.lookup()[rows.span + at] - 256, -expected)


def test_huang():
    five = 1 + 0.1 * jnp.arange(5.0)
    found = scores({"name": "huang_m1", "limit": 2}, layer={"factors": five[:3]})
    close(found[1], [1.276357, 1.238573, 1.394187, 1.494941])
    found = scores({"name": "huang_m2", "limit": 2}, layer={"factors": five})
    close(found[1], [1.276357, 1.486287, 1.647676, 1.744098])
    found = scores({"name": "huang_m3", "limit": 2}, layer={"factors": 1 + tab(5)[:, 0]})
    close(found[1], [1.147753, 1.243260, 1.281213, 1.247336])
    found = scores({"name": "huang_m4", "limit": 2}, layer={"table": tab(5)[:, 0]})
    close(found[1], [1.167536, 1.233747, 1.251415, 1.224030])


def test_irpe():
    np.testing.assert_array_equal(
        piecewise(np.arange(-6, 7), 1.9, 3.8, 15.2), [-3, -3, -3, -2, -2, -1, 0, 1, 2, 2, 3, 3, 3]
    )
    found = piecewise(np.array([4, 5, 6, 8, 12, 16, 24, 32, 64]), 4, 8, 32)
    np.testing.assert_array_equal(found, [4, 4, 5, 5, 6, 7, 7, 8, 8])
    assert piecewise(np.array(5), 1.9, 3.8, 15.2) == 3
    rows = registry.build("irpe").maps[""]
    assert rows.num_rows == 7
    # The far end of the product map's ids (−3, 5) = 13 and (13, −13) = 42 is the offset of its column.
    assert [rows.lookup()[rows.span - 5], rows.lookup()[rows.span + 13]] == [13 % 7, 42 % 7]


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
