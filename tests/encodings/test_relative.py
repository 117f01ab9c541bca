"""Content-dependent relative encodings where they are each other, or a sum that one can write down."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import AttentionMask, Positions, attention
from zoo.encodings import Dims, Place, Project, Site, logits, registry
from zoo.encodings.sinusoidal import Sinusoidal, sinusoids
from zoo.errors import UserError

T, N, H = 7, 2, 4
D = N * H
Q, K, V = (jax.random.normal(jax.random.key(seed), (1, T, N, H)) for seed in (0, 1, 2))
R = np.arange(T)[None, :] - np.arange(T)[:, None]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def content(scale=H**-0.5):
    return jnp.einsum("btnh,bsnh->bnts", Q, K) * scale


def layer_of(config, params, **arguments):
    """What `attention` makes of the encoding's layer."""
    part, dims = registry.build(config), Dims(D, N, N, H, 1, T)
    place, x = Place(Positions.arange(T), span=T - 1), jnp.zeros((1, T, D))
    site = Site(
        x, x, {}, Project(*(lambda h: h.reshape(*h.shape[:-1], N, H) for _ in range(3))), place, AttentionMask()
    )
    shared = part.shared(dims)
    made = None if shared is None else shared.apply({}, place)
    e = part.layer(dims).apply({"params": params}, made, Q, K, V, site)
    return attention(e.q, e.k, e.v, terms=e.terms, scale=e.scale, **arguments)


def test_shaw_with_the_table_of_nezha_is_nezha():
    nezha = {"name": "nezha", "limit": 3}
    (term,) = registry.build(nezha).shared(Dims(D, N, N, H, 1, T)).apply({}, Place(Positions.arange(T), span=T - 1))
    table, shaw = term.query.values, {"name": "shaw", "limit": 3}
    params = {"keys": table, "values": table}
    chex.assert_trees_all_close(logits(shaw, Q, K, params={"layer": params}), logits(nezha, Q, K), atol=1e-6)
    chex.assert_trees_all_close(layer_of(shaw, params), layer_of(nezha, {}), atol=1e-6)


def test_shaw_with_a_wide_table_is_every_distance_by_itself():
    table = normal(3, 2 * T + 1, 1, H)
    expected = content() + jnp.einsum("btnh,tsh->bnts", Q, table[R + T, 0]) / H**0.5
    params = {"keys": table, "values": jnp.zeros_like(table)}
    chex.assert_trees_all_close(
        logits({"name": "shaw", "limit": T}, Q, K, params={"layer": params}), expected, atol=1e-5
    )


@pytest.mark.parametrize("bidirectional", [False, True])
def test_music_beyond_its_table_is_clipped_or_nothing(bidirectional):
    """Within it, one row per distance; Shaw's key side where clipped."""
    config = {"name": "music", "length": 3, "bidirectional": bidirectional}
    table = normal(4, 5 if bidirectional else 3, N, H)
    line = table if bidirectional else jnp.concatenate([table, jnp.zeros((2, N, H))])
    met = jnp.einsum("btnh,tsnh->bnts", Q, line[np.clip(R, -2, 2) + 2]) / H**0.5
    for beyond, inside in (("clip", np.ones_like(R)), ("zero", np.abs(R) < 3)):
        found = logits({**config, "beyond": beyond}, Q, K, params={"layer": {"table": table}})
        seen = inside * (1 if bidirectional else R <= 0)
        chex.assert_trees_all_close(found - content(), met * seen, atol=1e-5)


def xl_params():
    biases = {"content": normal(5, N, H), "position": normal(6, N, H)}
    return biases, normal(7, D, D)


def test_transformer_xl_is_one_more_product_of_two_vectors():
    """The separable form: a rotation of W_Rᵀ(q + w) by the query's position against the sinusoid at the key's."""
    biases, kernel = xl_params()
    params = {"shared": {"biases": biases}, "layer": {"position": {"kernel": kernel}}}
    u, w = biases["content"], biases["position"]
    a = jnp.einsum("btnh,dnh->btnd", Q + w, kernel.reshape(D, N, H))
    sine, cosine = jnp.split(sinusoids(Sinusoidal(layout="halves"), jnp.arange(T), D)[:, None], 2, axis=-1)
    a_sine, a_cosine = jnp.split(a, 2, axis=-1)
    f = jnp.concatenate([a_cosine * sine - a_sine * cosine, a_sine * sine + a_cosine * cosine], axis=-1)
    keys = jnp.concatenate([sine, cosine], axis=-1)[:, 0]
    expected = jnp.einsum("btnh,bsnh->bnts", Q + u, K) + jnp.einsum("btnd,sd->bnts", f, keys)
    chex.assert_trees_all_close(logits("transformer_xl", Q, K, params=params), expected / H**0.5, atol=2e-5)


