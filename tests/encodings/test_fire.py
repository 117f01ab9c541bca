"""FIRE: its network against the plain one, gradients included, and what it becomes in special cases."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention import AttentionMask, Positions, attention
from zoo.encodings import Dims, Place, Project, Site, logits
from zoo.encodings.alibi import slopes
from zoo.encodings.fire import Fire, FireNetwork, Network, pieces
from zoo.encodings.t5 import T5, bucket

N, T = 2, 12
ZEROS = jnp.zeros((1, T, N, 4))
CAUSAL = AttentionMask(causal=True)
LOWER = np.tril_indices(T)


def biases(config, network, positions=None):
    """What FIRE adds at and below the diagonal, `[N, pairs]`."""
    return logits(config, ZEROS, ZEROS, positions, {"layer": {"network": network}})[0][:, LOWER[0], LOWER[1]]


def network(hidden_kernel, hidden_bias, output_kernel, c=1.0, threshold=1.0):
    """A network whose second layer is `output_kernel` `[M, N]`, without a second bias."""
    values = dict(
        hidden_kernel=jnp.asarray(hidden_kernel)[None],
        hidden_bias=hidden_bias,
        output_kernel=output_kernel,
        output_bias=jnp.zeros(N),
        c=c,
        threshold=threshold,
    )
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


def close(found, expected, atol=2e-5):
    chex.assert_trees_all_close(found, jnp.asarray(expected, jnp.float32)[:, LOWER[0], LOWER[1]], atol=atol)


LOOK_BACK = np.subtract.outer(np.arange(T), np.arange(T)).astype(float)


def test_as_alibi():
    """ψ = identity and a threshold Z no query reaches: f(u) = −m Z u."""
    z, m = 16.0, slopes(N)
    config = {"name": "fire", "transform": "identity", "threshold": z, "width": 1}
    close(biases(config, network([1.0], [0.0], [-m * z])), -m[:, None, None] * np.abs(LOOK_BACK))


def test_as_kerple_log():
    """ψ = ln(c x + 1) and Z = ψ(threshold): f(u) = −r1 Z u is −r1 ln(1 + r2 n) with r2 = c."""
    r1, r2, z = np.array([0.7, 1.5]), 0.3, np.log1p(0.3 * 64)
    config = {"name": "fire", "threshold": 64.0, "width": 1}
    expected = -r1[:, None, None] * np.log1p(r2 * np.maximum(LOOK_BACK, 0))
    close(biases(config, network([1.0], [0.0], [-r1 * z], c=r2)), expected)


def test_as_t5():
    """A sum of unit steps relu(n − t + 1) − relu(n − t) at the starts t of the buckets."""
    t5 = T5(num_buckets=4, max_distance=8, bidirectional=False)
    ids = bucket(-np.arange(T), t5)
    starts = np.flatnonzero(np.diff(ids)) + 1
    table = np.array([[0.3, -0.2], [0.1, 0.5], [-0.4, 0.2], [0.9, -0.7]])
    z = 16.0
    steps = np.diff(table, axis=0)
    kernel = np.full(2 * len(starts), z)
    bias = np.concatenate([1.0 - starts, -starts])
    params = network(kernel, bias, np.concatenate([steps, -steps]))
    params["output_bias"] = jnp.asarray(table[0], jnp.float32)
    config = {"name": "fire", "transform": "identity", "threshold": z, "width": len(kernel)}
    expected = table[ids[np.maximum(LOOK_BACK, 0).astype(int)]].transpose(2, 0, 1)
    close(biases(config, params), expected, atol=1e-4)


def plain(net: Network, u):
    return jax.nn.relu(u[..., None] * net.hidden_kernel[0] + net.hidden_bias) @ net.output_kernel + net.output_bias


EDGES = (
    # rising and falling units with the knot inside, below and above [0, 1], flat ones, and one with a tiny slope
    [2.0, -2.0, 1.0, 1.0, -1.0, -1.0, 0.0, 0.0, 1e-9, -1e-9, 0.0],
    [-0.8, 1.1, 3.0, -3.0, 3.0, -3.0, 0.5, -0.5, 0.5, -0.5, 0.0],
)


def test_pieces_are_the_network():
    w, b = (jnp.array(values, jnp.float32) for values in EDGES)
    out = jax.random.normal(jax.random.key(0), (len(w), N))
    net = Network(jnp.ones(()), jnp.ones(()), w[None], b, out, jnp.array([0.3, -0.1]))
    u = jnp.linspace(0, 1, 38)
    weights = jax.random.normal(jax.random.key(1), (38, N))

    def by_pieces(net):
        knots, slopes, line = pieces(net)
        return line[:, 0] + line[:, 1] * u[:, None] + jnp.maximum(u[:, None], knots) @ slopes.T

    chex.assert_trees_all_close(by_pieces(net), plain(net, u), atol=1e-5)
    found, expected = (jax.grad(lambda n, f=f: (f(n) * weights).sum())(net) for f in (by_pieces, lambda n: plain(n, u)))
    # At w = b = 0 the network has a kink in every direction; no other unit has one at a point of u.
    found, expected = (
        g._replace(hidden_kernel=g.hidden_kernel[:, :-1], hidden_bias=g.hidden_bias[:-1]) for g in (found, expected)
    )
    chex.assert_trees_all_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("transform", ["log", "identity"])
def test_gradients_of_every_parameter_equal_those_of_the_plain_network(transform):
    """Through chunked attention, with rows on both sides of the threshold, against dense logits of the unfolded network."""
    fire = Fire(threshold=5.0, width=6, transform=transform)
    params = FireNetwork(fire, N).init(jax.random.key(3), None)["params"]
    q, k, v, weights = (jax.random.normal(jax.random.key(s), (1, T, N, 4)) for s in range(4))

    place = Place(Positions.arange(T), span=T - 1)
    layer = fire.layer(Dims(8, N, N, 4, 1, T))
    site = Site(q, q, {}, Project(None, None, None), place, CAUSAL)

    def fused(params):
        encoded = layer.apply({"params": {"network": params}}, None, q, k, v, site)
        return (attention(q, k, v, terms=encoded.terms, mask=CAUSAL) * weights).sum()

    def dense(params):
        net = FireNetwork(fire, N).apply({"params": params}, None)
        i = jnp.arange(T, dtype=jnp.float32)
        n = jnp.maximum(i[:, None] - i, 0)

        def psi(x):
            return x if transform == "identity" else jnp.log(jnp.abs(net.c * x) + 1)

        u = psi(n) / (psi(jnp.maximum(i, net.threshold)) + 1e-6)[:, None]
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / 2 + jnp.moveaxis(plain(net, u), 2, 0)
        p = jax.nn.softmax(jnp.where(jnp.tri(T, dtype=bool), scores, -jnp.inf))
        return (jnp.einsum("bnts,bsnh->btnh", p, v) * weights).sum()

    found, expected = jax.jit(jax.grad(fused))(params), jax.jit(jax.grad(dense))(params)
    for name in params:
        if name == "c" and transform == "identity":
            assert found[name] == 0
        elif name != "output_bias":  # the same for all keys: softmax passes it nothing
            assert jnp.any(jnp.abs(expected[name]) > 1e-4), name
    chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-3)


def test_it_is_toeplitz_up_to_the_threshold_only():
    params = FireNetwork(Fire(), N).init(jax.random.key(0), None)["params"]
    early = logits({"name": "fire", "threshold": 50.0}, ZEROS, ZEROS, None, {"layer": {"network": params}})[0, 0]
    late = logits({"name": "fire", "threshold": 3.0}, ZEROS, ZEROS, None, {"layer": {"network": params}})[0, 0]
    chex.assert_trees_all_close(early[5, 2], early[11, 8], atol=1e-6)
    assert abs(late[5, 2] - late[11, 8]) > 1e-3
    assert abs(late[2, 1] - late[3, 2]) < 1e-6


def test_layers_may_share_the_network():
    params = FireNetwork(Fire(), N).init(jax.random.key(0), None)["params"]
    own = logits("fire", ZEROS, ZEROS, None, {"layer": {"network": params}})
    one = logits({"name": "fire", "share_layers": True}, ZEROS, ZEROS, None, {"shared": params})
    chex.assert_trees_all_close(own, one, atol=0)