def test_transformer_xl_clamps_the_distance_and_may_untie_its_biases():
    biases, kernel = xl_params()
    layer = {"position": {"kernel": kernel}, "biases": biases}
    found = logits({"name": "transformer_xl", "clamp": 2, "untie": True}, Q, K, params={"layer": layer})
    waves = sinusoids(Sinusoidal(layout="halves"), jnp.asarray(np.clip(-R, -2, 2)), D) @ kernel
    position = jnp.einsum("btnh,tsnh->bnts", Q + biases["position"], waves.reshape(T, T, N, H))
    expected = jnp.einsum("btnh,bsnh->bnts", Q + biases["content"], K) + position
    chex.assert_trees_all_close(found, expected / H**0.5, atol=2e-5)


def test_transformer_xl_without_parameters_is_no_encoding():
    _, kernel = xl_params()
    biases = {"content": jnp.zeros((N, H)), "position": jnp.zeros((N, H))}
    params = {"shared": {"biases": biases}, "layer": {"position": {"kernel": 0 * kernel}}}
    chex.assert_trees_all_close(logits("transformer_xl", Q, K, params=params), logits("none", Q, K), atol=1e-6)


def deberta_params():
    own = {"key": {"kernel": normal(8, D, D)}, "query": {"kernel": normal(9, D, D), "bias": normal(10, D)}}
    return {"shared": {"table": normal(11, 6, D)}, "layer": own}


V1 = {"name": "deberta", "buckets": None, "max_distance": 3, "share_projections": False, "norm": False}


@pytest.mark.parametrize(("p2c", "key_bias"), [("code", False), ("paper", True), ("none", True)])
def test_deberta_is_three_products_and_its_scale_counts_them(p2c, key_bias):
    params = deberta_params()
    if p2c == "none":
        params["layer"].pop("query")
    rows, bias = np.clip(3 - R, 0, 5), 0
    if key_bias:
        bias = params["layer"]["key"]["bias"] = normal(16, D)
    keys = (params["shared"]["table"] @ params["layer"]["key"]["kernel"] + bias).reshape(6, N, H)
    expected = content(1.0) + jnp.einsum("btnh,tsnh->bnts", Q, keys[rows])
    if p2c != "none":
        own = params["layer"]["query"]
        queries = (params["shared"]["table"] @ own["kernel"] + own["bias"]).reshape(6, N, H)
        expected += jnp.einsum("bsnh,tsnh->bnts", K, queries[np.clip(3 + R, 0, 5) if p2c == "paper" else rows])
    scale = ((2 if p2c == "none" else 3) * H) ** -0.5
    found = logits({**V1, "p2c": p2c, "key_bias": key_bias}, Q, K, params=params)
    chex.assert_trees_all_close(found, expected * scale, atol=1e-4, rtol=1e-5)


def test_deberta_shares_the_projections_of_the_layer_and_normalises_its_table():
    """With the identity for a projection, P's rows meet queries and keys as they are."""
    config, table = {"name": "deberta", "buckets": 4, "max_distance": 8}, normal(12, 8, D)
    norm = {"scale": normal(13, D), "bias": normal(14, D)}
    centred = table - table.mean(-1, keepdims=True)
    p = centred / jnp.sqrt(table.var(-1, keepdims=True) + 1e-7) * norm["scale"] + norm["bias"]
    lookup = registry.build(config).rows.lookup()
    p = p.reshape(8, N, H)[lookup[np.clip(R, -8, 8) + 8]]
    expected = content(1.0) + jnp.einsum("btnh,tsnh->bnts", Q, p) + jnp.einsum("bsnh,tsnh->bnts", K, p)
    found = logits(config, Q, K, params={"shared": {"table": table, "norm": norm}})
    chex.assert_trees_all_close(found, expected / (3 * H) ** 0.5, atol=1e-4, rtol=1e-5)


def test_huang_special_cases():
    symmetric, four = jnp.array([0.5, 2.0, 1.5, 2.0, 0.5]), normal(15, 5, H)

    def found(method, **layer):
        keys = {"keys": layer.pop("keys")} if "keys" in layer else {}
        return logits({"name": f"huang_{method}", "limit": 2, **keys}, Q, K, params={"layer": layer})

    one = found("m1", factors=symmetric[2:])
    chex.assert_trees_all_close(found("m2", factors=symmetric), one, atol=1e-6)
    skewed = jnp.arange(1.0, 6.0)
    of_all_channels = jnp.broadcast_to(skewed[:, None], (5, H))
    chex.assert_trees_all_close(found("m3", factors=of_all_channels), found("m2", factors=skewed), atol=1e-5)
    shaw = {"name": "shaw", "limit": 2, "values": False}
    expected = logits(shaw, Q, K, params={"layer": {"keys": four[:, None]}})
    chex.assert_trees_all_close(found("m4", table=four, keys=False), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["huang_m1", "huang_m2", "huang_m3", "irpe"])
def test_initial_values_are_no_encoding(name):
    chex.assert_trees_all_close(logits(name, Q, K), content(), atol=1e-6)


def test_irpe_on_keys_over_the_range_of_the_identity_is_shaw():
    """ratio = 7 leaves every offset of this sequence by itself; rows run by query minus key."""
    table = normal(16, 29, 1, H)
    found = logits({"name": "irpe", "ratio": 7.0}, Q, K, params={"layer": {"key": table}})
    shaw = {"name": "shaw", "limit": 14, "values": False}
    chex.assert_trees_all_close(found, logits(shaw, Q, K, params={"layer": {"keys": table[::-1]}}), atol=1e-6)


@pytest.mark.parametrize("mapping", ["product", "cross", "euclidean", "quantized"])
def test_irpe_sides_and_mappings(mapping):
    """On queries the reversed offset counts; a bias is outside the scale; undirected maps have half the rows."""
    part = registry.build({"name": "irpe", "mapping": mapping, "on": ("query", "key", "value")})
    rows = part.maps[""]
    assert rows.num_rows == (7 if mapping in ("product", "cross") else 4)
    # Squares leap over bucket 2.
    assert set(rows.lookup()) == set(range(rows.num_rows)) - ({2} if mapping == "quantized" else set())
    at = rows.lookup()[np.clip(R, -rows.span, rows.span) + rows.span]
    of = {side: normal(seed, rows.num_rows, 1, H) for seed, side in ((17, "query"), (18, "key"), (19, "value"))}
    met = content(1.0) + jnp.einsum("btnh,tsh->bnts", Q, of["key"][at, 0])
    met = (met + jnp.einsum("bsnh,tsh->bnts", K, of["query"][at.T, 0])) / H**0.5
    chex.assert_trees_all_close(logits(part, Q, K, params={"layer": of}), met, atol=2e-5)
    weights = jax.nn.softmax(met)
    out = jnp.einsum("bnts,bsnh->btnh", weights, V) + jnp.einsum("bnts,tsh->btnh", weights, of["value"][at, 0])
    chex.assert_trees_all_close(layer_of(part, of), out, atol=2e-5)
    bias = {"name": "irpe", "mapping": mapping, "mode": "bias", "on": ("query", "key")}
    of = {side: table[:, :, 0] for side, table in of.items() if side != "value"}
    found = logits(bias, Q, K, params={"layer": of})
    chex.assert_trees_all_close(
        found - content(), (of["key"][at, 0] + of["query"][at.T, 0])[None, None] + 0 * found, atol=1e-5
    )


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"name": "irpe", "mode": "bias", "on": ("value",)}, "no table on value"),
        ({"name": "irpe", "on": ()}, "must name one or several"),
        ({"name": "irpe", "ratio": 0.5}, "must be at least 1"),
        ({"name": "deberta", "c2p": False, "p2c": "none"}, "use the encoding 'none'"),
        ({"name": "deberta", "buckets": 5}, "must be an even number"),
        ({"name": "deberta", "max_distance": 100}, "must be at least 130"),
        ({"name": "shaw", "limit": 0}, "must be at least 1"),
        ({"name": "transformer_xl", "clamp": 0}, "must be at least 1"),
    ],
)
def test_refusals(config, reason):
    with pytest.raises(UserError, match=reason):
        registry.build(config)
